"""Sets of images, read as a stream: ADM's .npz files, folders, .zip, .tar and .parquet files. Never all in memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import EvaluationError, warn
from .hashing import sha256
from .image_files import (
    ImageFile,
    decode,
    image_files,
    is_image,
    parquet_count,
    parquet_files,
    parquet_rows,
    walk,
    whole,
)

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_CHUNK = 1 << 18  # bytes
_DECODE_AT_ONCE = 16  # images
_LOOK_BYTES = 1 << 24  # of an array of a wrong type, for the error message


@dataclass(eq=False)
class ImageSet(ABC):
    """Images of one size, and the float64 statistics that came with them, if any (mu, mu_s [D]; sigma, sigma_s [D, D])."""

    path: Path
    count: int
    height: int
    width: int
    statistics: dict[str, np.ndarray] = field(repr=False)

    def batches(self, batch_size: int, workers: int = 0) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3], all images in order; the last batch may be smaller.

        Memory: a few batches. Threads, `workers` at most, end with the iterator, also where it is closed early. The
        images are the same for any `batch_size` and `workers`. Raises EvaluationError where the input is damaged.
        """
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size {batch_size}, workers {workers}: out of range")
        return self._batches(batch_size, workers)

    def content_hash(self) -> str:
        """sha256 in hex of the file, or of a folder's images, their names and bytes in order."""
        if self.path.is_file():
            return sha256(self.path)
        digest = hashlib.sha256()
        for name in self._names():
            digest.update(os.fsencode(name) + b"\0" + bytes.fromhex(sha256(self.path / name)))
        return digest.hexdigest()

    @abstractmethod
    def _batches(self, batch_size: int, workers: int) -> Iterator[np.ndarray]: ...

    @abstractmethod
    def _names(self) -> list[str]:
        """The files of a folder."""


def open_images(path: str | Path, need_images: bool = True) -> ImageSet:
    """The images of an .npz (arr_0), .npy, .zip, .tar or .parquet file, or of a folder of images or .parquet files.

    A folder with .parquet files is read as those. Without `need_images`, an .npz of mu and sigma alone is a set of 0
    images. Raises EvaluationError for what is missing, damaged, of another layout, or fewer than two images.
    """
    path = Path(path)
    if not path.exists():
        raise EvaluationError(f"{path}: no such file or folder")
    images: ImageSet
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        images = _open_array(path, need_images)
    else:
        images = _open_files(path)
    if images.count < 2 and not (images.statistics and images.count == 0):
        raise EvaluationError(f"{path}: {images.count} images; scores need at least two")
    return images


# .npz and .npy


class ArrayImages(ImageSet):
    """uint8 [N, H, W, 3]: a .npy file, or arr_0 of an .npz. Other arrays in it (labels, masks) are not read."""

    def _batches(self, batch_size: int, workers: int) -> Iterator[np.ndarray]:
        batches = self._read(batch_size)
        return _read_ahead(batches) if workers else batches

    def _read(self, batch_size: int) -> Generator[np.ndarray, None, None]:
        if self.count == 0:  # statistics alone have no arr_0
            return
        with _open_member(self.path, "arr_0") as member:
            for start in range(0, self.count, batch_size):
                batch = np.empty((min(batch_size, self.count - start), self.height, self.width, 3), np.uint8)
                _fill(self.path, member.data, batch)
                yield batch

    def _names(self) -> list[str]:
        return []


class _Member(NamedTuple):
    """An array in a file: its header, and the stream of its data."""

    data: Any  # a binary file with `readinto`
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def _open_array(path: Path, need_images: bool) -> ArrayImages:
    names, statistics = ["arr_0"], {}
    if path.suffix.lower() == ".npz":
        with whole(str(path)), zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        statistics = _statistics(path, names)
    if "arr_0" in names:
        return ArrayImages(path, *_image_shape(path), statistics)
    if statistics and not need_images:
        return ArrayImages(path, 0, 0, 0, statistics)
    found = ", ".join(names) or "none"
    if statistics:
        raise EvaluationError(f"{path}: holds statistics only ({found}), images are needed; give an .npz with arr_0")
    raise EvaluationError(f"{path}: no array arr_0 (it has {found}); save the images as np.savez(path, images)")


def _image_shape(path: Path) -> tuple[int, int, int]:
    """(N, H, W) of arr_0. Raises EvaluationError where it is not uint8 [N, H, W, 3]."""
    with _open_member(path, "arr_0") as member:
        if remedy := _layout_remedy(member.shape):
            raise EvaluationError(f"{path}: arr_0 is {list(member.shape)}, images are [N, height, width, 3]; {remedy}")
        if member.fortran:
            raise EvaluationError(f"{path}: arr_0 is in Fortran order; save np.ascontiguousarray(x)")
        if member.dtype != np.uint8:
            raise EvaluationError(f"{path}: arr_0 is {member.dtype}, images are uint8; {_dtype_remedy(path, member)}")
    return member.shape[0], member.shape[1], member.shape[2]


def _layout_remedy(shape: tuple[int, ...]) -> str | None:
    """How to make [N, H, W, 3] of an array of this shape, None where it is one."""
    if min(shape, default=0) < 1:
        return "there are no images in it"
    if len(shape) == 4 and shape[3] == 3:
        return None
    if len(shape) == 4 and shape[3] == 1:
        return "make grey RGB: np.repeat(x, 3, -1)"
    if len(shape) == 4 and shape[3] == 4:
        return "drop alpha: x[..., :3]"
    if len(shape) == 4 and shape[1] in (1, 3, 4):
        channels = {1: "np.repeat(x, 3, 1)", 3: "x", 4: "x[:, :3]"}[shape[1]]
        return f"channels come last: {channels}.transpose(0, 2, 3, 1)"
    if len(shape) == 3 and shape[2] == 3:
        return "one image is not enough, scores need at least two"
    if len(shape) == 3:
        return "make grey RGB: np.repeat(x[..., None], 3, -1)"
    return "save them so"


def _dtype_remedy(path: Path, member: _Member) -> str:
    """What is in an array of another type than uint8, and how to convert it."""
    image_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
    if member.dtype.kind not in "fiub" or image_bytes > _LOOK_BYTES:
        return "save x.astype('uint8') of values from 0 to 255"
    first = np.empty((min(member.shape[0], _LOOK_BYTES // image_bytes), *member.shape[1:]), member.dtype)
    _fill(path, member.data, first)
    low, high = float(first.min()), float(first.max())
    if not np.isfinite(low + high):
        remedy = "not all are finite"
    elif member.dtype.kind == "b":
        remedy = "convert: x.astype('uint8') * 255"
    elif member.dtype.kind in "iu":
        remedy = "convert: x.clip(0, 255).astype('uint8')"
    elif low < 0 and max(-low, high) <= 1.5:
        remedy = "if the range is [-1, 1], convert: ((x + 1) * 127.5).clip(0, 255).astype('uint8')"
    elif high <= 1.5:
        remedy = "if the range is [0, 1], convert: (x * 255).round().clip(0, 255).astype('uint8')"
    else:
        remedy = "if the range is [0, 255], convert: x.round().clip(0, 255).astype('uint8')"
    return f"the first {len(first)} are from {low:.4g} to {high:.4g}; {remedy}"


def _statistics(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Those of STATISTICS that are there. Raises EvaluationError for other shapes, values not finite, half a pair."""
    statistics: dict[str, np.ndarray] = {}
    for name in (name for name in STATISTICS if name in names):
        mean = name.replace("sigma", "mu")
        other = mean if name != mean else name.replace("mu", "sigma")
        if other not in names:
            raise EvaluationError(f"{path}: {name} without {other}; statistics are both, save them together")
        with _open_member(path, name) as member:
            expected = 2 * statistics[mean].shape if name != mean else member.shape[:1]
            if member.shape != expected or min(expected, default=0) < 1:
                raise EvaluationError(
                    f"{path}: {name} is {list(member.shape)}; statistics are mu [D] and sigma [D, D], compute them again"
                )
            if member.dtype.kind not in "fiu":
                raise EvaluationError(
                    f"{path}: {name} is {member.dtype}; statistics are real numbers, compute them again"
                )
            values = np.empty(member.shape, member.dtype, order="F" if member.fortran else "C")
            _fill(path, member.data, values.T if member.fortran else values)
        if not np.isfinite(values).all():
            raise EvaluationError(f"{path}: {name} holds values that are not finite; compute it again")
        statistics[name] = np.ascontiguousarray(values, np.float64)
    return statistics


@contextlib.contextmanager
def _open_member(path: Path, name: str) -> Iterator[_Member]:
    """Array `name` of an .npz, or a .npy. Nothing is unpickled. Raises EvaluationError for objects and wrong lengths."""
    with contextlib.ExitStack() as stack:
        with whole(f"{path}: {name}"):
            if path.suffix.lower() == ".npy":
                data: Any = stack.enter_context(open(path, "rb"))
                total = path.stat().st_size
            else:
                archive = stack.enter_context(zipfile.ZipFile(path))
                data = stack.enter_context(archive.open(f"{name}.npy"))
                total = archive.getinfo(f"{name}.npy").file_size
            version = np.lib.format.read_magic(data)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            member = _Member(data, *read(data))
            if member.dtype.hasobject:
                raise EvaluationError(
                    f"{path}: {name} holds pickled objects, which are never loaded; save a plain array"
                )
            stated, there = math.prod(member.shape) * member.dtype.itemsize, total - data.tell()
            if stated != there:
                raise EOFError(f"{there:,} bytes of data, {stated:,} by its header")
        yield member


def _fill(path: Path, data: Any, array: np.ndarray) -> None:
    """Read all of `array` [contiguous], in pieces, as a zip member makes a copy of each. Raises EvaluationError."""
    view = array.reshape(-1).view(np.uint8).data
    with whole(str(path)):
        start = 0
        while start < len(view):
            read = data.readinto(view[start : start + _CHUNK])
            if not read:
                raise EOFError(f"{len(view) - start:,} bytes are missing")
            start += read


def _read_ahead(batches: Generator[np.ndarray, None, None], ahead: int = 2) -> Iterator[np.ndarray]:
    """The same batches, up to `ahead` of them made in a thread while the caller works."""
    with contextlib.closing(batches), ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(ahead))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, batches, None))
                yield batch
        finally:
            for future in waiting:
                future.cancel()


# files


@dataclass(eq=False)
class FileImages(ImageSet):
    """Encoded images: `files` gives them in order, `names` are the files of a folder they are in."""

    files: Callable[[], Iterator[ImageFile]] = field(repr=False)
    names: list[str] = field(repr=False)

    def _batches(self, batch_size: int, workers: int) -> Iterator[np.ndarray]:
        files = self.files()
        chunks = iter(lambda: list(itertools.islice(files, batch_size)), [])
        if workers:
            return self._decode_ahead(chunks, batch_size, workers)
        return (self._decode(chunk, self._empty(chunk)) for chunk in chunks)

    def _decode_ahead(self, chunks: Iterator[list[ImageFile]], batch_size: int, workers: int) -> Iterator[np.ndarray]:
        step = min(_DECODE_AT_ONCE, -(-batch_size // workers))
        ahead = 1 + -(-2 * workers // batch_size)  # batches: small ones too keep each worker busy
        waiting: deque[tuple[np.ndarray, list[Future[np.ndarray]]]] = deque()
        pool = ThreadPoolExecutor(workers, "decode")
        try:
            while True:
                for chunk in itertools.islice(chunks, ahead - len(waiting)):
                    batch = self._empty(chunk)
                    parts = (slice(i, i + step) for i in range(0, len(chunk), step))
                    waiting.append((batch, [pool.submit(self._decode, chunk[part], batch[part]) for part in parts]))
                if not waiting:
                    return
                batch, futures = waiting.popleft()
                for future in futures:
                    future.result()
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _empty(self, chunk: list[ImageFile]) -> np.ndarray:
        return np.empty((len(chunk), self.height, self.width, 3), np.uint8)

    def _decode(self, files: list[ImageFile], out: np.ndarray) -> np.ndarray:
        for i, file in enumerate(files):
            out[i] = decode(self.path, file, (self.height, self.width))
        return out

    def _names(self) -> list[str]:
        return self.names


def _open_files(path: Path) -> FileImages:
    names = parquet_files(path)
    if names:
        count, files = parquet_count(path, names), lambda: parquet_rows(path, names)
        if path.is_dir() and (others := sum(map(is_image, walk(path)))):
            warn(f"{path}: only its {len(names)} .parquet files are read, not its {others} image files")
    else:
        found = image_files(path)
        names, count, files = [file.name for file in found], len(found), lambda: iter(found)
    if count == 0:
        raise EvaluationError(f"{path}: there are no images in it")
    height, width, _ = decode(path, next(files())).shape
    return FileImages(path, count, height, width, {}, files, names)
