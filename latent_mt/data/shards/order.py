"""The order of samples in shards: shards shuffled, and samples within a window of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from guided_mt.data.dataset import SHARDS, WINDOW, random_words

_KEPT = 3  # permutations of windows held at a time


class _Window(NamedTuple):
    numbers: np.ndarray  # int64 [n], the items of the window in the order in which they come
    start: int  # their first place in the epoch


class WindowOrder:
    """The item at each position p of an endless stream over shards of `counts` samples, numbered on from shard to shard.

    Of epoch p // N the shards are permuted, and cut into windows of `window` shards; the samples of a window are permuted
    together. Each item comes once per epoch, and only two or three windows are open at a time. Both permutations are functions of
    seed and epoch, and so is the item of the position: no other state is needed to go on.
    """

    def __init__(self, counts: np.ndarray, seed: int, window: int):
        self.counts, self.seed, self.window = np.asarray(counts, np.int64), seed, window
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # the number of each shard's first item
        self.n = int(self.starts[-1])
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # epoch: shards in order, where windows begin
        self._windows: dict[tuple[int, int], _Window] = {}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers [b] for global sample positions [b], both int64."""
        positions = np.asarray(positions, dtype=np.int64)
        result = np.empty_like(positions)
        epochs, within = np.divmod(positions, self.n)
        for epoch in np.unique(epochs).tolist():
            bounds = self._epoch(epoch)[1]
            windows = np.searchsorted(bounds, within, side="right") - 1
            for window in np.unique(windows[epochs == epoch]).tolist():
                chosen = (epochs == epoch) & (windows == window)
                found = self._window(epoch, window)
                result[chosen] = found.numbers[within[chosen] - found.start]
        return result

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the shards in the order of this epoch, the place in the epoch at which each window begins)."""
        if epoch not in self._shards:
            while len(self._shards) >= 2:
                del self._shards[next(iter(self._shards))]
            shards = np.argsort(random_words(SHARDS, self.seed, epoch, len(self.counts)), kind="stable")
            places = np.concatenate([[0], np.cumsum(self.counts[shards])])
            self._shards[epoch] = shards, places[:-1][:: self.window]
        return self._shards[epoch]

    def _window(self, epoch: int, window: int) -> _Window:
        if (epoch, window) not in self._windows:
            while len(self._windows) >= _KEPT:
                del self._windows[next(iter(self._windows))]
            shards, bounds = self._epoch(epoch)
            own = shards[window * self.window : (window + 1) * self.window]
            numbers = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in own])
            words = random_words(WINDOW, self.seed, epoch * len(bounds) + window, len(numbers))
            shuffled = numbers[np.argsort(words, kind="stable")]
            self._windows[epoch, window] = _Window(shuffled, int(bounds[window]))
        return self._windows[epoch, window]
