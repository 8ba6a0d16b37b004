"""Matplotlib figures, which only those who ask for one need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READABLE = 40  # classes of a confusion matrix with numbers in its cells; of more, only some are named


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of width x height inches with one pair of axes; needs no display and no global backend."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whatever the name's suffix."""
    figure.savefig(path, format="png", dpi=120)


def plot_confusion(H: np.ndarray, names: Sequence[str], path: Path, what: str) -> None:
    """A confusion matrix H [K, K] of counts, rows the true classes, each drawn as shares of its row. what: what is counted."""
    shares = H / np.maximum(H.sum(axis=1, keepdims=True), 1)
    few = len(names) <= READABLE
    side = 3.0 + 0.42 * min(len(names), READABLE)
    figure, axes = new_figure(side + 0.8, side)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    named = range(0, len(names), 1 if few else -(-len(names) // READABLE))
    axes.set_xticks(named, [names[i] for i in named], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(named, [names[i] for i in named])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (i, j), share in np.ndenumerate(shares) if few else ():
        if share >= 0.005:
            colour = "white" if share > 0.5 else "black"
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, ax=axes, label=f"share of the true class's {what}", shrink=0.8)
    save_figure(figure, path)
