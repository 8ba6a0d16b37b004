"""Images straight from a .tar or .zip: the index is built once, then files are read by offset, nothing is unpacked."""

from __future__ import annotations

import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError, nearest
from .base import FileSource, ProcessFile
from .formats import IMAGE_SUFFIXES, is_image_name, say_left_out

_TAR_BLOCK = 512


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
        entries: dict[str, tuple[int, int]] = {}  # name: offset, bytes
        others: list[str] = []
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    name = _clean(member.name)
                    if member.islnk() and _clean(member.linkname) in entries:
                        entries[name] = entries[_clean(member.linkname)]
                    elif member.isfile() and is_image_name(name, suffixes):
                        entries[name] = (member.offset_data, member.size)
                    elif member.isfile():
                        others.append(name)
                    archive.members.clear()  # type: ignore[attr-defined]  # the index is `entries`; tarfile's own is many times as large
                end = archive.offset
            # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros
            if ProcessFile(file).read(end, _TAR_BLOCK).strip(b"\0"):
                raise tarfile.ReadError("damaged header")
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise UserError(f"{file}: not a whole tar archive ({error}); copy or pack it again") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
        names, found = _inside(path, file, inner, entries, others)
        super().__init__(path, names, class_names)
        self._file = ProcessFile(file)
        self._offsets, self._sizes = np.array([entries[name] for name in found], dtype=np.int64).T

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
        entries: dict[str, tuple[int, int, int, int]] = {}  # name: offset of the header, bytes in the file, method, CRC
        others: list[str] = []
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    name = _clean(info.filename)
                    if info.is_dir() or not is_image_name(name, suffixes):
                        others += [] if info.is_dir() else [name]
                        continue
                    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise UserError(
                            f"{file}: {name} is encrypted or neither stored nor deflated; pack it again with `zip -0`"
                        )
                    entries[name] = (info.header_offset, info.compress_size, info.compress_type, info.CRC)
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise UserError(f"{file}: not a whole zip archive ({error}); copy or pack it again") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
        names, found = _inside(path, file, inner, entries, others)
        super().__init__(path, names, class_names)
        self._file = ProcessFile(file)
        self._entries = np.array([entries[name] for name in found], dtype=np.int64)  # [N, 4]

    def read_bytes(self, index: int) -> bytes:
        """Bytes of the file of image `index`, unpacked. Raises BadZipFile where header or checksum are wrong."""
        offset, size, method, crc = map(int, self._entries[index])
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


def _clean(name: str) -> str:
    """A member's name without "./", "/" in front and "..": ./train/a.png and train/a.png are the same file."""
    if name.startswith((".", "/")) or "/." in name or "//" in name or "\\" in name:
        return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")
    return name


def _inside(
    path: str, file: Path, inner: str, entries: Mapping[str, tuple[int, ...]], others: Sequence[str]
) -> tuple[list[str], list[str]]:
    """(names relative to folder `inner`, their keys in `entries`), sorted by name. Says which of the `others` there are left out.

    Raises UserError where no image is there.
    """
    prefix = "" if inner == "." else inner + "/"
    found = sorted(name for name in entries if name.startswith(prefix))
    if not found and entries:
        folders = {"/".join(name.split("/")[: prefix.count("/")]) for name in entries if "/" in name}
        raise UserError(f"{path}: no folder {inner} with images in {file}{nearest(inner, folders)}")
    if not found:
        raise UserError(f"{path}: no images in this archive; it must hold .jpg or .png files")
    say_left_out(path, [name[len(prefix) :] for name in others if name.startswith(prefix)])
    return [name[len(prefix) :] for name in found], found
