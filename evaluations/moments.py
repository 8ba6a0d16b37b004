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
        self.chunk, self.count, self._waiting = chunk, 0, []
        self._mean = self._scatter = None

    def update(self, x: np.ndarray) -> None:
        """Add rows [B, D]."""
        while len(x):
            free = self.chunk - sum(map(len, self._waiting))
            self._waiting.append(np.array(x[:free], dtype=np.float64))
            x = x[free:]
            if sum(map(len, self._waiting)) == self.chunk:
                self._merge()

    def _merge(self) -> None:
        x, self._waiting = np.concatenate(self._waiting), []
        mean = x.mean(axis=0)
        centred = x - mean
        scatter = centred.T @ centred
        if self.count:
            delta, total = mean - self._mean, self.count + len(x)
            scatter += np.outer(delta, delta) * (self.count * len(x) / total)
            self._mean += delta * (len(x) / total)
            self._scatter += scatter
        else:
            self._mean, self._scatter = mean, scatter
        self.count += len(x)

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
