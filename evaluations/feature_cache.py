"""Features of references on disk, keyed by what was in the files, so that the next evaluation starts with them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile

from .backends import Backend
from .errors import warn
from .features import Features
from .images import ImageSet
from .weights import cache_folder

FORMAT = 1  # of the files, and of how features are made


def cached_features(images: ImageSet, backend: Backend, what: str) -> Features:
    """`backend.features(images)`, from the cache where the same pixels went through the same weights before."""
    key = hashlib.sha256(f"{FORMAT} {backend.name} {backend.sha256} {images.content_hash()}".encode()).hexdigest()
    path = cache_folder() / "features" / f"{key[:32]}.npz"
    if path.is_file():
        try:
            return Features.load(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            warn(f"{path}: cannot be read; made anew")
    features = backend.features(images, what)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        features.save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warn(f"{path.parent}: the reference's features are not kept ({error})")
    return features
