"""Intervals of the timesteps, each one task of multi-task training (Go et al. 2023, "Addressing Negative Transfer in Diffusion
Models", ANT, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _uniform(abar: np.ndarray, count: int) -> np.ndarray:
    """Of equal length, to a timestep."""
    return np.arange(len(abar)) * count // len(abar)


def _snr(abar: np.ndarray, count: int) -> np.ndarray:
    """Those whose timesteps have the least squared distance in log SNR to their interval's middle timestep, summed over all."""
    seen = abar > 0
    log_snr = np.log(np.where(seen, abar, 1.0) / (1.0 - np.where(seen, abar, 0.5)))
    log_snr = np.where(seen, log_snr, log_snr[seen].min())  # pure noise: with the last timestep that has a signal
    return interval_clusters(log_snr, count)


# Each row: (abar_t [T], how many) -> the number of each timestep's interval, int64 [T], 0, ..., 0, 1, ...
INTERVALS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"uniform": _uniform, "snr": _snr}


def timestep_intervals(name: str, alphas_cumprod: np.ndarray, count: int) -> np.ndarray:
    """The interval of each timestep, int64 [T]. alphas_cumprod: abar_t [T].

    Raises ValueError for a name that is not in INTERVALS, and for more intervals than timesteps.
    """
    if name not in INTERVALS:
        raise ValueError(f"unknown intervals '{name}'; choose from {', '.join(INTERVALS)}")
    if not 1 <= count <= len(alphas_cumprod):
        raise ValueError(f"{count} intervals of {len(alphas_cumprod)} timesteps: take at most as many as these")
    return INTERVALS[name](np.asarray(alphas_cumprod, dtype=np.float64), count).astype(np.int64)


def interval_clusters(values: np.ndarray, count: int) -> np.ndarray:
    """Contiguous intervals l..r of values [T] with the least sum of squared distances to the values in their middles (l + r) // 2.

    Exact, by dynamic programming over the intervals' ends, in O(count T^2).
    """
    size = len(values)
    totals = np.append(0.0, np.cumsum(values)), np.append(0.0, np.cumsum(values**2))
    left, right = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    sums, squares = (total[right + 1] - total[left] for total in totals)
    middle = values[(left + right) // 2]
    cost = squares - 2 * middle * sums + (right - left + 1) * middle**2  # of the interval left..right
    cost[left > right] = np.inf
    best, choices = cost[0], []  # best[r]: of 0..r in so many intervals
    for _ in range(count - 1):
        of_last = np.append(np.inf, best[:-1])[:, None] + cost  # [first of the last interval, r]
        choices.append(of_last.argmin(axis=0))
        best = of_last.min(axis=0)
    starts, end = [], size - 1
    for choice in reversed(choices):
        starts.append(int(choice[end]))
        end = starts[-1] - 1
    found = np.zeros(size, dtype=np.int64)
    for start in starts:
        found[start:] += 1
    return found
