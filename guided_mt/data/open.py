"""From what the user writes after --data_dir to an ImageSource."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, nearest
from .archives import TarSource, ZipSource
from .arrays import open_builtin, open_npz
from .folders import CloudFolderSource, FolderSource
from .sources import IMAGE_SUFFIXES, ImageSource

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def open_source(
    path: str | Path, class_names: Sequence[str] | None = None, *, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> ImageSource:
    """Open a folder, .tar, .zip, folder inside one (x.tar/train), .npz, builtin:NAME or cloud folder (gs://...).

    class_names: the names whose places are the class ids (from a checkpoint); None: sorted names of this data.
    suffixes: of the files to take, in local folders, .tar and .zip.
    Raises UserError where there is nothing to read, UnknownClassError for a class that is not in class_names.
    """
    text = str(path)
    if text.startswith("builtin:"):
        return open_builtin(text, class_names)
    if _SCHEME.match(text):
        return CloudFolderSource(text, class_names)
    local = Path(path).expanduser()
    if local.is_dir():
        return FolderSource(text, local, class_names, suffixes)
    archive = next((p for p in (local, *local.parents) if p.is_file()), None)
    if archive is None:
        raise UserError(f"{text}: no such file or folder{_suggest(local)}")
    return _open_file(text, archive, local.relative_to(archive).as_posix(), class_names, suffixes)


def _open_file(
    text: str, file: Path, inner: str, class_names: Sequence[str] | None, suffixes: tuple[str, ...]
) -> ImageSource:
    """A file, and the folder inside it ("." for all of it)."""
    try:
        with file.open("rb") as handle:
            magic = handle.read(8)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    suffix = file.suffix.lower()
    for start, tool in _COMPRESSED.items():
        if magic.startswith(start):
            raise UserError(f"{file}: is compressed, so single images cannot be read; unpack it once with `{tool}`")
    if suffix == ".npz":
        if inner != ".":
            raise UserError(f"{text}: an .npz has no folders; give {file}")
        return open_npz(text, file, class_names)
    if suffix == ".zip":
        return ZipSource(text, file, inner, class_names, suffixes)
    if suffix == ".tar":
        return TarSource(text, file, inner, class_names, suffixes)
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"{file}: is one image; give the folder that holds it")
    raise UserError(f"{file}: not a folder, .tar, .zip or .npz")


def _suggest(missing: Path) -> str:
    """The nearest name beside the first part of the path that does not exist."""
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        return nearest(missing.name, [p.name for p in missing.parent.iterdir()])
    except OSError:
        return ""
