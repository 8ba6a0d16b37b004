"""Saving matplotlib figures, which only those who ask for one need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
