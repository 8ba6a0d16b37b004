"""Several images per item: a main source, and others whose files have the same names."""

from __future__ import annotations

import logging
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from typing_extensions import override

from ..errors import UserError
from .open import open_source
from .sources import ArraySource, ImageSource
from .sources.formats import TooManyPixels
from .transforms import crop_window, random_short_side, resize_short_side, same_aspect, sizes_to, to_rgb

logger = logging.getLogger("guided_mt.data")

ABSENT = 127  # the grey of a side that an item lacks


class Sides(ImageSource):
    """Items of `main` with their partners in `others`, {side: source}: uint8 [3 * sides, s, s], all cropped alike.

    A partner is the file of the same path without its suffix: a/x.png of a/x.jpg. Where no path is the same, the folders
    above all files of a source don't count; where that is not enough, no folder does. Two arrays match by number.
    An item without a partner is grey there, and False in `present`. Classes and names of items are those of `main`;
    main_name is its name as a side.
    Raises UserError where no file matches, two match one item, or a source has items of another kind.
    """

    def __init__(self, main: ImageSource, others: Mapping[str, ImageSource], main_name: str = "image"):
        if main_name in others:
            raise UserError(
                f"{others[main_name].path}: a side named {main_name}, as the main one is; give another name"
            )
        for source in (main, *others.values()):
            if source.side_names or source.dtype != np.uint8 or source.item_shape(8) != (3, 8, 8):
                raise UserError(
                    f"{source.path}: its items are not single images, so that they can be no side of others"
                )
        self.path, self.labels, self.class_names = main.path, main.labels, main.class_names
        self.main, self.others = main, dict(others)
        self.side_names = (main_name, *others)
        self.is_array = all(source.is_array for source in (main, *others.values()))
        names = [main.name(k) for k in range(len(main))]
        self.partners = {side: _match(main, names, source) for side, source in others.items()}  # int64 [N], -1: none
        found = {side: partners >= 0 for side, partners in self.partners.items()}
        self.present = {side: present for side, present in found.items() if not present.all()}
        for side, source in others.items():
            _say_what_is_alone(main.path, side, found[side], source)

    def __len__(self) -> int:
        return len(self.main)

    def read(self, index: int) -> Image.Image | np.ndarray:
        """The main image."""
        return self.main.read(index)

    @override
    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        short_side = image_size if uniforms is None else random_short_side(image_size, uniform=uniforms[0])
        main = to_rgb(self.main.read(index))
        last = sizes_to(*main.size, short_side)[-1]
        item = np.full(self.item_shape(image_size), ABSENT, dtype=np.uint8)
        for k, side in enumerate(self.side_names):
            if k == 0:
                image = main
            elif self.partners[side][index] >= 0:
                image = self._partner(side, index, main.size)
            else:
                continue
            window = crop_window(resize_short_side(image, short_side, last), image_size, uniforms)
            item[3 * k : 3 * k + 3] = window.transpose(2, 0, 1)
        return item

    @override
    def name(self, index: int) -> str:
        return self.main.name(index)

    @override
    def without_class(self) -> str:
        return self.main.without_class()

    def _partner(self, side: str, index: int, main_size: tuple[int, int]) -> Image.Image:
        """Raises UserError where the aspect ratio is not that of a main image of (width, height) `main_size`."""
        source, number = self.others[side], int(self.partners[side][index])
        try:
            image = to_rgb(source.read(number))
        except (MemoryError, UserError, TooManyPixels):
            raise
        except Exception as error:
            raise OSError(f"its {side} {source.name(number)}: {error}") from error  # the warning names the main image
        if not same_aspect(image.size, main_size):
            raise UserError(
                f"{self.path}: {self.name(index)} has {main_size[0]}x{main_size[1]} pixels and its {side} "
                f"{source.name(number)} in {source.path} {image.width}x{image.height}: not the same aspect ratio, so they "
                f"cannot show the same"
            )
        return image


def open_sides(
    path: str | Path,
    others: Mapping[str, str | Path],
    class_names: Sequence[str] | None = None,
    main_name: str = "image",
) -> Sides:
    """`Sides` of what `open_source` opens: path and class_names as there, and a path for each other side. Raises UserError."""
    main = open_source(path, class_names)
    return Sides(main, {side: open_source(other) for side, other in others.items()}, main_name)


# ---------------------------------------------------------------- matching


def _paths(names: Sequence[str]) -> list[str]:
    return [os.path.splitext(name)[0] for name in names]


def _paths_below_common_folder(names: Sequence[str]) -> list[str]:
    parts = [name.split("/") for name in names]
    first, last = min(parts)[:-1], max(parts)[:-1]  # what these two share, all share
    depth = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return _paths(["/".join(name[depth:]) for name in parts])


def _stems(names: Sequence[str]) -> list[str]:
    return [path.rpartition("/")[2] for path in _paths(names)]


_RULES: tuple[Callable[[Sequence[str]], list[str]], ...] = (_paths, _paths_below_common_folder, _stems)


def _match(main: ImageSource, names: Sequence[str], other: ImageSource) -> np.ndarray:
    """int64 [N]: the number in `other` of each item's partner, -1 where it has none; by the first rule that finds any."""
    if isinstance(main, ArraySource) and isinstance(other, ArraySource):
        numbers = np.arange(len(main))  # their names are made up, of the class too
        return np.where(numbers < len(other), numbers, -1)
    main_path, other_names = main.path, [other.name(k) for k in range(len(other))]
    for rule in _RULES:
        keys, other_keys = rule(names), rule(other_names)
        matched = set(keys) & set(other_keys)
        if matched:
            break
    else:
        raise UserError(
            f"{other.path}: no file has the name of one in {main_path}; partners are called alike, as a/x.jpg and a/x.png, "
            f"but the first are {names[0]} there and {other_names[0]} here"
        )
    for path, all_keys, all_names in ((main_path, keys, names), (other.path, other_keys, other_names)):
        twice = _same_key(all_keys, all_names, matched)
        if twice is not None:
            raise UserError(
                f"{other.path} beside {main_path}: {twice[0]} and {twice[1]} of {path} match the same file of the other; "
                f"rename one, or remove it"
            )
    places = {key: k for k, key in enumerate(other_keys)}
    return np.array([places.get(key, -1) for key in keys], dtype=np.int64)


def _same_key(keys: Iterable[str], names: Iterable[str], matched: set[str]) -> tuple[str, str] | None:
    """Two names with the same key, of those in `matched`."""
    seen: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        if key in matched and key in seen:
            return seen[key], name
        seen[key] = name
    return None


def _say_what_is_alone(main_path: str, side: str, found: np.ndarray, source: ImageSource) -> None:
    lacking, unused = int((~found).sum()), len(source) - int(found.sum())
    if lacking or unused:
        logger.info(
            "%s: %d of %d items have no %s in %s, and %d of its %d files no item",
            *(main_path, lacking, len(found), side, source.path, unused, len(source)),
        )
