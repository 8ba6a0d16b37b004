"""Decode and crop all images once, into a .zip of PNGs that training reads many times as fast as raw photos.

    mt-diffusion prepare photos photos-64.zip --size 64

Folders in SRC stay, so that the images keep their classes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NoReturn

from PIL import Image
from tqdm import tqdm

from ..data import MAX_PIXELS, ImageSource, check_workers, open_source
from ..data.dataset import BrokenImage, BrokenImages, decode
from ..data.loader import end_with_parent
from ..data.sources import FileSource, Joined
from ..errors import UserError, in_a_line, nearest
from ..runs.processes.claim import Claim

_CHUNK = 32  # images per message between processes
_AHEAD = 4  # chunks per worker that may wait to be written: bounds the memory
_DATE = (1980, 1, 1, 0, 0, 0)  # the same for all files: the same input gives the same bytes

Encoded = tuple[int, bytes | None, str]  # image number, PNG or None where broken, and why


def console() -> NoReturn:
    """Run as a command: bad input is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's word before it ends a job; workers inherit it
    try:
        main(sys.argv[1:])
    except (UserError, OSError, MemoryError) as error:
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


_unfinished: set[Path] = set()  # files to remove when a signal ends the process


def _end_at_once(number: int, _: object) -> NoReturn:
    """Ends within the handler: an exception raised here could be lost in a callback, or leave a lock of the pool held.

    The workers see that their parent is gone.
    """
    for file in _unfinished:
        file.unlink(missing_ok=True)
    os._exit(128 + number)


def main(argv: Sequence[str]) -> None:
    """Parse, prepare, print the summary. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SRC", help="folder, .tar, .zip, x.tar/train, .npz or builtin:digits")
    parser.add_argument("out", metavar="OUT.zip", type=Path, help="the file to write; one of this name is replaced")
    parser.add_argument("--size", type=int, required=True, help="width and height of the images, pixels")
    parser.add_argument("--workers", type=int, default=_cpus(), help="worker processes (default: one per core)")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        help=f"width times height of the largest photo that is read (default: {MAX_PIXELS})",
    )
    parser.add_argument(
        "--upright",
        action="store_true",
        help="turn photos as their EXIF orientation says, as viewers do and ADM does not",
    )
    flags = ["--help", "--size", "--workers", "--limit", "--max_pixels", "--upright"]
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if flag not in flags:  # before parsing, which would rather complain about what is missing
            parser.error(f"unknown flag {flag}{nearest(flag, flags)}")
    args = parser.parse_args(argv)
    for name, least in (("size", 1), ("limit", 1), ("max_pixels", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    check_workers("--workers", args.workers)

    start = time.perf_counter()
    written = prepare(
        args.source,
        args.out,
        args.size,
        workers=args.workers,
        limit=args.limit,
        max_pixels=args.max_pixels,
        upright=args.upright,
    )
    seconds = time.perf_counter() - start
    megabytes = args.out.stat().st_size / 1e6
    print(
        f"{args.out}: {written} images of {args.size}x{args.size} pixels, {seconds:.1f} s, "
        f"{written / seconds:.0f} images/s, {megabytes:.1f} MB"
    )


def prepare(
    path: str,
    out: Path,
    size: int,
    *,
    workers: int,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
    upright: bool = False,
) -> int:
    """Write the images of `path`, centre-cropped to size x size, into the zip `out`; returns how many.

    Written beside `out` and renamed when complete. Broken images and too large ones are left out with a warning. Raises UserError.
    """
    if out.suffix.lower() != ".zip":
        raise UserError(f"{out}: the output must be named .zip")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give another name")
    source_path = Path(path).absolute()
    if out.absolute() in (source_path, *source_path.parents):
        raise UserError(f"{out}: is the source itself; give another name")
    source = open_source(path, max_pixels=max_pixels)
    for part in source.sources if isinstance(source, Joined) else [source]:
        if isinstance(part, FileSource):
            part.upright = upright
    count = len(source) if limit is None else min(limit, len(source))
    unfinished, claim = out.with_name(out.name + ".unfinished"), Claim.of_file(out, "OUT.zip")
    with claim:
        _unfinished.update((unfinished, claim.file))
        try:
            written = _write(source, unfinished, count, size, workers)
            os.replace(unfinished, out)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
        finally:
            unfinished.unlink(missing_ok=True)
            _unfinished.difference_update((unfinished, claim.file))
    return written


def _write(source: ImageSource, file: Path, count: int, size: int, workers: int) -> int:
    """The first `count` images of `source` into a stored zip; returns how many are not broken."""
    broken = BrokenImages(source)
    taken: set[str] = set()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        # closing: ends the workers whatever happens here
        contextlib.closing(_encode_all(source, count, size, workers)) as encoded,
    ):
        for index, png, reason in tqdm(encoded, total=count, unit="image", disable=None):
            if png is None:
                broken.add(index, reason)
                continue
            name = _png_name(source.name(index), taken)
            taken.add(name)
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, on each system
            archive.writestr(info, png)
    return len(taken)


def _png_name(name: str, taken: set[str]) -> str:
    """The name with the suffix .png; where x.jpg and x.png would both be x.png, the second keeps its suffix too."""
    stem = name.rpartition(".")[0]
    candidate = f"{stem}.png"
    while candidate in taken:
        candidate = name = f"{name}.png"
    return candidate


def _encode_all(source: ImageSource, count: int, size: int, workers: int) -> Generator[Encoded, None, None]:
    """All images in order. At most `_AHEAD` chunks per worker are held at a time."""
    chunks = (range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK))
    if workers == 0:
        for chunk in chunks:
            yield from _encode_chunk(source, size, chunk)
        return
    context = multiprocessing.get_context()
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source, size, stop))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= workers * _AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(f"{source.path}: a worker process was killed (out of memory?); lower --workers") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker_task: tuple[ImageSource, int, Event] | None = None  # source, size and "stop now", set once in each worker


def _start_worker(source: ImageSource, size: int, stop: Event) -> None:
    global _worker_task
    _worker_task = (source, size, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_in_worker(chunk: range) -> list[Encoded]:
    assert _worker_task is not None
    source, size, stop = _worker_task
    return list(itertools.takewhile(lambda _: not stop.is_set(), _encode_chunk(source, size, chunk)))


def _encode_chunk(source: ImageSource, size: int, chunk: range) -> Iterator[Encoded]:
    for index in chunk:
        try:
            array = decode(source, index, size).transpose(1, 2, 0)
        except BrokenImage as error:
            yield index, None, str(error)
            continue
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", compress_level=1)
        yield index, buffer.getvalue(), ""


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    console()
