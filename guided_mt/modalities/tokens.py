"""Data without pixels: how x becomes tokens for the attention blocks, and E(x), a pass of the denoiser itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]  # x [B, ...] -> E(x) [B, C, H, W]
ENCODING_NORMS = ("none", "rms")


class LabelTokens(nn.Module):
    """Class ids [B], or probabilities [B, K] as the expected embedding -> one token [B, 1, width]."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, width))

    def forward(self, x: Tensor) -> Tensor:
        """Class ids [B], or probabilities [B, K], which get their expected embedding -> one token each, [B, 1, width]."""
        embedded = x.to(self.weight.dtype) @ self.weight if x.is_floating_point() else self.weight[x]
        return embedded[:, None]


class CaptionTokens(nn.Module):
    """Token ids [B, L], or what stands for embedded tokens [B, L, width], as the mean of them -> L tokens [B, L, width], each with
    the embedding of its position. What follows a caption's end is shown as it is (docs/method.md, section 10.10)."""

    def __init__(self, size: int, length: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width))
        self.positions = nn.Parameter(torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """ids [B, L], or embedded [B, L, width] -> [B, L, width]."""
        embedded = x.to(self.weight.dtype) if x.is_floating_point() else self.weight[x]
        return embedded + self.positions


class VectorTokens(nn.Module):
    """Vectors [B, D] -> one token [B, 1, width], by a linear map."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.linear = nn.Linear(size, width)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [B, size] -> one token each, [B, 1, width]."""
        return self.linear(x.to(self.linear.weight.dtype))[:, None]


class VectorAsToken(nn.Module):
    """Vectors [B, D] -> one token [B, 1, D] each: the vector as it is, where the network's context has its width.

    Nothing of it has to be learned, which suits a pretrained network: in form U nothing would teach a linear map, and a random one
    would only turn the vector (docs/method.md, section 10.9).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [B, D] -> [B, 1, D]."""
        return x[:, None]


def rescaled(encoding: Tensor, norm: str) -> Tensor:
    """`--mt_encoding_norm rms`: each sample's encoding at root mean square 1. Nothing in the paper fixes its scale."""
    if norm == "none":
        return encoding
    return encoding / rms(encoding).clamp(min=1e-6).view(-1, 1, 1, 1)


def rms(encoding: Tensor) -> Tensor:
    """Root mean square of each sample's encoding [B, C, H, W]: [B]."""
    return encoding.flatten(1).square().mean(dim=1).sqrt()
