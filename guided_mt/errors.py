"""The one error for bad input: a single clear line, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input by the user: flag, key, file or value. Commands print it as one line and exit with code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the valid name that looks most like `name`; '' where none does."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
