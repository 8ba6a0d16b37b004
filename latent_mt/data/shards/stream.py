"""One remote shard as a stream of samples, through the library webdataset: nothing is unpacked but images, .txt and .json."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
from PIL import Image
from typing_extensions import override

from guided_mt.data.sources import ImageSource
from guided_mt.data.sources.formats import open_image
from guided_mt.errors import reason

from .index import IMAGES, JSON, TEXT, SampleRule, described_by, key_of

REACH_SECONDS = 60.0  # a store that gives nothing for so long at the start counts as unreachable
STALL_SECONDS = 600.0  # and one that gives nothing for so long in the midst of a shard as gone
_PROGRAMS = {"s3": ["aws", "s3", "cp", "--only-show-errors"]}  # of addresses that webdataset has no program for
_END = 512  # zero bytes at the end of a .tar, at least


class ShardError(Exception):
    """A shard that can't be read, or not to its end; the message names it and says why."""


class RemoteSample(NamedTuple):
    """A sample of a stream: its name, the file of its image, and its captions."""

    name: str
    image: bytes
    captions: tuple[str, ...]


class OneImage(ImageSource):
    """A single encoded image as a source, whose `decode` is that of all sources."""

    def __init__(self, content: bytes, max_pixels: int):
        self.path, self.labels, self.class_names = "", None, []
        self.content, self.max_pixels = content, max_pixels

    def __len__(self) -> int:
        return 1

    @override
    def read(self, index: int) -> Image.Image:
        return open_image(self.content, self.max_pixels)

    @override
    def name(self, index: int) -> str:
        return ""


def samples_of(shard: str, rule: SampleRule) -> Generator[RemoteSample, None, None]:
    """The samples of a shard that pass the filters, in its order. Raises ShardError, at once or in the midst of it.

    The files of a sample have to stand side by side, as img2dataset and webdataset write them.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with _opened(shard) as stream:
        files = tar_file_expander([{"url": shard, "stream": stream}], select_files=_is_ours)
        for found in group_by_keys(files, keys=key_of):
            image = next((found[suffix] for suffix in IMAGES if suffix in found), None)
            described = described_by(found.get(JSON, b"")) if rule.reads_json else {}
            if image is not None and _passes(rule, described):
                yield RemoteSample(f"{shard}: {found['__key__']}", image, rule.texts(found.get(TEXT), described))


def _is_ours(name: str) -> bool:
    """Whether a member is read at all: others, such as pickled ones, are passed over unopened."""
    return key_of(name)[1] in (*IMAGES, TEXT, JSON)


def _passes(rule: SampleRule, described: Any) -> bool:
    if not rule.filters.bounds:
        return True
    numbers = zip(rule.filters.quantities, rule.filters.values(described), strict=True)
    return bool(rule.filters.passes({name: np.array([value], np.float32) for name, value in numbers}, 1)[0][0])


class _Watched:
    """A stream that knows how it ended, and that gives up where a command gives nothing for too long."""

    def __init__(self, stream: Any):
        self.stream, self.tail, self.silent = stream, b"", 0.0  # silent: seconds, where it gave up

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or as many as there are. Raises TimeoutError."""
        pipe = getattr(self.stream, "stream", None)  # of a command; files answer at once
        content = self.stream.read(size) if pipe is None else self._of_command(pipe.fileno(), size)
        self.tail = (self.tail + content)[-_END:]
        return content

    def _of_command(self, pipe: int, size: int) -> bytes:
        """Waits for each piece, since a command that is killed may leave programs behind that keep the pipe open."""
        pieces: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while size:
                seconds = STALL_SECONDS if self.tail or pieces else REACH_SECONDS
                if not selector.select(seconds):
                    self.silent = seconds
                    raise TimeoutError
                piece = os.read(pipe, 2**20 if size < 0 else size)
                if not piece:
                    break
                pieces.append(piece)
                size -= len(piece) if size > 0 else 0
        return b"".join(pieces)


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[_Watched]:
    """The bytes of a shard. Raises ShardError for whatever goes wrong with them inside, and where they end too early."""
    from webdataset.gopen import Pipe, gopen, gopen_schemes

    stream: Any = None
    try:
        scheme = urlparse(shard).scheme.lower()
        if scheme in _PROGRAMS and scheme not in gopen_schemes:
            stream = Pipe([*_PROGRAMS[scheme], shard, "-"], mode="rb", ignore_status=[141])
        else:
            stream = gopen(shard)
        watched = _Watched(stream)
        yield watched
        while watched.read(2**16):  # a command that is not read to its end would die of that
            pass
        if ended := _close(stream):
            raise ShardError(f"{shard}: {ended}")
        if len(watched.tail) < _END or watched.tail.strip(b"\0"):
            raise EOFError("it ends in the midst of a file" if watched.tail else "nothing came")
    except GeneratorExit:
        _close(stream, kill=True)
        raise
    except ShardError:
        raise
    except Exception as error:
        silent = stream is not None and watched.silent
        status = _close(stream, kill=bool(silent))
        if silent:
            status = f"nothing came within {silent:.0f} seconds"
        elif isinstance(error, FileNotFoundError) and error.filename:
            status = f"needs the program {error.filename}, which is not there"
        elif stream is None:
            status = f"can't be opened ({reason(error)})"
        raise ShardError(f"{shard}: {status or _why(error)}") from None


def _why(error: Exception) -> str:
    """The reason of an error, to whose arguments webdataset has added objects of its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
    return f"not a whole tar archive ({first})"


def _close(stream: Any, kill: bool = False) -> str:
    """End a stream, whatever is left in it; returns what its command said of an error, '' where it said nothing. kill: first end a
    command that may not end by itself."""
    process = getattr(stream, "proc", None)
    if kill and process is not None:
        process.kill()
    try:
        if stream is not None:
            stream.close()
    except Exception as error:
        found = re.search(r"exit (-?\d+)", str(error))
        program = process.args[0] if process is not None and isinstance(process.args, list) else ""
        ended = f"its command ended with exit code {found[1]}" if found else reason(error)
        return f"{ended} ({program})" if found and program else ended
    return ""
