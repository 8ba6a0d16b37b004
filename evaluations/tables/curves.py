"""A score against the training step over several seeds: mean and range, as Figure 6 compares two ways of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import EvaluationError
from .figures import new_figure, save_figure


class Curve(NamedTuple):
    """Values float64 [S, R] of R seeds at S steps."""

    steps: list[int]
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean over seeds at each step."""
        return self.values.mean(axis=1)


def common_curve(runs: Sequence[Mapping[int, float]]) -> Curve:
    """From {step: value} of each seed, the steps that all of them have. Raises EvaluationError where there is none."""
    steps = sorted(set(runs[0]).intersection(*runs[1:]))
    if not steps:
        raise EvaluationError(f"{len(runs)} runs have no training step in common; give them the same --eval_interval")
    return Curve(steps, np.array([[run[step] for run in runs] for step in steps], dtype=np.float64))


def first_at_least(curve: Curve, value: float) -> int | None:
    """The first step whose mean is `value` or more."""
    return next((step for step, mean in zip(curve.steps, curve.mean, strict=True) if mean >= value), None)


def describe(name: str, curve: Curve) -> str:
    """A line that says where the curve starts and where it ends."""
    last, seeds = curve.values[-1], curve.values.shape[1]
    spread = f" ({last.min():.4f} to {last.max():.4f} over {seeds} seeds)" if seeds > 1 else ""
    first = f"{curve.mean[0]:.4f} at step {curve.steps[0]}"
    return f"{name}: {first}, {curve.mean[-1]:.4f}{spread} at step {curve.steps[-1]}"


def plot_curves(curves: Mapping[str, Curve], path: Path, label: str) -> None:
    """The mean over seeds as a line, their range as a band; label: of the vertical axis."""
    figure, axes = new_figure(6.4, 4.2)
    most = max(curve.values.shape[1] for curve in curves.values())
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(curve.steps, curve.mean, color=f"C{i % 10}", marker="o", markersize=3.5, label=name)
        low, high = curve.values.min(axis=1), curve.values.max(axis=1)
        axes.fill_between(curve.steps, low, high, color=f"C{i % 10}", alpha=0.2, linewidth=0)
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.set_title(f"mean of {most} seeds, band: their range" if most > 1 else "one seed", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
