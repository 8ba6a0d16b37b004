"""Denoising Task Routing (Park et al. 2024): which channels a block computes on, by timestep and by task.

A residual block of C channels computes on a fixed window of `beta` C of them, and hands the others on as they are: with m the
window's mask, x m enters and block(x m) + x (1 - m) leaves. Near timesteps share more of their windows than far ones. There is
nothing to learn, so a network's weights and their names are the same with it and without.

The paper routes the blocks of a transformer. On a U-Net this is an adaptation: a block that changes the number of channels or the
size hands on what its own skip connection makes of x (1 - m), and in the decoder the window lies over all that enters a block, the
channels of the encoder's skip among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """Where each sample's windows lie: positions float64 [B], 0 at the first channels, 1 at the last; beta: their share of them."""

    positions: Tensor
    beta: float

    def mask(self, channels: int) -> Tensor:
        """1 in the window, else 0: bool [B, channels, 1, 1]. Made on the device, without a wait."""
        width = int(self.beta * channels)
        first = torch.round(self.positions * (channels - width))[:, None]
        channel = torch.arange(channels, device=first.device)
        return ((channel >= first) & (channel < first + width))[..., None, None]


@dataclass(frozen=True)
class Routing:
    """Windows of a network: alpha and beta of DTR; last: the timestep that it is told at t = T - 1; tasks: the modalities that it
    encodes.

    At timestep t a window begins at round((t / (T - 1))^alpha (1 - beta) C). A modality's encoding E(x) is a pass at time zero, as
    for the cleanest image. There, and this is ours, the i-th of n modalities has a window of its own, at the position i / n, i = 1
    ... n, so that it shares as little as can be with the image's fine detail.
    """

    alpha: float
    beta: float
    last: float
    tasks: tuple[str, ...] = ()

    def of_timesteps(self, timesteps: Tensor) -> Route:
        """The route of samples at these timesteps [B], as the network is told them."""
        return Route((timesteps.double() / self.last).clamp(0, 1) ** self.alpha, self.beta)

    def of_task(self, name: str, like: Tensor) -> Route:
        """The route of the encoder's pass for a modality, for as many samples as `like` has, on its device."""
        position = (self.tasks.index(name) + 1) / len(self.tasks)
        return Route(torch.full((len(like),), position, dtype=torch.float64, device=like.device), self.beta)


# {name of --mt_routing: (alpha, beta, last, tasks) -> the routing}; None: every block computes on all channels.
ROUTINGS: dict[str, Callable[[float, float, float, tuple[str, ...]], Routing] | None] = {"none": None, "dtr": Routing}
