"""The numbers of the table: which columns there are, distances of drawn images, and how far the tasks' gradients agree."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluations.features.moments import statistics
from evaluations.scores.kid import kernel_distance
from evaluations.scores.metrics import frechet_distance
from evaluations.tables.seeds import Column, Measured

from .held_out import FRAMED, PLAIN

HIGHER_IS_BETTER = ("accuracy", "acc_", "cos_")  # how such columns' names begin or end
FRECHET, KERNEL, COSINE = "FD", "KID x 1000", "gradient cosine"


def columns_of(results: Sequence[Measured]) -> list[Column]:
    """Those of the table and the picture: neither quartiles nor gradients."""
    return [column for column in every_column(results) if "_q" not in column.key and not column.key.startswith(COSINE)]


def cosines_of(results: Sequence[Measured]) -> list[Column]:
    """Those of the table of gradients."""
    chosen = [column.key for column in every_column(results) if column.key.startswith(COSINE)]
    return [Column(key, key.removeprefix(f"{COSINE}, "), 3) for key in chosen]


def every_column(results: Sequence[Measured]) -> list[Column]:
    """In the order in which models have them, those that all share first."""
    names = dict.fromkeys(name for result in results for name in result.values)
    first = [name for name in (PLAIN, FRECHET, KERNEL, FRAMED) if name in names]
    ordered = [*first, *(name for name in names if name not in first)]
    return [Column(name, name.replace("_", " "), 4 if name in (PLAIN, FRAMED) else 3) for name in ordered]


def higher_is_better(name: str) -> bool:
    """Whether a larger number of this column is the better one."""
    return any(word in name for word in HIGHER_IS_BETTER)


def distances(true: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Frechet distance and 1000 KID of features [N, D] and [M, D]."""
    frechet = frechet_distance(*statistics(true), *statistics(drawn))
    return {FRECHET: float(frechet), KERNEL: 1000 * kernel_distance(true, drawn)[0]}


def conflicts(progress: Path) -> dict[str, float]:
    """The mean cosine of the gradients of each modality and the image over the log, where the run measured it
    (`--mt_conflict_interval`); {} where not."""
    with open(progress, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in rows[-1] if rows else {}:
        if name.startswith("grad_cos_"):
            values = np.array([float(row[name]) for row in rows if row[name] not in ("", "nan")])
            if len(values):
                found[f"{COSINE}, {name.removeprefix('grad_cos_').replace('_', ' and ')}"] = float(values.mean())
    return found
