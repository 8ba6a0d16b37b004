"""Several sources as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image
from typing_extensions import override

from ...errors import UserError
from .arrays import NpzSource
from .base import ImageSource
from .classes import is_number, ordered, renumbered

logger = logging.getLogger("guided_mt.data")


class Joined(ImageSource):
    """The images of each source in turn; a name is the one within its own source, so it may come twice.

    class_names: the names whose places are the class ids; None: the names of all sources in order, after the numbers of .npz
    files, which stay what they are. Where some sources have classes, the items of the others have the id -1.
    Raises UserError where items differ in type or in their sides, UnknownClassError for a class that is not in class_names.
    """

    def __init__(self, path: str, sources: Sequence[ImageSource], class_names: Sequence[str] | None = None):
        first = sources[0]
        for source in sources[1:]:
            if (source.side_names, source.dtype) != (first.side_names, first.dtype):
                raise UserError(f"{path}: items of {source.path} are not of the same kind as those of {first.path}")
        self.path, self.sources = path, list(sources)
        self.dtype, self.side_names = first.dtype, first.side_names
        self.is_array = all(source.is_array for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self.labels, self.class_names = _join_labels(path, sources, class_names)
        self.present = {
            name: np.concatenate([source.present.get(name, np.ones(len(source), bool)) for source in sources])
            for name in first.side_names
            if any(name in source.present for source in sources)
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    @override
    def read(self, index: int) -> Image.Image | np.ndarray:
        source, number = self._place(index)
        return source.read(number)

    @override
    def item_shape(self, image_size: int) -> tuple[int, ...]:
        return self.sources[0].item_shape(image_size)

    @override
    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        source, number = self._place(index)
        return source.decode(number, image_size, uniforms)

    @override
    def name(self, index: int) -> str:
        source, number = self._place(index)
        return source.name(number)

    @override
    def without_class(self) -> str:
        return self.sources[0].without_class()

    def _place(self, index: int) -> tuple[ImageSource, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], int(index) - int(self._ends[which]) + len(self.sources[which])


def _join_labels(
    path: str, sources: Sequence[ImageSource], class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """(int64 ids [N] or None, class names). Says how many items have none where others have one."""
    if all(source.labels is None for source in sources):
        return None, []
    known = _all_names(sources) if class_names is None else list(class_names)
    labels = np.concatenate([_ids(path, source, known) for source in sources])
    lacking = int((labels < 0).sum())
    if lacking:
        logger.info("%s: %d of %d items have no class", path, lacking, len(labels))
    return labels, known


def _all_names(sources: Sequence[ImageSource]) -> list[str]:
    """The numbers of the .npz with the most classes, so that each id stays its own place, then all other names in order.

    A folder called 2 is the class 2 of an .npz, however many digits that is written with.
    """
    numbers = max((source.class_names for source in sources if isinstance(source, NpzSource)), key=len, default=[])
    named = {name for source in sources if not isinstance(source, NpzSource) for name in source.class_names}
    return [*numbers, *ordered(name for name in named if not (is_number(name) and int(name) < len(numbers)))]


def _ids(path: str, source: ImageSource, known: Sequence[str]) -> np.ndarray:
    """int64 [n], -1 where there is no class. Raises UnknownClassError."""
    if source.labels is None:
        return np.full(len(source), -1)
    if isinstance(source, NpzSource):
        return source.labels
    return renumbered(path, source.labels, source.class_names, known)
