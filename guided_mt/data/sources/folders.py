"""Folders of images: local ones, and cloud ones through blobfile."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from .base import FileSource
from .formats import IMAGE_SUFFIXES, is_hidden, is_image_name, say_left_out


class FolderSource(FileSource):
    """All images below a local folder. Links are followed, each folder at most once on the way down."""

    def __init__(
        self, path: str, folder: Path, class_names: Sequence[str] | None, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    ):
        try:
            files = sorted(_walk(str(folder), "", frozenset()))
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        names = [name for name, there in files if there and is_image_name(name, suffixes)]
        if not names:
            raise UserError(f"{path}: no images in this folder or below; give a folder of .jpg or .png files")
        say_left_out(path, [name for name, there in files if not (there and is_image_name(name, suffixes))])
        super().__init__(path, names, class_names)
        self.folder = os.path.abspath(folder)

    def read_bytes(self, index: int) -> bytes:
        """Bytes of the file of image `index`. Raises OSError."""
        return Path(self.folder, self.names[index]).read_bytes()


class CloudFolderSource(FileSource):
    """All images below a cloud folder (gs://, az://, https:// of Azure), as ADM reads them."""

    def __init__(self, path: str, class_names: Sequence[str] | None):
        import blobfile  # here: slow to import, and only cloud paths need it

        root = path.rstrip("/") + "/"
        try:
            files = [f"{folder.rstrip('/')}/{file}" for folder, _, files in blobfile.walk(root) for file in files]
        except Exception as error:
            raise UserError(f"{path}: cannot be listed ({error}); check the address and your credentials") from error
        below = sorted(file.removeprefix(root) for file in files)
        names = [name for name in below if is_image_name(name)]
        if not names:
            raise UserError(f"{path}: no images in this cloud folder; archives have to be copied here first")
        say_left_out(path, [name for name in below if not is_image_name(name)])
        super().__init__(path, names, class_names)
        self.root = root

    def read_bytes(self, index: int) -> bytes:
        """Bytes of the file of image `index`, fetched by blobfile."""
        import blobfile

        with blobfile.BlobFile(self.root + self.names[index], "rb") as handle:
            return handle.read()


def _walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, bool]]:
    """(name, whether there is a file) of all below `folder` but in hidden folders: a link may lead nowhere.

    Names are relative to the root; above: real paths of the folders we are in.
    """
    real = os.path.realpath(folder)
    if real in above:
        return  # a link that leads back up
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            # Where links go round in a circle, a Path is neither; an entry raises.
            there = Path(entry.path) if entry.is_symlink() else entry
            if not there.is_dir():
                yield name, there.is_file()
            elif not is_hidden(entry.name):
                yield from _walk(entry.path, name + "/", above | {real})
