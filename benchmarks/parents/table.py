"""Rows of the table: what was compared, by how much it differs, and whether that is right."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ROUNDING = 2e-5  # of the largest value: what float32 arithmetic in another order leaves


@dataclass(frozen=True)
class Row:
    """what was compared, the difference measured, and what is said of it; wrong: it differs and nobody wants it to."""

    what: str
    difference: str
    verdict: str
    wrong: bool = False


def same(what: str, ours: Any, theirs: Any, tolerance: float = ROUNDING) -> Row:
    """A row of two results that have to agree: arrays or tensors, or sequences and mappings of them."""
    difference, scale = distance(ours, theirs)
    right = difference <= tolerance * max(scale, 1.0)
    return Row(what, number(difference), "same" if right else "DIFFERS", wrong=not right)


def by_choice(what: str, difference: float | str, why: str) -> Row:
    """A row of what differs on purpose."""
    return Row(what, difference if isinstance(difference, str) else number(difference), f"differs: {why}")


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def distance(a: Any, b: Any) -> tuple[float, float]:
    """(largest absolute difference, largest absolute value of b). Raises ValueError where the shapes or keys differ."""
    if isinstance(b, Mapping):
        if a.keys() != b.keys():
            raise ValueError(f"entries differ: {sorted(a.keys() ^ b.keys())[:4]}")
        parts = [distance(a[key], b[key]) for key in b]
    elif isinstance(b, Sequence) and not isinstance(b, str):
        parts = [distance(x, y) for x, y in zip(a, b, strict=True)]
    else:
        x, y = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (a, b))
        if x.shape != y.shape:
            raise ValueError(f"shapes differ: {x.shape} and {y.shape}")
        return (float(np.abs(x - y).max()) if x.size else 0.0, float(np.abs(y).max()) if y.size else 0.0)
    return max((d for d, _ in parts), default=0.0), max((s for _, s in parts), default=0.0)


def run(comparisons: Iterable[Callable[[], Row | Sequence[Row]]]) -> list[Row]:
    """The rows of all comparisons. What can't be imported or run is a row that says why; the parents' own printing is not shown."""
    rows: list[Row] = []
    for comparison in comparisons:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = comparison()
            rows += [found] if isinstance(found, Row) else found
        except Exception as error:  # of other people's code under any version of anything
            what = (comparison.__doc__ or comparison.__name__).strip().rstrip(".")
            first = (str(error).splitlines() or [""])[0]
            rows.append(Row(what, "", f"not run: {type(error).__name__}: {first}"))
    return rows


def markdown(title: str, rows: Sequence[Row]) -> str:
    lines = [f"| {title} | difference | |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {row.what} | {row.difference} | {row.verdict} |" for row in rows)])
