"""Means and covariances of features that arrive in batches, in float64. Needs numpy alone, so TensorFlow's process uses it too."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import EvaluationError

CHUNK = 2048  # rows


class Statistics(NamedTuple):
    """mu [D] and sigma [D, D] (unbiased), float64."""

    mu: np.ndarray
    sigma: np.ndarray


class Moments:
    """Mean and covariance of rows that come in batches, none of which is kept (Chan, Golub and LeVeque 1983).

    Rows are merged in chunks of fixed size, so the result doesn't depend on the size of the batches.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk, self.count = chunk, 0
        self._rows, self._waiting = np.empty((0, 0)), 0
        self._mean = self._scatter = np.zeros(0)

    def update(self, x: np.ndarray) -> None:
        """Add rows [B, D]."""
        if not self.count and not self._waiting:
            width = x.shape[1]
            self._rows = np.empty((self.chunk + 1, width))
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        while len(x):
            taken = min(len(x), self.chunk - self._waiting)
            self._rows[self._waiting : self._waiting + taken] = x[:taken]
            self._waiting += taken
            x = x[taken:]
            if self._waiting == self.chunk:
                self._merge()

    def _merge(self) -> None:
        n, total = self._waiting, self.count + self._waiting
        rows = self._rows[: n + 1]
        mean = rows[:n].mean(axis=0)
        rows[:n] -= mean
        # The means differ by delta, which adds count n / total delta delta' to the scatter: one more row of the product.
        delta = mean - self._mean
        rows[n] = delta * np.sqrt(self.count * n / total)
        self._scatter += rows.T @ rows
        self._mean += delta * (n / total)
        self.count, self._waiting = total, 0

    def statistics(self) -> Statistics:
        """Of all rows so far. Raises EvaluationError for fewer than two."""
        if self._waiting:
            self._merge()
        if self.count < 2:
            raise EvaluationError(f"a covariance needs at least two images, found {self.count}")
        return Statistics(self._mean.copy(), self._scatter / (self.count - 1))


def statistics(features: np.ndarray) -> Statistics:
    """Mean and unbiased covariance of features [N, D], without a float64 copy of them."""
    moments = Moments()
    for start in range(0, len(features), CHUNK):
        moments.update(features[start : start + CHUNK])
    return moments.statistics()
