"""Means and covariances of features that arrive in batches, in float64. Needs numpy alone, so TensorFlow's process uses it too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import EvaluationError

CHUNK = 2048  # rows


class Statistics(NamedTuple):
    """mu [D] and sigma [D, D] (unbiased), float64."""

    mu: np.ndarray
    sigma: np.ndarray

    def save(self, path: Path) -> None:
        """Write an .npz; what `load` reads."""
        with open(path, "wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["mu"], file["sigma"])


class Moments:
    """Mean and covariance of rows that come in batches, none of which is kept.

    Sums of x - shift and of its products, where shift is the mean of the first chunk, so that nothing large cancels (Chan, Golub
    and LeVeque 1983). Rows are added in chunks of fixed size, so the result doesn't depend on the size of the batches.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk, self.count = chunk, 0
        self._rows, self._waiting = np.empty((0, 0)), 0
        self._shift = self._sum = self._products = np.zeros(0)

    def update(self, x: np.ndarray) -> None:
        """Add rows [B, D]."""
        if not self.count and not self._waiting:
            width = x.shape[1]
            self._rows = np.empty((self.chunk, width))
            self._shift, self._sum, self._products = np.zeros(width), np.zeros(width), np.zeros((width, width))
        while len(x):
            taken = min(len(x), self.chunk - self._waiting)
            # The first chunk's shift is not known yet: `_add` moves it.
            np.subtract(x[:taken], self._shift, out=self._rows[self._waiting : self._waiting + taken])
            self._waiting += taken
            x = x[taken:]
            if self._waiting == self.chunk:
                self._add()

    def _add(self) -> None:
        rows = self._rows[: self._waiting]
        if not self.count:
            self._shift = rows.mean(axis=0)
            rows -= self._shift
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows
        self.count, self._waiting = self.count + len(rows), 0

    def statistics(self) -> Statistics:
        """Of all rows so far. Raises EvaluationError for fewer than two."""
        if self._waiting:
            self._add()
        if self.count < 2:
            raise EvaluationError(f"a covariance needs at least two images, found {self.count}")
        mean = self._sum / self.count
        return Statistics(self._shift + mean, (self._products - np.outer(self._sum, mean)) / (self.count - 1))


def statistics(features: np.ndarray) -> Statistics:
    """Mean and unbiased covariance of features [N, D], without a float64 copy of them."""
    moments = Moments()
    for start in range(0, len(features), CHUNK):
        moments.update(features[start : start + CHUNK])
    return moments.statistics()
