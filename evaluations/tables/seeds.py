"""Rows of numbers, each measured with several seeds: a CSV file, a markdown table of mean and spread, and a figure."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .figures import new_figure, save_figure


class Column(NamedTuple):
    """One number: its key in `Measured.values`, its title, and the digits after the point that are shown."""

    key: str
    title: str
    digits: int = 3


class Measured(NamedTuple):
    """What one seed of one row gave; seed None: a reference without one. A number that a row doesn't have is missing."""

    row: str
    seed: int | None
    values: Mapping[str, float]


def shown_columns(results: Sequence[Measured], columns: Sequence[Column]) -> list[Column]:
    """Those that at least one row has."""
    return [column for column in columns if any(column.key in result.values for result in results)]


def write_seeds_csv(results: Sequence[Measured], columns: Sequence[Column], path: Path) -> None:
    """One line per row and seed; a missing number is an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", *(column.key for column in columns)])
        for result in results:
            seed = "" if result.seed is None else result.seed
            writer.writerow([result.row, seed, *(result.values.get(column.key, "") for column in columns)])


def markdown_table(results: Sequence[Measured], columns: Sequence[Column]) -> str:
    """One line per row: mean +- sample standard deviation over its seeds (the mean alone where there is one seed)."""
    columns = shown_columns(results, columns)
    lines = ["| | " + " | ".join(column.title for column in columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for row in rows_of(results):
        cells = [mean_and_spread(_values(results, row, column.key), column.digits) for column in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """'0.250 +- 0.010', '0.250' of a single value, '' of none."""
    if not len(values):
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.{digits}f}"


def plot_seeds(results: Sequence[Measured], columns: Sequence[Column], path: Path) -> None:
    """A panel per column: a dot per seed and a bar at their mean, row by row."""
    columns, rows = shown_columns(results, columns), rows_of(results)
    across = min(4, len(columns))
    down = math.ceil(len(columns) / across)
    figure, only = new_figure(1.6 + 2.5 * across, down * (1.1 + 0.3 * len(rows)))
    only.remove()
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for panel in panels[len(columns) :]:
        panel.remove()
    for panel, column in zip(panels, columns, strict=False):
        for place, row in enumerate(rows):
            values = _values(results, row, column.key)
            panel.plot(values, [place] * len(values), "o", color="C0", markersize=4, alpha=0.7)
            if len(values):
                panel.plot([np.mean(values)], [place], "|", color="C3", markersize=14, markeredgewidth=2)
        panel.set_title(column.title, fontsize=9)
        panel.grid(alpha=0.3)
        panel.margins(x=0.1)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("dots: seeds; bars: their mean", fontsize=8)
    save_figure(figure, path)


def rows_of(results: Sequence[Measured]) -> list[str]:
    """The rows' names, in the order of their first result."""
    return list(dict.fromkeys(result.row for result in results))


def _values(results: Sequence[Measured], row: str, key: str) -> list[float]:
    return [result.values[key] for result in results if result.row == row and key in result.values]
