"""What an archive holds: the files' names, and where each of them lies."""

from __future__ import annotations

import posixpath
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .names import Names, smallest


@dataclass(frozen=True)
class Listing:
    """The files of an archive in the order of their names, each name once; columns: whole numbers [N] of each file."""

    names: Names
    columns: Mapping[str, np.ndarray]


class ListingBuilder:
    """A listing while it grows. Of files with the same name the last one counts, as when unpacking."""

    def __init__(self, *columns: str):
        self._columns = columns
        self._numbers = array("Q")  # a row of them per file that was added
        self._rows: dict[str, int] = {}  # name: its row

    def add(self, name: str, *numbers: int) -> None:
        """A file, by the name that its archive gives it, and a number for each column."""
        self._rows[cleaned(name)] = len(self._numbers) // len(self._columns)
        self._numbers.extend(numbers)

    def link(self, name: str, target: str) -> None:
        """A further name of a file; where there is no such file, it is left out."""
        row = self._rows.get(cleaned(target))
        if row is not None:
            self._rows[cleaned(name)] = row

    def finish(self) -> Listing:
        """All files, in the order of their names. Takes the builder's own table with it."""
        names = sorted(self._rows)
        rows = np.fromiter(map(self._rows.__getitem__, names), np.int64, len(names))
        self._rows = {}
        table = np.frombuffer(self._numbers, np.uint64) if self._numbers else np.zeros(0, np.uint64)
        numbers = table.reshape(-1, len(self._columns))
        columns = {column: smallest(numbers[rows, k]) for k, column in enumerate(self._columns)}
        return Listing(Names.of(names), columns)


def cleaned(name: str) -> str:
    """A member's name without "./", "/" in front and "..": ./train/a.png and train/a.png are the same file."""
    if name.startswith((".", "/")) or "/." in name or "//" in name or "\\" in name:
        return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")
    return name
