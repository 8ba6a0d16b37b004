"""Folders of images: local ones, and cloud ones through blobfile."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .sources import IMAGE_SUFFIXES, FileSource, is_image_name


class FolderSource(FileSource):
    """All images below a local folder. Links are followed, each folder at most once on the way down."""

    def __init__(
        self, path: str, folder: Path, class_names: Sequence[str] | None, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    ):
        try:
            names = sorted(_walk(str(folder), "", frozenset(), suffixes))
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        if not names:
            raise UserError(f"{path}: no images in this folder or below; give a folder of .jpg or .png files")
        super().__init__(path, names, class_names)
        self.folder = os.path.abspath(folder)

    def read_bytes(self, index: int) -> bytes:
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
        names = sorted(name for name in (file.removeprefix(root) for file in files) if is_image_name(name))
        if not names:
            raise UserError(f"{path}: no images in this cloud folder; archives have to be copied here first")
        super().__init__(path, names, class_names)
        self.root = root

    def read_bytes(self, index: int) -> bytes:
        import blobfile

        with blobfile.BlobFile(self.root + self.names[index], "rb") as handle:
            return handle.read()


def _walk(folder: str, prefix: str, above: frozenset[str], suffixes: tuple[str, ...]) -> Iterator[str]:
    """Names of images below `folder`, relative to the root; `above`: real paths of the folders we are in."""
    real = os.path.realpath(folder)
    if real in above:
        return  # a link that leads back up
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _walk(entry.path, name + "/", above | {real}, suffixes)
            elif is_image_name(name, suffixes):
                yield name
