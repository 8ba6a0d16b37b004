"""LDM's stage of image-like conditions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from guided_mt.errors import UserError, nearest

from .base import Stage

RESCALING = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class SpatialRescaler(Stage):
    """[B, in_channels, H, W] -> [B, out_channels, H m^n, W m^n]: n_stages resizings by `multiplier`, then a 1x1 convolution.

    Without out_channels there is no convolution. method: one of RESCALING (torch's names of interpolations).
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if n_stages < 0 or multiplier <= 0:
            raise UserError(f"n_stages {n_stages} and multiplier {multiplier}: take at least 0 and more than 0")
        if method not in RESCALING:
            raise UserError(f"method '{method}' is none of {', '.join(RESCALING)}{nearest(method, RESCALING)}")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.in_channels = in_channels
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Condition [B, in_channels, H, W] -> rescaled `n_stages` times, its channels mapped where asked. Raises UserError."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"expected a condition of shape [B, {self.in_channels}, H, W], got {list(x.shape)}")
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if hasattr(self, "channel_mapper") else x
