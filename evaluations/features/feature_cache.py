"""What was made of references, on disk, keyed by what was in the files, so that the next evaluation starts with it."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from ..errors import warn
from ..files.files import replacing
from ..files.images import ImageSet
from .weights import cache_folder

FORMAT = 1  # of the files, and of how features are made
T = TypeVar("T", bound="Kept")


class Kept(Protocol):
    """What writes itself to a file."""

    def save(self, path: Path) -> None:
        """Write it as an .npz."""


def cached(images: ImageSet, network: str, make: Callable[[], T], load: Callable[[Path], T]) -> T:
    """`make()`, or what it made before of the same files; `network` says with what: software and weights."""
    key = hashlib.sha256(f"{FORMAT} {network} {images.content_hash()}".encode()).hexdigest()
    path = cache_folder() / "features" / f"{key[:32]}.npz"
    if path.is_file():
        try:
            return load(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            warn(f"{path}: cannot be read; made anew")
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            made.save(temporary)
    except OSError as error:
        warn(f"{path.parent}: the reference's features are not kept ({error})")
    return made
