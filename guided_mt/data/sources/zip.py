"""What a .zip holds: the standard library reads its central directory, entry by entry."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from ...errors import UserError
from .listing import Listing, ListingBuilder

# Bytes: where a file's own header begins, and how many bytes its content has there; compression method; CRC-32 of the content.
COLUMNS = ("header", "size", "method", "crc")
OTHER = 255  # the method of a file that is encrypted, or neither stored nor deflated
_READ = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def list_zip(file: Path) -> Listing:
    """All files of a .zip. Raises UserError where it is not whole."""
    listing = ListingBuilder(*COLUMNS)

    def add(info: zipfile.ZipInfo) -> None:
        if not info.is_dir():
            method = info.compress_type if info.compress_type in _READ and not info.flag_bits & 1 else OTHER
            listing.add(info.filename, info.header_offset, info.compress_size, method, info.CRC)

    try:
        with file.open("rb") as handle:
            _Directory(handle, add).close()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(f"{file}: not a whole zip archive ({error}); copy or pack it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    return listing.finish()


class _Directory(zipfile.ZipFile):
    """Hands on each entry of the directory as it is read; kept, all of them would be 1 KB each, twice the archive's names.

    Raises as ZipFile does.
    """

    def __init__(self, handle: BinaryIO, take: Callable[[zipfile.ZipInfo], None]):
        self._infos, self._by_name = _HandedOn(take), _Nothing()
        super().__init__(handle)

    @property  # type: ignore[override]
    def filelist(self) -> list[zipfile.ZipInfo]:
        """Where ZipFile puts the entries, in their order."""
        return self._infos

    @filelist.setter
    def filelist(self, infos: list[zipfile.ZipInfo]) -> None:
        self._infos.extend(infos)

    @property  # type: ignore[override]
    def NameToInfo(self) -> dict[str, zipfile.ZipInfo]:  # ZipFile's name
        """Where ZipFile puts them by their names."""
        return self._by_name

    @NameToInfo.setter
    def NameToInfo(self, _: dict[str, zipfile.ZipInfo]) -> None:
        pass


class _HandedOn(list[zipfile.ZipInfo]):
    """A list that gives away what it is given."""

    def __init__(self, take: Callable[[zipfile.ZipInfo], None]):
        super().__init__()
        self._take = take

    @override
    def append(self, info: zipfile.ZipInfo) -> None:
        self._take(info)

    @override
    def extend(self, infos: Iterable[zipfile.ZipInfo]) -> None:
        for info in infos:
            self._take(info)


class _Nothing(dict[str, Any]):
    """A mapping that keeps nothing."""

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        pass
