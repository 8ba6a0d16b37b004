"""Arrays of an .npz file, without pickle and with one line for every way it can be broken."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from ..errors import EvaluationError


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """The file's arrays by name, read when they are asked for. Raises EvaluationError where it is no .npz."""
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not a readable .npz file") from error
    if not isinstance(file, NpzFile):
        raise EvaluationError(f"{path}: a single array, not an .npz file of named arrays (write it with np.savez)")
    with file:
        yield file


def read_array(file: NpzFile, name: str, path: Path) -> np.ndarray:
    """One array. Raises EvaluationError where `name` is not there, is damaged, or holds Python objects."""
    if name not in file.files:
        raise EvaluationError(f"{path}: no array {name}; it holds {', '.join(file.files) or 'nothing'}")
    try:
        return file[name]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "holds Python objects" if "allow_pickle" in str(error) else "is damaged"
        raise EvaluationError(f"{path}: array {name} {reason} and is not read") from error
