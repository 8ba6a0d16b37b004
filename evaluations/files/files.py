"""Files that are complete or not there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import EvaluationError


def prepare_output(path: Path) -> None:
    """Make the folder of a file that is to be written later. Raises EvaluationError where `path` is a folder itself."""
    if path.is_dir():
        raise EvaluationError(f"{path}: is a folder, not a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write valid JSON: a number that is not finite is a ValueError."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write under; it becomes `path` at the end, or is removed where something, Ctrl-C too, comes between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
