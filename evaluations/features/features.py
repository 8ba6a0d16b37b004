"""From images to what the scores need: the pool features of every image, and mean and covariance of the spatial ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from ..errors import EvaluationError
from ..files.images import ImageSet
from .moments import Moments, Statistics, statistics

POOL = 2048
SPATIAL_CHANNELS = 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Network(Protocol):
    """An Inception network: uint8 [B, H, W, 3] -> pool features [B, 2048], spatial features [B, 17 * 17 * 7], float32."""

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, 3] -> (pooled features [B, 2048], spatial features [B, 2023]), float32."""


@dataclass
class Features:
    """Of one set of images. `pool` [N, 2048] float32; statistics of `pool` and of the spatial features."""

    pool: np.ndarray
    pool_statistics: Statistics
    spatial_statistics: Statistics

    def save(self, path: Path) -> None:
        """Write an .npz; what `load` reads."""
        (mu, sigma), (mu_s, sigma_s) = self.pool_statistics, self.spatial_statistics
        with open(path, "wb") as file:
            np.savez(file, pool=self.pool, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["pool"], Statistics(file["mu"], file["sigma"]), Statistics(file["mu_s"], file["sigma_s"]))


def extract(images: ImageSet, network: Network, batch_size: int, workers: int, what: str) -> Features:
    """Run `network` over `images`, in order. `what` names them in the progress bar.

    Raises EvaluationError where a feature is not finite.
    """
    pool, spatial, done = np.empty((0, 0)), Moments(), 0
    with tqdm(total=images.count, unit="img", desc=what) as bar:
        for batch in images.batches(batch_size, workers):
            pooled, mapped = network(batch)
            if not (np.isfinite(pooled).all() and np.isfinite(mapped).all()):
                raise EvaluationError(
                    f"{images.path}: features of images {done} to {done + len(batch) - 1} are not finite; are the weights right?"
                )
            if not done:
                pool = np.empty((images.count, pooled.shape[1]), dtype=np.float32)
            pool[done : done + len(batch)] = pooled
            spatial.update(mapped)
            done += len(batch)
            bar.update(len(batch))
    return Features(pool, statistics(pool), spatial.statistics())
