"""The one error for bad input: a single clear line, exit code 2."""

from __future__ import annotations

import difflib
import struct
import zipfile
import zlib
from collections.abc import Iterable

# What numpy and zipfile raise for a file that is no whole .npz or .npy (AttributeError: an .npy by the name of an .npz).
NPZ_ERRORS = (OSError, ValueError, EOFError, AttributeError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


class UserError(ValueError):
    """Bad input by the user: flag, key, file or value. Commands print it as one line and exit with code 2."""


def reason(error: Exception) -> str:
    """Why a file can't be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if first.startswith("Object arrays") or "Python objects" in first:
        return "it holds pickled objects, which are never loaded"
    return "it is another kind of file" if "allow_pickle" in first else first  # numpy, of whatever it doesn't know


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the valid name that looks most like `name`; '' where none does."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
