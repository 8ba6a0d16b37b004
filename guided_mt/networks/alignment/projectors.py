"""What is aligned, and how: REPA (Yu et al. 2025) and iREPA (Singh et al. 2025).

loss = mean over positions of (1 - cos(projector(middle features), encoder(clean image)))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # beside a standard deviation


def mlp(channels: int, width: int, out_channels: int) -> nn.Module:
    """REPA's projector: at each position by itself, three layers with SiLU between them. [B, channels, h, w] -> [B, out_channels,
    h, w]."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, out_channels, 1),
    )


def convolution(channels: int, width: int, out_channels: int) -> nn.Module:
    """iREPA's projector: one 3x3 convolution, which keeps what lies where. It has no `width`."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def unchanged(features: Tensor, gamma: float) -> Tensor:
    """The encoder's features as they are."""
    return features


def spatially_normalised(features: Tensor, gamma: float) -> Tensor:
    """(x - gamma * mean) / std of features [B, C, h, w], mean and standard deviation over the positions of each channel.

    What all positions share is taken off, since it says nothing of the image's structure; gamma: how much of it (iREPA)."""
    mean = features.mean(dim=(2, 3), keepdim=True)
    return (features - gamma * mean) / (features.std(dim=(2, 3), keepdim=True) + EPSILON)


@dataclass(frozen=True)
class AlignmentRow:
    """projector: (middle channels, width, the encoder's channels) -> the untrained module. target: (the encoder's features, gamma)
    -> what is to be predicted. least_positions: of the encoder's map."""

    projector: Callable[[int, int, int], nn.Module]
    target: Callable[[Tensor, float], Tensor] = unchanged
    least_positions: int = 1


# {name of --align: how}; None: nothing is aligned.
ALIGNMENTS: dict[str, AlignmentRow | None] = {
    "none": None,
    "repa": AlignmentRow(mlp),
    "irepa": AlignmentRow(convolution, spatially_normalised, least_positions=2),
}


def misalignment(projected: Tensor, target: Tensor) -> Tensor:
    """[B] in 0..2: mean over positions of 1 - cosine of projected [B, C, h, w] and target [B, C, H, W], which is interpolated to
    h x w, averaging where it has more positions."""
    if target.shape[2:] != projected.shape[2:]:
        target = F.interpolate(target, projected.shape[2:], mode="bilinear", align_corners=False, antialias=True)
    return (1 - F.cosine_similarity(projected, target, dim=1)).mean(dim=(1, 2))
