"""Classes of label maps and their colours: Cityscapes' 19 training classes, or a file of your own.

A class file has one line per class, `index name R G B`, separated by spaces, tabs or commas; `#` begins a comment line
and the first line may be a header:

    # index name R G B
    0 Sky 128 128 128
    11 Unlabelled 0 0 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import EvaluationError

VOID = -1
VOID_NAMES = ("void", "unlabelled", "unlabeled", "ignore")
LARGEST_INDEX = 65535  # of a 16-bit image
PIXELS_AT_ONCE = 1 << 13  # their distances stay in the processor's cache


class LabelClass(NamedTuple):
    """A class of pixels: the index it has in label maps and the colour it is painted with, RGB 0..255."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    name: str
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Palette:
    """`classes` are scored, `void` is left out, both by index; a class's position in `classes` is its row of the scores."""

    source: str
    classes: tuple[LabelClass, ...]
    void: tuple[LabelClass, ...] = ()
    cityscapes: bool = False  # the built-in classes

    @property
    def names(self) -> list[str]:
        """The classes' names, by id."""
        return [entry.name for entry in self.classes]

    @cached_property
    def colours(self) -> np.ndarray:
        """uint8 [K + V, 3]: the K classes, then void."""
        return np.array([entry.colour for entry in self.classes + self.void], dtype=np.uint8)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [K + V]: the position of every row of `colours`, VOID for void's."""
        return np.array([*range(len(self.classes)), *[VOID] * len(self.void)])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Label indices of any shape -> rows of `colours`. Raises EvaluationError naming the first unknown index."""
        table = np.full(LARGEST_INDEX + 1, VOID)
        for row, entry in enumerate(self.classes + self.void):
            table[entry.index] = row
        inside = (indices >= 0) & (indices <= LARGEST_INDEX)
        rows = np.where(inside, table[np.where(inside, indices, 0)], VOID)
        if (rows == VOID).any():
            unknown = indices[rows == VOID][0]
            pixels = int((indices == unknown).sum())
            raise EvaluationError(f"index {unknown} ({pixels} pixels) is no class and not void ({self.source})")
        return rows


def nearest_class(rgb: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Row of the nearest colour for every pixel: least squared Euclidean distance in RGB, the lower row on a tie.

    rgb: uint8 [..., 3]; palette: uint8 [K, 3]. Returns int64 [...].
    """
    colours = palette.astype(np.float32)  # every number below is an integer under 2^24: float32 is exact
    offsets = (colours**2).sum(axis=1, keepdims=True)
    pixels = rgb.reshape(-1, 3)
    nearest = np.empty(len(pixels), dtype=np.int64)
    for start in range(0, len(pixels), PIXELS_AT_ONCE):
        piece = slice(start, start + PIXELS_AT_ONCE)
        # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for every c
        nearest[piece] = (offsets - 2 * (colours @ pixels[piece].T.astype(np.float32))).argmin(axis=0)
    return nearest.reshape(rgb.shape[:-1])


def read_classes(path: Path) -> list[LabelClass]:
    """Classes of a file in the order of its lines. Raises EvaluationError naming the file and line."""
    return parse_classes(path.read_bytes(), str(path))


def parse_classes(content: bytes, source: str) -> list[LabelClass]:
    """The same of a file's bytes, for files inside archives; `source` names it in messages."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{source}: not a text file of classes (index name R G B)") from error
    classes: list[LabelClass] = []
    first = True
    for number, line in enumerate(lines, start=1):
        fields = _fields(line)
        if not any(fields) or fields[0].startswith("#"):
            continue
        header = first and not any(field.isdecimal() for field in fields)
        first = False
        if not header:
            classes.append(_parse(fields, classes, f"{source}, line {number}"))
    return classes


def _fields(line: str) -> list[str]:
    separator = "\t" if "\t" in line else "," if "," in line else None
    return [field.strip() for field in line.strip().split(separator)]


def _parse(fields: list[str], before: Sequence[LabelClass], where: str) -> LabelClass:
    """One line's class, which must differ from those before it in index, name and colour."""
    numbers, words = [fields[0], *fields[-3:]], fields[1:-3]
    if not any(words) or not all(number.isdecimal() for number in numbers):
        raise EvaluationError(f"{where}: expected `index name R G B`, found {' '.join(fields)[:60]!r}")
    index, *colour = map(int, numbers)
    if index > LARGEST_INDEX or max(colour) > 255:
        raise EvaluationError(f"{where}: colours lie in 0..255 and indices in 0..{LARGEST_INDEX}")
    entry = LabelClass(index, " ".join(words), (colour[0], colour[1], colour[2]))
    for other in before:
        for field, value, taken in zip(entry._fields, entry, other, strict=True):
            if value == taken:
                raise EvaluationError(f"{where}: {field} {value} of {entry.name} is already that of {other.name}")
    return entry


def palette_of(classes: Sequence[LabelClass], source: str, void: Sequence[str] | None = None) -> Palette:
    """Divide classes into scored and void. `void`: names or indices; None means the classes that VOID_NAMES names.

    Raises EvaluationError where `void` names no class, or nothing is left to score.
    """
    for name in void or ():
        if not any(_is(entry, name) for entry in classes):
            raise EvaluationError(f"--void {name}: no such class in {source}")
    wanted = VOID_NAMES if void is None else void
    ordered = sorted(classes)
    left_out = tuple(entry for entry in ordered if any(_is(entry, name) for name in wanted))
    scored = tuple(entry for entry in ordered if entry not in left_out)
    if not scored:
        raise EvaluationError(f"{source}: no class to score ({len(left_out)} void)")
    return Palette(source, scored, left_out, cityscapes=classes is CITYSCAPES)


def _is(entry: LabelClass, name_or_index: str) -> bool:
    return name_or_index.lower() in (entry.name.lower(), str(entry.index))


# Cordts et al., CVPR 2016; cityscapesScripts' labels.py: training ids, with void at 255
CITYSCAPES = [
    LabelClass(0, "road", (128, 64, 128)),
    LabelClass(1, "sidewalk", (244, 35, 232)),
    LabelClass(2, "building", (70, 70, 70)),
    LabelClass(3, "wall", (102, 102, 156)),
    LabelClass(4, "fence", (190, 153, 153)),
    LabelClass(5, "pole", (153, 153, 153)),
    LabelClass(6, "traffic light", (250, 170, 30)),
    LabelClass(7, "traffic sign", (220, 220, 0)),
    LabelClass(8, "vegetation", (107, 142, 35)),
    LabelClass(9, "terrain", (152, 251, 152)),
    LabelClass(10, "sky", (70, 130, 180)),
    LabelClass(11, "person", (220, 20, 60)),
    LabelClass(12, "rider", (255, 0, 0)),
    LabelClass(13, "car", (0, 0, 142)),
    LabelClass(14, "truck", (0, 0, 70)),
    LabelClass(15, "bus", (0, 60, 100)),
    LabelClass(16, "train", (0, 80, 100)),
    LabelClass(17, "motorcycle", (0, 0, 230)),
    LabelClass(18, "bicycle", (119, 11, 32)),
    LabelClass(255, "void", (0, 0, 0)),
]

# position in the list: training id
CITYSCAPES_LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def training_ids(label_ids: np.ndarray) -> np.ndarray:
    """Cityscapes' label ids 0..33 (255 and -1: licence plate) -> training ids, 255 where a label is not trained on.

    Raises EvaluationError where a value is no label id.
    """
    table = np.full(256, 255)
    table[CITYSCAPES_LABEL_IDS] = np.arange(len(CITYSCAPES_LABEL_IDS))
    known = ((label_ids >= -1) & (label_ids <= 33)) | (label_ids == 255)
    if not known.all():
        raise EvaluationError(f"{label_ids[~known][0]} is none of Cityscapes' label ids 0..33")
    return table[label_ids]  # -1 reads the last entry, 255
