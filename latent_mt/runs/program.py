"""The command line of this process: as a sub-command of `mt-diffusion` sees it, and as it was typed.

A sub-command reads `sys.argv` like any program, so `mt-diffusion train --lr 1` is shown to it as `["mt-diffusion train", "--lr",
"1"]`: its help and its errors then bear its name. What starts this program again, as Lightning does for further processes, needs
the words that were typed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

_typed: list[str] | None = None


@contextlib.contextmanager
def shown_as(name: str, words: Sequence[str]) -> Iterator[None]:
    """Inside, `sys.argv` is the program `name` with these words."""
    global _typed
    before, sys.argv = sys.argv, [name, *words]
    outermost = _typed is None
    _typed = before if outermost else _typed
    try:
        yield
    finally:
        sys.argv = before
        _typed = None if outermost else _typed


@contextlib.contextmanager
def as_typed() -> Iterator[None]:
    """Inside, `sys.argv` is what was typed."""
    before = sys.argv
    sys.argv = before if _typed is None else _typed
    try:
        yield
    finally:
        sys.argv = before
