"""Listings of large archives, kept on disk: the first process of a machine makes one, the others wait for it and read it.

A listing lies in `$MT_DIFFUSION_LISTINGS` ("off": nowhere), else in `listings` below `$MT_DIFFUSION_CACHE`, else in
`mt-diffusion/listings` of the user's cache folder. A file is the CRC-32 of all that follows, one line of JSON, which says of
what archive it is and which arrays follow, and then these, byte for byte. What does not fit its archive, or is damaged, is made
anew; where nothing can be written, all goes on without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .listing import Listing
from .names import Names

try:
    import fcntl
except ImportError:  # a system without them
    fcntl = None  # type: ignore[assignment]

VERSION = 1  # of the files; to be raised with every change of what a listing holds
MOST_BYTES = 2**30  # of all listings together; those that were not used for the longest time go first
LEAST_BYTES = 8 * 2**20  # a smaller archive holds too few files to wait for
LEAST_SECONDS = 1.0  # what took less to list is not kept
_OURS = re.compile(r"[0-9a-f]{32}\.listing")  # what these files are called; written under a longer name first
_LOCK = "lock"  # one file for all: a byte of it for each archive


@dataclass(frozen=True)
class Keeping:
    """Which listings of a kind are kept, and where. folder: of this kind, below the others'; "": that of archives.

    least_seconds: what took less to make is not kept; most_bytes: of all in the folder; None: as for archives. one_in: how many
    are written between two looks at how large they are together.
    """

    folder: str = ""
    least_seconds: float | None = None
    most_bytes: int | None = None
    one_in: int = 1


def listed(file: Path, make: Callable[[Path], Listing], keeping: Keeping = Keeping()) -> Listing:
    """make(file), or what it gave before for the same archive, by path, size, time of change and inode. Raises as `make` does."""
    folder = listings_folder()
    folder = None if folder is None else folder / keeping.folder
    try:
        key = _key(file, make)
    except OSError:  # `make` says what is wrong
        return make(file)
    if folder is None or key["size"] < LEAST_BYTES:
        return make(file)
    place = folder / (hashlib.sha256(os.fsencode(key["path"])).hexdigest()[:32] + ".listing")
    listing = _read(place, key)
    if listing is not None:
        return listing
    with _turn(place) as waited:
        listing = _read(place, key) if waited else None
        if listing is not None:
            return listing
        if not waited:
            return _made(file, make, place, key, keeping)
    return _made(file, make, place, key, keeping)  # whoever was first did not keep it


def listings_folder() -> Path | None:
    """Where listings are kept, None for nowhere."""
    own = os.environ.get("MT_DIFFUSION_LISTINGS")
    if own:
        return None if own.lower() == "off" else Path(own).absolute()
    cache = os.environ.get("MT_DIFFUSION_CACHE")
    try:
        root = (
            Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mt-diffusion"
        )
    except RuntimeError:  # a user without a home
        return None
    return root.absolute() / "listings"


def _key(file: Path, make: Callable[[Path], Listing]) -> dict[str, Any]:
    """What a listing is valid for. Raises OSError."""
    state = os.stat(file)
    return {
        "version": VERSION,
        "path": os.path.abspath(file),
        "by": make.__name__,
        "size": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "inode": state.st_ino,
        "encoding": sys.getfilesystemencoding(),  # by which a .tar's names are read
    }


def _made(
    file: Path, make: Callable[[Path], Listing], place: Path, key: Mapping[str, Any], keeping: Keeping
) -> Listing:
    """make(file), written down where that took long, and the archive did not change meanwhile."""
    began = time.monotonic()
    listing = make(file)
    least = LEAST_SECONDS if keeping.least_seconds is None else keeping.least_seconds
    if time.monotonic() - began >= least:
        with contextlib.suppress(OSError):  # no room, or not ours to write to
            if _key(file, make) == key:
                _write(place, key, listing)
                if int(place.name[:7], 16) % keeping.one_in == 0:
                    most = MOST_BYTES if keeping.most_bytes is None else keeping.most_bytes
                    _make_room(place.parent, most, keep=place)
    return listing


# ---------------------------------------------------------------- files


def _write(place: Path, key: Mapping[str, Any], listing: Listing) -> None:
    """Raises OSError. A reader never sees half a file."""
    arrays = {"names": np.frombuffer(listing.names.joined, np.uint8), "ends": listing.names.ends, **listing.columns}
    parts = {name: (array.dtype.newbyteorder("<").str, len(array)) for name, array in arrays.items()}
    blocks = [array.astype(parts[name][0], copy=False).tobytes() for name, array in arrays.items()]
    head = json.dumps({"key": key, "parts": parts}).encode() + b"\n"
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as handle:
            handle.writelines([b"%08x\n" % _crc([head, *blocks]), head, *blocks])
        os.replace(unfinished, place)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(place: Path, key: Mapping[str, Any]) -> Listing | None:
    """The listing of the archive that `key` describes, None where there is none, or a damaged one."""
    try:
        with open(place, "rb") as handle:
            crc, line = int(handle.readline(16), 16), handle.readline(2**16)
            head = json.loads(line)
            types = {name: np.dtype(dtype) for name, (dtype, _) in head["parts"].items()}
            sizes = {name: types[name].itemsize * count for name, (_, count) in head["parts"].items()}
            whole = os.fstat(handle.fileno()).st_size == handle.tell() + sum(sizes.values())
            if head["key"] != key or not whole or any(dtype.kind != "u" for dtype in types.values()):
                return None
            blocks = {name: handle.read(size) for name, size in sizes.items()}
        if _crc([line, *blocks.values()]) != crc:
            return None
        names = blocks.pop("names")
        columns = {name: np.frombuffer(block, types[name]) for name, block in blocks.items()}
        listing = Listing(Names.end_to_end(names, columns.pop("ends")), columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):
        os.utime(place)  # it was used
    return listing


def _crc(blocks: Iterable[bytes]) -> int:
    crc = 0
    for block in blocks:
        crc = zlib.crc32(block, crc)
    return crc


def _make_room(folder: Path, most: int, keep: Path) -> None:
    """Remove the listings that were not used for the longest time, until all are within `most` bytes. Raises OSError."""
    states = {file: file.stat() for file in folder.iterdir() if _OURS.match(file.name)}
    total = sum(state.st_size for state in states.values())
    for file in sorted(states, key=lambda file: states[file].st_mtime_ns):
        if total <= most:
            return
        if file != keep:
            file.unlink(missing_ok=True)
            total -= states[file].st_size


# ---------------------------------------------------------------- one after another


@contextlib.contextmanager
def _turn(place: Path) -> Iterator[bool]:
    """Hold the lock of a listing; gives whether another process had it first, for which this one waited.

    A lock of the operating system: gone when its process is. Where there are none, nobody waits.
    """
    handle, waited = -1, False
    try:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(place.parent / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            waited = _lock(handle, int(place.name[:7], 16))
        yield waited
    finally:
        if handle >= 0:
            os.close(handle)


def _lock(handle: int, byte: int) -> bool:
    """Lock one byte; returns whether that took waiting. Raises OSError where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        return False
    except (BlockingIOError, PermissionError):
        fcntl.lockf(handle, fcntl.LOCK_SH, 1, byte)  # all who wait go on together
        return True
