"""Label maps: exact class indices of PNG files, and the colours they are painted with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from PIL import Image

from evaluations.files.palettes import CITYSCAPES, Palette, nearest_class, palette_of, parse_classes, training_ids
from guided_mt.data.sources.formats import MAX_PIXELS, open_image
from guided_mt.errors import UserError

LARGEST_CLASS = 255  # indices are kept as uint8

# What Cityscapes' _color files paint labels with that are not trained on (cityscapesScripts' labels.py). Pole groups and
# licence plates have the colours of poles and cars there, so only _labelIds and _labelTrainIds tell them apart.
CITYSCAPES_VOID_COLOURS = [
    (0, 0, 0),
    (111, 74, 0),
    (81, 0, 81),
    (250, 170, 160),
    (230, 150, 140),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (0, 0, 90),
    (0, 0, 110),
]


class LabelReader:
    """Files of one data set -> class indices of its palette.

    indices: {value in a one-channel file: class index}; colours: {RGB of a painted file: class index}.
    """

    def __init__(
        self, palette: Palette, indices: Mapping[int, int], colours: Mapping[tuple[int, int, int], int] | None = None
    ):
        entries = palette.classes + palette.void
        self.palette = palette
        self.colours = {entry.colour: entry.index for entry in entries} | dict(colours or {})
        self._paint = np.zeros((LARGEST_CLASS + 1, 3), dtype=np.uint8)
        for entry in entries:
            self._paint[entry.index] = entry.colour
        self._table = np.full(LARGEST_CLASS + 1, -1, dtype=np.int16)
        for value, index in indices.items():
            self._table[value] = index

    def read(self, content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """uint8 [H, W] of class indices, void among them.

        Raises UserError where an index or a colour is none of the palette's; TooManyPixels, and whatever Pillow raises for a
        broken file.
        """
        image = open_image(content, max_pixels)
        image.load()
        if image.mode == "P" and self._is_painted(image):
            image = image.convert("RGB")
        if image.mode in ("RGB", "RGBA"):
            return self._of_colours(np.asarray(image)[..., :3], name)
        if len(image.getbands()) > 1 or image.mode == "F":
            raise UserError(f"{name}: an image of mode {image.mode} is neither class indices nor RGB colours")
        array = np.asarray(image)
        if image.mode == "L" and content.startswith(b"\x89PNG"):
            array = array // {2: 85, 4: 17}.get(content[24], 1)  # Pillow stretches grey of 2 and 4 bits to 0..255
        return self._of_indices(array, name)

    def paint(self, indices: np.ndarray) -> np.ndarray:
        """Class indices [...] -> uint8 RGB [..., 3]."""
        return self._paint[indices]

    def _of_indices(self, array: np.ndarray, name: str) -> np.ndarray:
        if array.dtype != np.uint8:  # 1 or 16 bits
            wide = array.astype(np.int64)
            if wide.min(initial=0) < 0 or wide.max(initial=0) > LARGEST_CLASS:
                self._refuse_index(wide, wide[(wide < 0) | (wide > LARGEST_CLASS)][0], name)
            array = wide.astype(np.uint8)
        classes = self._table[array]
        if classes.min(initial=0) < 0:
            self._refuse_index(array, array[classes < 0][0], name)
        return classes.astype(np.uint8)

    def _refuse_index(self, array: np.ndarray, index: int, name: str) -> None:
        known = ", ".join(map(str, np.flatnonzero(self._table >= 0)))
        raise UserError(
            f"{name}: index {index} ({int((array == index).sum())} pixels) is none of the classes of "
            f"{self.palette.source} (they are {known}); correct the map, or add the class"
        )

    def _of_colours(self, rgb: np.ndarray, name: str) -> np.ndarray:
        code = (rgb[..., 0].astype(np.int32) << 16) | (rgb[..., 1].astype(np.int32) << 8) | rgb[..., 2]
        rows = self._rows_of_codes[code]
        outside = rows == 0
        if outside.any():
            colours = np.array(list(self.colours), dtype=np.uint8)
            wrong = rgb[outside]
            gaps = wrong.astype(np.int64) - colours[nearest_class(wrong, colours)]
            distances = np.sqrt((gaps**2).sum(axis=-1))
            raise UserError(
                f"{name}: {len(wrong)} of {rows.size} pixels have no colour of {self.palette.source} (the nearest is "
                f"{distances.min():.1f} to {distances.max():.1f} away in RGB); label maps must be exact: "
                f"PNG, not JPEG, and never smoothed"
            )
        return np.array([0, *self.colours.values()], dtype=np.uint8)[rows]

    @cached_property
    def _rows_of_codes(self) -> np.ndarray:
        """uint8 [2^24]: 1 + the row of each colour 0xRRGGBB in `colours`, 0 where it is none. 16 MB, made when first needed."""
        table = np.zeros(1 << 24, dtype=np.uint8)
        for row, (red, green, blue) in enumerate(self.colours, start=1):
            table[red << 16 | green << 8 | blue] = row
        return table

    def _is_painted(self, image: Image.Image) -> bool:
        """Whether the entries of its colour table that this image uses are all colours of the palette."""
        table = np.array(image.getpalette("RGB")).reshape(-1, 3)
        used = np.unique(np.asarray(image))
        return used[-1] < len(table) and all(tuple(colour) in self.colours for colour in table[used].tolist())

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_rows_of_codes"}


def cityscapes_reader(kind: str) -> LabelReader:
    """Cityscapes' 19 training classes. kind: labelIds, labelTrainIds or color, as the files are called."""
    palette = palette_of(CITYSCAPES, "Cityscapes' training classes")
    void = palette.void[0].index
    if kind == "labelIds":
        values = np.array([*range(34), 255])
        indices = dict(zip(values.tolist(), training_ids(values).tolist(), strict=True))
    else:
        indices = {entry.index: entry.index for entry in CITYSCAPES}
    return LabelReader(palette, indices, dict.fromkeys(CITYSCAPES_VOID_COLOURS, void))


def class_file_reader(content: bytes, source: str) -> LabelReader:
    """Classes of a file of lines `index name R G B`. Raises UserError naming the file and line."""
    try:
        palette = palette_of(parse_classes(content, source), source)
    except ValueError as error:
        raise UserError(str(error)) from error
    entries = palette.classes + palette.void
    largest = max(entry.index for entry in entries)
    if largest > LARGEST_CLASS or len(entries) > LARGEST_CLASS:
        raise UserError(f"{source}: class index {largest}: label maps here have indices 0 to {LARGEST_CLASS}")
    return LabelReader(palette, {entry.index: entry.index for entry in entries})
