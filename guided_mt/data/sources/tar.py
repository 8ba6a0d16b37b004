"""What a .tar holds: plain headers are read here, all others by the standard library's tarfile."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ...errors import UserError
from .listing import Listing, ListingBuilder

COLUMNS = ("offset", "size")  # bytes: where a file's content begins, and how many there are
_BLOCK = 512
_NUMBER = rb"[0-7]{6}[0-7 \0][ \0]"
# The header of an ordinary file, or of the pax records before one, as POSIX.1-1988 ("ustar") lays it out; whatever differs,
# as long names and sizes of GNU's tar do, is not plain.
_PLAIN = re.compile(
    rb"(?P<name>[^\0].{99})"
    + 3 * _NUMBER
    + rb"(?P<size>[0-7]{11})[ \0][0-7]{11}[ \0]"  # mode, owner, group; size, time
    rb"(?P<sum>" + _NUMBER + rb")(?P<type>[0x]).{100}.{8}.{64}"  # name of a link; magic; names of owner and group
    rb"(?:" + 2 * _NUMBER + rb"|\0{16})(?P<prefix>.{155}).{12}",  # device
    re.DOTALL,
)
# Records before a file that say nothing of its name, size or place, which Python's and other writers make of fractions of seconds.
_TIME = re.compile(rb"(\d+) ([acm]time)=-?\d+(?:\.\d*)?\n")
_HARMLESS = frozenset(("atime", "ctime", "mtime", "comment"))


class _Header(NamedTuple):
    """A plain header, with its pax records: the file's name, where its content begins, and how many bytes it has."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + _padded(self.size)


def list_tar(file: Path) -> Listing:
    """All files of an uncompressed .tar, and further names of theirs (hard links). Raises UserError where it is not whole."""
    listing = ListingBuilder(*COLUMNS)
    try:
        with tarfile.open(file, "r:") as archive, file.open("rb") as handle:
            while (member := archive.next()) is not None:
                if member.islnk():
                    listing.link(member.name, member.linkname)
                elif member.isfile():
                    listing.add(member.name, member.offset_data, member.size)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile's own list is many times as large as ours
                if _HARMLESS.issuperset(archive.pax_headers):  # else they may hold for each file that follows
                    archive.offset = _list_plain(handle, archive, listing)
            _check_end(handle, archive.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{file}: not a whole tar archive ({error}); copy or pack it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    return listing.finish()


def _list_plain(handle: BinaryIO, archive: tarfile.TarFile, listing: ListingBuilder) -> int:
    """Add the files from archive.offset on until a header is not plain; returns the place of that one."""
    place, encoding, errors = archive.offset, archive.encoding or "utf-8", archive.errors or "strict"
    while (header := _plain_header(handle, place, encoding, errors)) is not None:
        listing.add(*header)
        place = header.end
    return place


def _plain_header(handle: BinaryIO, place: int, encoding: str, errors: str) -> _Header | None:
    """The header at byte `place`; None where it is not plain, or not whole."""
    fields = _fields(handle, place)
    if fields is not None and fields["type"] == b"x":
        size = int(fields["size"], 8)
        if not _are_times(handle.read(_padded(size)), size):
            return None
        place += _BLOCK + _padded(size)
        fields = _fields(handle, place)
    if fields is None or fields["type"] != b"0":
        return None
    name = _text(fields["name"])
    if fields["prefix"][0]:
        name = _text(fields["prefix"]) + b"/" + name
    return _Header(name.decode(encoding, errors), place + _BLOCK, int(fields["size"], 8))


def _fields(handle: BinaryIO, place: int) -> Mapping[str, bytes] | re.Match[bytes] | None:
    """The parts of the header at byte `place`, the handle standing behind it; None where it is not plain, or not whole."""
    handle.seek(place)
    block = handle.read(_BLOCK)
    fields = _PLAIN.fullmatch(block)
    # the sum counts its own 8 bytes as spaces
    if fields is None or sum(block) - sum(fields["sum"]) + 8 * 32 != int(_text(fields["sum"]), 8):
        return None
    return fields


def _are_times(records: bytes, size: int) -> bool:
    """Whether pax records of `size` bytes, filled up with zeros, are times alone, each as long as it says."""
    place = 0
    while place < size:
        record = _TIME.match(records, place)
        if record is None or int(record[1]) != record.end() - place:
            return False
        place = record.end()
    return place == size and not records[size:].strip(b"\0")


def _check_end(handle: BinaryIO, end: int) -> None:
    """tarfile takes a damaged header for the end of the archive; the real end is a block of zeros. Raises ReadError, EOFError."""
    handle.seek(end)
    block = handle.read(_BLOCK)
    if len(block) != _BLOCK:
        raise EOFError(f"the file ends before byte {end + _BLOCK}")
    if block.strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _text(field: bytes) -> bytes:
    """What stands before the first zero byte."""
    return field.partition(b"\0")[0]


def _padded(size: int) -> int:
    """Content fills whole blocks."""
    return -(-size // _BLOCK) * _BLOCK
