"""Images straight from a .tar or .zip: the index is built once, then files are read by offset, nothing is unpacked."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import override

from ...errors import UserError, nearest
from .base import FileSource, ProcessFile
from .cache import listed
from .formats import IMAGE_SUFFIXES, image_names, say_left_out
from .listing import Listing
from .names import Names
from .tar import list_tar
from .zip import OTHER, list_zip


class TarSource(FileSource):
    """Images of an uncompressed .tar. Of files with the same name the last one counts, as when unpacking."""

    def __init__(
        self,
        path: str,
        file: Path,
        inner: str,
        class_names: Sequence[str] | None,
        suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    ):
        listing = _images(path, file, inner, listed(file, list_tar), suffixes)
        super().__init__(path, listing.names, class_names)
        self._file = ProcessFile(file)
        self._offsets, self._sizes = listing.columns["offset"], listing.columns["size"]

    @override
    def read_bytes(self, index: int) -> bytes:
        """Bytes of the file of image `index`, as stored. Raises OSError."""
        return self._file.read(int(self._offsets[index]), int(self._sizes[index]))


class ZipSource(FileSource):
    """Images of a .zip, stored or deflated, found through its central directory."""

    def __init__(
        self,
        path: str,
        file: Path,
        inner: str,
        class_names: Sequence[str] | None,
        suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    ):
        listing = _images(path, file, inner, listed(file, list_zip), suffixes)
        other = np.flatnonzero(listing.columns["method"] == OTHER)
        if len(other):
            name = listing.names[int(other[0])]
            raise UserError(f"{file}: {name} is encrypted or neither stored nor deflated; pack it again with `zip -0`")
        super().__init__(path, listing.names, class_names)
        self._file = ProcessFile(file)
        self._columns = listing.columns

    @override
    def read_bytes(self, index: int) -> bytes:
        """Bytes of the file of image `index`, unpacked. Raises BadZipFile where header or checksum are wrong."""
        offset, size, method, crc = (int(self._columns[name][index]) for name in ("header", "size", "method", "crc"))
        header = self._file.read(offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("no file header where the directory says")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        content = self._file.read(offset + 30 + name_bytes + extra_bytes, size)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, wbits=-15)
        if zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("wrong checksum")
        return content


def _images(path: str, file: Path, inner: str, listing: Listing, suffixes: tuple[str, ...]) -> Listing:
    """The images in folder `inner`, by their names relative to it. Says which other files there are left out.

    Raises UserError where no image is there.
    """
    prefix = "" if inner == "." else inner + "/"
    place = listing.names.below(prefix)
    below = listing.names.take(place)
    images = image_names(below, suffixes)
    if not images.any():
        raise UserError(_no_images(path, file, inner, listing.names, suffixes))
    say_left_out(path, below.take(~images).without(prefix))
    columns = {name: column[place] for name, column in listing.columns.items()}
    if not images.all():
        below, columns = below.take(images), {name: column[images] for name, column in columns.items()}
    return Listing(below.without(prefix), columns)


def _no_images(path: str, file: Path, inner: str, names: Names, suffixes: tuple[str, ...]) -> str:
    """What to say where there are none in folder `inner`."""
    depth = 0 if inner == "." else inner.count("/") + 1
    images = names.take(image_names(names, suffixes))
    if not len(images):
        return f"{path}: no images in this archive; it must hold .jpg or .png files"
    folders = {"/".join(name.split("/")[:depth]) for name in images if "/" in name}
    return f"{path}: no folder {inner} with images in {file}{nearest(inner, folders)}"
