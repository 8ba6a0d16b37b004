"""The names of many files, held as bytes instead of as Python strings."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from typing_extensions import override

_BLOCK = 4096  # names that an iteration unpacks together


class Names(Sequence[str]):
    """N strings as one block of bytes and their places in it, 40 to 60 bytes a name instead of over 100.

    Strings of Python's also count who uses them, so that each process that reads such a list gets a copy of it, page by page;
    these stay shared. joined: UTF-8, where what an operating system could not read stands as a lone surrogate; starts, ends
    [N]: bytes of it.
    """

    def __init__(self, joined: bytes, starts: np.ndarray, ends: np.ndarray):
        self.joined, self.starts, self.ends = joined, starts, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Hold these."""
        if isinstance(names, Names):
            return names
        joined, ends = bytearray(), array("q")
        for name in names:
            joined += _encoded(name)
            ends.append(len(joined))
        return cls.end_to_end(bytes(joined), np.frombuffer(ends, np.int64) if ends else np.zeros(0, np.int64))

    @classmethod
    def end_to_end(cls, joined: bytes, ends: np.ndarray) -> Names:
        """Where each name begins at the end of the one before it."""
        ends = smallest(ends)
        return cls(joined, np.concatenate([np.zeros(min(1, len(ends)), ends.dtype), ends[:-1]]), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    @override
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return self.take(index)
        return self.joined[int(self.starts[index]) : int(self.ends[index])].decode("utf-8", "surrogatepass")

    @override
    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):
            block = slice(first, first + _BLOCK)
            for start, end in zip(self.starts[block].tolist(), self.ends[block].tolist(), strict=True):
                yield self.joined[start:end].decode("utf-8", "surrogatepass")

    def take(self, rows: slice | np.ndarray) -> Names:
        """Some of them: a slice, numbers, or a mask [N]. The bytes are shared."""
        return Names(self.joined, self.starts[rows], self.ends[rows])

    def below(self, prefix: str) -> slice:
        """Of names in order: where those with this prefix stand."""
        first = _encoded(prefix)
        if not first:
            return slice(0, len(self))
        last = first[:-1] + bytes([first[-1] + 1])  # UTF-8 has no byte 255, and its order is that of the strings
        return slice(self._place(first), self._place(last))

    def without(self, prefix: str) -> Names:
        """All of them without a prefix that each has."""
        length = self.starts.dtype.type(len(_encoded(prefix)))
        return Names(self.joined, self.starts + length, self.ends)

    def _place(self, bound: bytes) -> int:
        """How many of these names, which are in order, come before `bound`."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.joined[int(self.starts[middle]) : int(self.ends[middle])] < bound:
                low = middle + 1
            else:
                high = middle
        return low


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def smallest(numbers: np.ndarray) -> np.ndarray:
    """The same whole numbers, none below 0, in 1, 2, 4 or 8 bytes each."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
