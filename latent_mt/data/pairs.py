"""Pairs of images, or of a photo and its label map, as one source: all sides resized and cropped alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import override

from evaluations.files.palettes import Palette
from guided_mt.data.sources import FileSource, ImageSource
from guided_mt.data.sources.formats import TooManyPixels, without_pillows_limit
from guided_mt.data.transforms import (
    crop_window,
    random_short_side,
    resize_short_side,
    same_aspect,
    sizes_to,
    to_rgb,
)
from guided_mt.errors import UserError

from .label_maps import LabelReader


@dataclass(frozen=True)
class Side:
    """One image of an item. kind: "image", or "labels" with the palette that its maps are painted with."""

    name: str
    kind: str = "image"
    palette: Palette | None = None


class PairSource(ImageSource):
    """A numbered set of pairs; an item is uint8 [3 * sides, s, s], the first side's RGB, then the second's.

    Photos are resized as ADM does it, label maps by nearest neighbour to the same size before they are painted, so that no
    colour outside the palette appears; the window is the same for both. label_reader: of the side of kind "labels".
    """

    labels = None
    direction = "AtoB"  # which of the data's sides A and B comes first

    def __init__(self, path: str, sides: Sequence[Side], label_reader: LabelReader | None = None):
        self.path = path
        self.sides = tuple(sides)
        self.side_names = tuple(side.name for side in sides)
        self.label_reader: Any = label_reader  # a LabelReader where a side is a label map
        self.class_names = [] if label_reader is None else label_reader.palette.names

    def read_sides(self, index: int) -> list[Image.Image | np.ndarray]:
        """Of each side an RGB image, or class indices uint8 [H, W].

        Raises UserError where the data is not what it should be, and anything at all where a file is broken.
        """
        raise NotImplementedError

    def label_map(self, index: int, image_size: int) -> np.ndarray:
        """The true classes of pair `index`, uint8 [s, s] in the geometry of `decode`: indices of its palette, void among them.

        Raises UserError where no side is a label map.
        """
        raise UserError(f"{self.path}: {' and '.join(self.side_names)} are images; there are no label maps")

    @override
    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        short_side = image_size if uniforms is None else random_short_side(image_size, uniform=uniforms[0])
        data = self.read_sides(index)
        photo_size = next(image.size for image in data if isinstance(image, Image.Image))
        item = np.empty(self.item_shape(image_size), dtype=np.uint8)
        for side, out in zip(data, item.reshape(-1, 3, image_size, image_size), strict=True):
            if isinstance(side, np.ndarray):
                classes = crop_window(resize_classes(side, photo_size, short_side), image_size, uniforms)
                array = self.label_reader.paint(classes)
            else:
                array = crop_window(resize_short_side(side, short_side), image_size, uniforms)
            out[...] = array.transpose(2, 0, 1)
        return item


class FilePairs(PairSource):
    """A photo and a label map in a file each.

    sources: where the files lie; photos, maps: int64 [N, 2], (number of the source, number of the file in it).
    """

    def __init__(
        self,
        path: str,
        sides: Sequence[Side],
        label_reader: LabelReader,
        sources: Sequence[FileSource],
        photos: np.ndarray,
        maps: np.ndarray,
    ):
        super().__init__(path, sides, label_reader)
        self.sources = list(sources)
        self.photos, self.maps = photos, maps

    def __len__(self) -> int:
        return len(self.photos)

    @override
    def name(self, index: int) -> str:
        return self._name(self.photos[index])

    @override
    def read_sides(self, index: int) -> list[Image.Image | np.ndarray]:
        photo = self._photo(index)
        classes = self._classes(index, photo.size)
        return [to_rgb(photo) if side.kind == "image" else classes for side in self.sides]

    @override
    def label_map(self, index: int, image_size: int) -> np.ndarray:
        size = self._photo(index).size
        return crop_window(resize_classes(self._classes(index, size), size, image_size), image_size)

    def _classes(self, index: int, photo_size: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W]. Raises UserError where the aspect ratio is not that of a photo of (width, height) `photo_size`."""
        file = self._name(self.maps[index])
        source, number = self.maps[index]
        try:
            content = self.sources[source].read_bytes(int(number))
            classes = self.label_reader.read(content, f"{self.path}: {file}", self.sources[source].max_pixels)
        except (MemoryError, UserError, TooManyPixels):
            raise
        except Exception as error:
            raise OSError(f"{file}: {error}") from error  # the warning names the photo
        height, width = classes.shape
        if not same_aspect((width, height), photo_size):
            raise UserError(
                f"{self.path}: {self.name(index)} has {photo_size[0]}x{photo_size[1]} pixels and its map {file} "
                f"{width}x{height}: not the same aspect ratio, so they cannot show the same"
            )
        return classes

    def _photo(self, index: int) -> Image.Image:
        source, number = self.photos[index]
        return self.sources[source].read(int(number))

    def _name(self, place: np.ndarray) -> str:
        return self.sources[place[0]].name(int(place[1]))


class AlignedPairs(PairSource):
    """Two images of equal size side by side in one file. halves: which half (0 left, 1 right) each side is."""

    def __init__(
        self, path: str, sides: Sequence[Side], source: FileSource, numbers: np.ndarray, halves: tuple[int, int]
    ):
        super().__init__(path, sides)
        self.source, self.numbers, self.halves = source, numbers, halves

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def name(self, index: int) -> str:
        return self.source.name(int(self.numbers[index]))

    @override
    def read_sides(self, index: int) -> list[Image.Image | np.ndarray]:
        image = self.source.read(int(self.numbers[index]))
        if image.width % 2:
            raise UserError(
                f"{self.path}: {self.name(index)} is {image.width} pixels wide; an aligned pair is two images of equal "
                f"width side by side, so the width must be even"
            )
        image, width = to_rgb(image), image.width // 2
        with without_pillows_limit():
            return [image.crop((half * width, 0, (half + 1) * width, image.height)) for half in self.halves]


class ImagePairs(PairSource):
    """Two images in a file each. numbers: int64 [N, 2], the files of the sides."""

    def __init__(self, path: str, sides: Sequence[Side], source: FileSource, numbers: np.ndarray):
        super().__init__(path, sides)
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def name(self, index: int) -> str:
        return self.source.name(int(self.numbers[index, 0]))

    @override
    def read_sides(self, index: int) -> list[Image.Image | np.ndarray]:
        first, second = (self.source.read(int(number)) for number in self.numbers[index])
        if first.size != second.size:
            raise UserError(
                f"{self.path}: {self.name(index)} has {first.width}x{first.height} pixels and its partner "
                f"{self.source.name(int(self.numbers[index, 1]))} {second.width}x{second.height}; make them equal"
            )
        return [to_rgb(first), to_rgb(second)]


def resize_classes(classes: np.ndarray, photo_size: tuple[int, int], short_side: int) -> np.ndarray:
    """Nearest neighbour to what ADM's resizing makes of a photo of (width, height) `photo_size`. uint8 [H, W]."""
    last = sizes_to(*photo_size, short_side)[-1]
    return np.asarray(Image.fromarray(classes).resize(last, resample=Image.Resampling.NEAREST))


def sides_of(source: ImageSource) -> tuple[Side, ...]:
    """The sides of a source's items, images where it says no more than their names; none where an item is one image."""
    if not source.side_names:
        return ()
    described: tuple[Side, ...] | None = getattr(source, "sides", None)
    return tuple(map(Side, source.side_names)) if described is None else described
