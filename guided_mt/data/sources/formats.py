"""Which files are images, by their names, and how large a one is opened."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError

logger = logging.getLogger("guided_mt.data")

# Still images that Pillow decodes by itself. A fixed list, not what this machine's Pillow knows: the images' numbers
# must be the same on each machine. evaluations.files.image_files has the same one.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k"),
    *(".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".qoi"),
)
# Files beside images that nobody takes for images.
_QUIET_SUFFIXES = (
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".htm", ".yaml", ".yml"),
    *(".log", ".ini", ".py", ".sh", ".pdf", ".mat"),
)
_QUIET_NAMES = ("readme", "license", "licence", "copying", "makefile", "thumbs.db")
_SHOWN = 3  # names in a message
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
MAX_PIXELS = 178_956_970  # of a photo, unless more are allowed: where Pillow by itself refuses one


class TooManyPixels(ValueError):
    """An image above the limit, which is there since a small file may claim any size."""


def is_hidden(name: str) -> bool:
    """Whether a "/"-separated name is a dotfile, in a folder that is one, or a macOS resource fork."""
    if not (name.startswith(".") or "/." in name or "__MACOSX" in name):  # nearly all names: no need to take them apart
        return False
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_image_name(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a "/"-separated name is a file to read: one of the suffixes, no dotfile, no macOS resource fork."""
    return name.lower().endswith(suffixes) and not is_hidden(name)


def image_names(names: Collection[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> np.ndarray:
    """Which of N names are files to read, bool [N]."""
    return np.fromiter((is_image_name(name, suffixes) for name in names), bool, len(names))


def say_left_out(path: str, names: Iterable[str]) -> None:
    """Say which files of a source are not read, but for hidden files and texts: what is left looks like all of the data.

    names: of the files that are no images by their names, and of links that lead nowhere.
    """
    names = [name for name in names if not is_hidden(name) and not _is_quiet(name.rpartition("/")[2].lower())]
    if names:
        shown = ", ".join(sorted(names)[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
        logger.warning("%s: %d file(s) are no images by their names and left out: %s", path, len(names), shown)


def _is_quiet(file: str) -> bool:
    return file.endswith(_QUIET_SUFFIXES) or file.startswith(_QUIET_NAMES)


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded image. Raises TooManyPixels for more than max_pixels, and whatever Pillow raises for a broken one."""
    with without_pillows_limit():
        image = Image.open(io.BytesIO(content))
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise TooManyPixels(
            f"{image.width} x {image.height} = {pixels:,} pixels, over the limit of {max_pixels:,}; to read it, raise the limit: "
            f"--max_pixels {pixels} of prepare_images.py and of training, data.params.max_pixels in a YAML file"
        )
    return image


_lock = threading.Lock()


@contextlib.contextmanager
def without_pillows_limit() -> Iterator[None]:
    """Pillow's own limit is one for the whole process, warns from half of it on, and cannot be said by a flag."""
    with _lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def refuse_compressed(file: Path) -> None:
    """Raises UserError for a compressed archive, whose files can't be read by their place, and for a file that can't be read."""
    try:
        with file.open("rb") as handle:
            magic = handle.read(8)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    for start, tool in _COMPRESSED.items():
        if magic.startswith(start):
            raise UserError(f"{file}: is compressed, so single images cannot be read; unpack it once with `{tool}`")
