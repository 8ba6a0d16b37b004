"""The same for both sides: networks by a formula, images, noise, and the random weights of small networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.diffusion.random import SampleStreams

SHAPE = (2, 3, 8, 8)
SEEDS = [0, 1]
STEPS = 10
PROCESS: dict[str, Any] = {"steps": 1000, "learn_sigma": True, "noise_schedule": "cosine"}


def network(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    """An eps-network with learned variances, by a formula."""
    t = t.float().view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(0.3 * x + 0.001 * t), torch.cos(0.7 * x - 0.002 * t)], dim=1)


def eps_network(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return network(x, t)[:, : x.shape[1]]


def classifier(x: Tensor, t: Tensor) -> Tensor:
    """Logits of five classes, by a formula."""
    return 3.0 * x.flatten(1)[:, :5] - 0.001 * t.float().view(-1, 1)


def images(seed: int = 0) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normals(count: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """What our samplers draw for SEEDS: the start, then the noise of each step."""
    streams = SampleStreams(torch.tensor(SEEDS))
    return [streams.normal(*shape[1:]) for _ in range(count)]


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that no layer that starts at zero hides what is behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval()
