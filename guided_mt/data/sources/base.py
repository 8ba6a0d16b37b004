"""What an image source is: of arrays, of files, or of anything else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps
from typing_extensions import override

from ..transforms import center_crop_arr, random_crop_arr
from .classes import class_ids, first_without_class
from .formats import MAX_PIXELS, open_image
from .names import Names


class EncodedVectors(Protocol):
    """What a frozen encoder made of each item, plain and mirrored."""

    @property
    def described(self) -> Mapping[str, Any]:
        """The encoder: {source, arch, weights, digest, size}."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """float32 [B, 2, D] of the items of these numbers [B]; mirroring 1 is left to right."""


class ImageSource:
    """A numbered set of images. The numbers are the same on each machine. Picklable, and safe after fork and spawn."""

    path: str  # as the user wrote it
    labels: np.ndarray | None  # int64 [N], -1 for an item without a class; or None: no classes
    class_names: list[str]  # class_names[id]; empty where labels is None
    is_array: bool = False  # arrays already: reading costs next to nothing
    dtype: np.dtype = np.dtype(np.uint8)  # of what `decode` gives
    side_names: tuple[str, ...] = ()  # of the images of one item [3 * sides, s, s]; (): an item is one image [3, s, s]
    present: Mapping[str, np.ndarray] = MappingProxyType({})  # {side: bool [N], which items have it}; all: left out
    encoded: EncodedVectors | None = None  # vectors that were made of the items beforehand
    captions: Sequence[Sequence[str]] | None = None  # [N], the texts that describe each item; None: there are none
    streams_captions: bool = False  # whether further texts come with the items as they are read, and not beforehand

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image | np.ndarray:
        """One image: a PIL image, or uint8 [H, W, 3]. Raises anything at all where the file is broken."""
        raise NotImplementedError

    def item_shape(self, image_size: int) -> tuple[int, ...]:
        """The shape of what `decode` gives."""
        return (3 * max(1, len(self.side_names)), image_size, image_size)

    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        """Item number `index`, centre-cropped, or cropped at random by three `uniforms` in [0, 1): what training sees.

        Raises UserError where the data as a whole is not what it should be, and anything else where one file is broken.
        """
        image = self.read(index)
        if uniforms is None:
            array = center_crop_arr(image, image_size)
        else:
            array = random_crop_arr(image, image_size, uniforms=uniforms)
        return array.transpose(2, 0, 1)

    def name(self, index: int) -> str:
        """The file's path within the source, with "/" between the parts."""
        raise NotImplementedError

    def without_class(self) -> str:
        """Where `labels` is None: what has no class, in words."""
        return "it"


class ArraySource(ImageSource):
    """Images that are one uint8 array [N, H, W, 3] (or [N, H, W, 1], grey), and maybe ids [N], -1 for no class."""

    is_array = True

    def __init__(self, path: str, images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str]):
        self.path = path
        self.images = images
        self.labels = labels
        self.class_names = list(class_names)

    def __len__(self) -> int:
        return len(self.images)

    @override
    def read(self, index: int) -> np.ndarray:
        return np.broadcast_to(self.images[index], (*self.images.shape[1:3], 3))

    @override
    def name(self, index: int) -> str:
        stem = f"{index:08d}.png"
        if self.labels is None or self.labels[index] < 0:
            return stem
        return f"{self.class_names[self.labels[index]]}/{stem}"


class FileSource(ImageSource):
    """Images that are files of a folder or archive; subclasses say how the bytes of file number i are read."""

    max_pixels = MAX_PIXELS  # of one image; one with more is not decoded
    upright = False  # whether photos are turned as their EXIF orientation says, which ADM does not

    names: Names  # of the files, in their order

    def __init__(self, path: str, names: Iterable[str], class_names: Sequence[str] | None):
        self.path = path
        self.names = Names.of(names)
        self._known = None if class_names is None else list(class_names)
        if class_names is not None:
            _ = self._classes  # refuses a class that is not known

    @cached_property
    def _classes(self) -> tuple[np.ndarray | None, list[str]]:
        """Found when they are first asked for: what was guessed is said then, and not where nobody wants classes."""
        return class_ids(self.path, self.names, self._known)

    @cached_property
    def labels(self) -> np.ndarray | None:  # type: ignore[override]
        """Class ids int64 [N], -1 where an image has none; None where no image has one. Found when first asked for."""
        return self._classes[0]

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The names of the ids, found with them."""
        return self._classes[1]

    def __len__(self) -> int:
        return len(self.names)

    def read_bytes(self, index: int) -> bytes:
        """Bytes of the file of image `index`."""
        raise NotImplementedError

    @override
    def read(self, index: int) -> Image.Image:
        image = open_image(self.read_bytes(index), self.max_pixels)
        return ImageOps.exif_transpose(image) if self.upright else image

    @override
    def name(self, index: int) -> str:
        return self.names[index]

    @override
    def without_class(self) -> str:
        return first_without_class(self.names)


class ProcessFile:
    """A file for reading that each process opens for itself: a handle shared over fork would share its position."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.path.abspath(path)
        self._handle: BinaryIO | None = None
        self._pid = -1

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at byte `offset`. Raises EOFError where the file ends before."""
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = open(self.path, "rb"), os.getpid()  # noqa: SIM115
        self._handle.seek(offset)
        content = self._handle.read(size)
        if len(content) != size:
            raise EOFError(f"{self.path} ends before byte {offset + size}")
        return content

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_handle": None, "_pid": -1}
