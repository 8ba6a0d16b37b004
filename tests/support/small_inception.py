"""The evaluator without Inception: random features of 8x8 images in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluations import make_reference
from evaluations.features import features
from evaluations.scores import comparison

WIDTH = 12


class SmallBackend:
    """Linear maps and a ReLU."""

    name, software, path, sha256 = "small", "no software", Path("no.pth"), "0" * 64
    network_sha256 = "2" * 64
    calls = 0

    def __init__(self, args):
        rng = np.random.default_rng(0)
        self.pool, self.mapped = rng.standard_normal((2, 8 * 8 * 3, WIDTH))
        self.softmax_weight = rng.standard_normal((WIDTH, 10)).astype(np.float32)
        self.batch_size, self.workers = args.batch_size, args.workers

    def network(self, images):
        x = images.reshape(len(images), -1) / 64.0
        return np.maximum(x @ self.pool, 0).astype(np.float32), np.maximum(x @ self.mapped, 0).astype(np.float32)

    def features(self, images, what):
        SmallBackend.calls += 1
        return features.extract(images, self.network, self.batch_size, self.workers, what)


def use_small_backend(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the evaluator run on SmallBackend, with a cache folder of its own."""
    monkeypatch.setattr(comparison, "load_backend", SmallBackend)
    monkeypatch.setattr(make_reference, "load_backend", SmallBackend)
    monkeypatch.setattr(comparison, "POOL", WIDTH)
    monkeypatch.setattr(comparison, "SPATIAL", WIDTH)
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(cache))
    SmallBackend.calls = 0


def pixels(count: int, seed: int, brightness: int = 0, size: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 200, (count, size, size, 3)) + brightness).astype(np.uint8)
