"""From what the user writes after --data_dir to an ImageSource. To read another format is to add a row to `SOURCES`:

    class Lmdb(ImageSource):  # a dozen lines: path, labels and class_names, then __len__, read(index) and name(index)
        ...

    SOURCES["lmdb"] = SourceKind(lambda text, path: path.suffix == ".lmdb", lambda text, path, names, _: Lmdb(text, names))

The row is one line, and every command reads it from then on. The last row that accepts a path opens it, so that a new row
wins over those before it, and a row by an old name takes the old one's place.
"""

from __future__ import annotations

import os.path  # whose questions bear names that are too long, unlike those of Path
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, nearest
from .sources import IMAGE_SUFFIXES, FileSource, ImageSource
from .sources.archives import TarSource, ZipSource
from .sources.arrays import open_builtin, open_npz
from .sources.folders import CloudFolderSource, FolderSource
from .sources.formats import MAX_PIXELS, refuse_compressed
from .sources.joined import Joined

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_COMMA_BEFORE_SCHEME = re.compile(r",(?=[a-z][a-z0-9+.-]+://)", re.IGNORECASE)


@dataclass(frozen=True)
class SourceKind:
    """A row of SOURCES.

    accepts(text, path): whether this row opens it. open(text, path, class_names, suffixes): the source. text is what the user
    wrote; path is that as a local path, or the file it leads into (x.tar of x.tar/train), whether or not it exists;
    class_names and suffixes are those of `open_source`, and a format without classes or file names leaves them.
    """

    accepts: Callable[[str, Path], bool]
    open: Callable[[str, Path, Sequence[str] | None, tuple[str, ...]], ImageSource]


def open_source(
    path: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    max_pixels: int = MAX_PIXELS,
) -> ImageSource:
    """Open a folder, .tar, .zip, folder inside one (x.tar/train), .npz, builtin:NAME, cloud folder (gs://...), or several.

    path: several are A,B,... and give all images of A, then those of B; a file or folder whose name has a comma is itself.
    class_names: the names whose places are the class ids (from a checkpoint); None: those of this data, numbers by their value.
    suffixes: of the files to take, in local folders, .tar and .zip. max_pixels: larger images are not decoded.
    Raises UserError where there is nothing to read, UnknownClassError for a class that is not in class_names.
    """
    text = str(path)
    parts = _split(text)
    if not text.strip():
        raise UserError("no data are named: give a folder, a .tar, .zip or .npz, or builtin:digits")
    if "" in parts:
        raise UserError(f"{text}: nothing stands before or after a comma; give A,B without spaces or empty names")
    if len(parts) > 1:
        return Joined(text, [_open_one(part, class_names, suffixes, max_pixels) for part in parts], class_names)
    return _open_one(text, class_names, suffixes, max_pixels)


def _split(text: str) -> list[str]:
    if "," not in text or os.path.exists(Path(text).expanduser()):
        return [text]
    # the comma of a cloud address is its own, unless another address follows
    return _COMMA_BEFORE_SCHEME.split(text) if _SCHEME.match(text) else text.split(",")


def _open_one(text: str, class_names: Sequence[str] | None, suffixes: tuple[str, ...], max_pixels: int) -> ImageSource:
    local = Path(text).expanduser()
    place = local if os.path.isdir(local) else next((p for p in (local, *local.parents) if os.path.isfile(p)), local)
    for kind in reversed(SOURCES.values()):
        if kind.accepts(text, place):
            source = kind.open(text, place, class_names, suffixes)
            if isinstance(source, FileSource):
                source.max_pixels = max_pixels
            return source
    if not os.path.exists(place):
        raise UserError(f"{text}: no such file or folder{_suggest(local)}")
    refuse_compressed(place)
    if place.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{place}: is one image; give the folder that holds it")
    raise UserError(f"{place}: not a folder, .tar, .zip or .npz")


# ---------------------------------------------------------------- the rows


def _file_named(suffix: str) -> Callable[[str, Path], bool]:
    return lambda text, path: path.suffix.lower() == suffix and os.path.isfile(path)


def _open_tar(text: str, file: Path, class_names: Sequence[str] | None, suffixes: tuple[str, ...]) -> ImageSource:
    return TarSource(text, file, _inner(text, file), class_names, suffixes)


def _open_zip(text: str, file: Path, class_names: Sequence[str] | None, suffixes: tuple[str, ...]) -> ImageSource:
    return ZipSource(text, file, _inner(text, file), class_names, suffixes)


def _open_npz(text: str, file: Path, class_names: Sequence[str] | None, suffixes: tuple[str, ...]) -> ImageSource:
    if _inner(text, file) != ".":
        raise UserError(f"{text}: an .npz has no folders; give {file}")
    return open_npz(text, file, class_names)


SOURCES: dict[str, SourceKind] = {  # asked from the last to the first
    "folder": SourceKind(lambda text, path: os.path.isdir(path), FolderSource),
    "tar": SourceKind(_file_named(".tar"), _open_tar),
    "zip": SourceKind(_file_named(".zip"), _open_zip),
    "npz": SourceKind(_file_named(".npz"), _open_npz),
    "cloud": SourceKind(
        lambda text, path: _SCHEME.match(text) is not None,
        lambda text, path, class_names, suffixes: CloudFolderSource(text, class_names),
    ),
    "builtin": SourceKind(
        lambda text, path: text.startswith("builtin:"),
        lambda text, path, class_names, suffixes: open_builtin(text, class_names),
    ),
}


def _inner(text: str, file: Path) -> str:
    """The folder inside `file` that `text` names, "." for all of it. Raises UserError where the file is compressed."""
    refuse_compressed(file)
    return Path(text).expanduser().relative_to(file).as_posix()


def _suggest(missing: Path) -> str:
    """The nearest name beside the first part of the path that does not exist."""
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    try:
        return nearest(missing.name, [p.name for p in missing.parent.iterdir()])
    except OSError:
        return ""
