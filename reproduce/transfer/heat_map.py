"""The picture of transfer: how much better or worse each model is than the one that has the fewest tasks for a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluations.tables.figures import new_figure, save_figure
from evaluations.tables.seeds import Column, Measured, rows_of

from .held_out import FRAMED
from .numbers import higher_is_better


def draw_heat_map(results: Sequence[Measured], columns: Sequence[Column], alone: str, path: Path) -> None:
    """Rows are models, columns numbers, cells the gain in % over the reference of the column: `alone` where it has the number, else
    the first model that has it. Blue is better, red worse; below the gain, a mean over seeds, is its standard
    error."""
    columns = [column for column in columns if column.key != FRAMED]  # there the frames differ from model to model
    rows = rows_of(results)
    gains = np.full((len(rows), len(columns)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for x, column in enumerate(columns):
        having = [row for row in rows if by_seed(results, row, column.key)]
        reference = alone if alone in having else (having[0] if having else "")
        for y, row in enumerate(rows):
            found = gain(results, row, reference, column.key)
            if found is None or row == reference:
                texts[y, x] = "" if found is None else "reference"
                continue
            gains[y, x], error = found
            texts[y, x] = f"{gains[y, x]:+.1f} %" + ("" if np.isnan(error) else f"\n± {error:.1f}")
    figure, axes = new_figure(2.5 + 1.15 * len(columns), 1.4 + 0.55 * len(rows))
    largest = max(1.0, np.nanpercentile(np.abs(gains), 90)) if np.isfinite(gains).any() else 1.0
    axes.imshow(gains, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(
        range(len(columns)), [column.title for column in columns], rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(rows)), rows)
    for (y, x), text in texts.items():
        dark = np.isfinite(gains[y, x]) and abs(gains[y, x]) > 0.7 * largest
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_title("gain over the reference, % (± standard error over seeds); blue: better", fontsize=9)
    save_figure(figure, path)


def by_seed(results: Sequence[Measured], row: str, key: str) -> dict[int | None, float]:
    """{seed: number} of a model."""
    return {result.seed: result.values[key] for result in results if result.row == row and key in result.values}


def gain(results: Sequence[Measured], row: str, reference: str, key: str) -> tuple[float, float] | None:
    """(mean over the seeds that both have of how much better `row` is in % of the reference's mean, its standard error; NaN of one
    seed); None where they share no seed."""
    ours, theirs = by_seed(results, row, key), by_seed(results, reference, key)
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    scale = abs(np.mean([theirs[seed] for seed in seeds])) or 1.0
    sign = 1 if higher_is_better(key) else -1
    each = np.array([100 * sign * (ours[seed] - theirs[seed]) / scale for seed in seeds])
    return float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else float("nan")
