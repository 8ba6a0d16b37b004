"""Label maps of a folder, .zip, .tar or .npz, as class positions.

- one channel (a greyscale image, [N, H, W] in an .npz): class indices
- RGB, RGBA without its alpha ([N, H, W, 3] in an .npz): colours
- an image with a colour table (mode P): colours where every table entry that it uses is a colour of the classes or void,
  indices otherwise
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import EvaluationError
from .image_files import ImageFile, image_files
from .npz import open_npz, read_array
from .palettes import Palette, nearest_class, training_ids

CITYSCAPES_KINDS = ("_color", "_labelIds", "_instanceIds", "_labelTrainIds")


class LabelMaps(NamedTuple):
    """`read(i)` gives int64 [H, W] indices or uint8 [H, W, 3] colours. `stems` pair files; an .npz has none."""

    path: Path
    names: list[str]
    stems: list[str] | None
    read: Callable[[int], np.ndarray]


class Decoded(NamedTuple):
    """Positions in the palette's classes, int64 [H, W], VOID where there is none, and what was not exact about it."""

    positions: np.ndarray
    inexact: np.ndarray  # bool [H, W]: a prediction of void's index, or a reference colour that no class has
    largest_distance: float = 0.0  # of a reference colour to the nearest class, Euclidean in RGB


def open_label_maps(path: Path, key: str, palette: Palette, label_ids: Callable[[str], bool]) -> LabelMaps:
    """`key`: the array of an .npz. `label_ids(stem)`: whether indices are Cityscapes' label ids.

    Raises EvaluationError for a container or array that holds no label maps.
    """
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _of_npz(path, key, label_ids(path.stem))
    files = image_files(path)
    stems = [PurePosixPath(file.name).with_suffix("").as_posix() for file in files]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise EvaluationError(f"{path}: {len(twice)} names occur with several suffixes, such as {twice[0]}")
    names = [f"{path}: {file.name}" for file in files]

    def read(i: int) -> np.ndarray:
        array = _read_image(files[i], names[i], palette)
        return _training_ids(array, names[i]) if array.ndim == 2 and label_ids(stems[i]) else array

    return LabelMaps(path, names, stems, read)


def _of_npz(path: Path, key: str, label_ids: bool) -> LabelMaps:
    with open_npz(path) as file:
        maps = read_array(file, key, path)
    if maps.ndim == 4 and maps.shape[3] == 1:
        maps = maps[..., 0]
    colours = maps.ndim == 4 and maps.shape[3] == 3 and maps.dtype == np.uint8
    if not colours and not (maps.ndim == 3 and maps.dtype.kind in "iu"):
        raise EvaluationError(
            f"{path}: array {key} is {maps.dtype} {list(maps.shape)}; expected uint8 [N, H, W, 3] colours"
            " or integer [N, H, W] indices"
        )
    names = [f"{path}: {key}[{i}]" for i in range(len(maps))]

    def read(i: int) -> np.ndarray:
        if colours:
            return maps[i]
        indices = maps[i].astype(np.int64)
        return _training_ids(indices, names[i]) if label_ids else indices

    return LabelMaps(path, names, None, read)


def _training_ids(indices: np.ndarray, name: str) -> np.ndarray:
    try:
        return training_ids(indices)
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from error


def _read_image(file: ImageFile, name: str, palette: Palette) -> np.ndarray:
    """int64 [H, W] indices or uint8 [H, W, 3] colours."""
    data = file.read()
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{name}: not a readable image ({error})") from error
    if image.mode == "P" and _is_painted(image, palette):
        image = image.convert("RGB")
    if image.mode in ("RGB", "RGBA"):
        return np.asarray(image)[..., :3]
    if len(image.getbands()) > 1 or image.mode == "F":
        raise EvaluationError(
            f"{name}: an image of mode {image.mode} is neither indices (L, P) nor colours (RGB, RGBA)"
        )
    indices = np.asarray(image).astype(np.int64)
    if data.startswith(b"\x89PNG") and image.mode == "L":
        indices //= {2: 85, 4: 17}.get(data[24], 1)  # Pillow stretches grey of 2 and 4 bits to 0..255
    return indices


def _is_painted(image: Image.Image, palette: Palette) -> bool:
    """Whether the colour-table entries that this image uses are all colours of the classes or void."""
    table = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(np.asarray(image))
    own = {tuple(colour) for colour in palette.colours.tolist()}
    return used[-1] < len(table) and all(tuple(colour) in own for colour in table[used].tolist())


def decode_prediction(array: np.ndarray, palette: Palette) -> Decoded:
    """Every pixel becomes one of the classes: that of the nearest colour. Void's index counts as void's colour."""
    colours, classes = palette.colours, len(palette.classes)
    if array.ndim == 3:
        return Decoded(nearest_class(array, colours[:classes]), np.zeros(array.shape[:2], bool))
    rows = palette.rows(array)
    return Decoded(nearest_class(colours, colours[:classes])[rows], rows >= classes)


def decode_reference(array: np.ndarray, palette: Palette) -> Decoded:
    """Classes or void, by the nearest colour or by index."""
    if array.ndim == 2:
        return Decoded(palette.positions[palette.rows(array)], np.zeros(array.shape, bool))
    rows = nearest_class(array, palette.colours)
    squared = ((array.astype(np.int64) - palette.colours[rows]) ** 2).sum(axis=-1)
    return Decoded(palette.positions[rows], squared > 0, float(squared.max(initial=0)) ** 0.5)


def resize(decoded: Decoded, size: tuple[int, int]) -> Decoded:
    """Nearest neighbour to (height, width)."""
    height, width = size
    positions, inexact = (
        np.asarray(Image.fromarray(array.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST))
        for array in (decoded.positions, decoded.inexact)
    )
    return Decoded(positions.astype(np.int64), inexact.astype(bool), decoded.largest_distance)


def pairs(pred: LabelMaps, ref: LabelMaps) -> list[tuple[int, int]]:
    """Which maps belong together: by name without suffix, or by order where one side is an .npz.

    Raises EvaluationError where a map has no partner.
    """
    if pred.stems is None or ref.stems is None:
        if len(pred.names) != len(ref.names):
            raise EvaluationError(f"{pred.path} holds {len(pred.names)} label maps, {ref.path} {len(ref.names)}")
        return [(i, i) for i in range(len(pred.names))]
    positions = {stem: i for i, stem in enumerate(ref.stems)}
    for here, its, there, others in ((ref, ref.stems, pred, pred.stems), (pred, pred.stems, ref, ref.stems)):
        missing = sorted(set(its) - set(others))
        if missing:
            raise EvaluationError(
                f"{len(missing)} of the {len(its)} names in {here.path} are not in {there.path}:"
                f" {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}{_kinds_hint(ref.stems)}"
            )
    return [(i, positions[stem]) for i, stem in enumerate(pred.stems)]


def _kinds_hint(stems: list[str]) -> str:
    kinds = [kind for kind in CITYSCAPES_KINDS if any(stem.endswith(kind) for stem in stems)]
    return f" (the reference holds {', '.join(kinds)}: give a folder of one kind)" if len(kinds) > 1 else ""
