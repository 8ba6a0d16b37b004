"""Decoder heads D_i: what the network says of each modality, from the U-Net's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .unet import UNetFeatures, UNetModel, make_output_block


class ImageHead(nn.Module):
    """A copy of ADM's output block (norm, SiLU, convolution) on the last features: [B, channels, H, W]."""

    def __init__(self, unet: UNetModel, channels: int = 3):
        super().__init__()
        self.out = make_output_block(unet.feature_channels, unet.input_channels, channels)

    def forward(self, features: UNetFeatures) -> Tensor:
        # float32 whatever the caller's autocast, as ADM's output
        with torch.autocast(features.last.device.type, enabled=False):
            return self.out(features.last)


class HeadVariance(nn.Module):
    """v_t: the mean squared error of a continuous head at each timestep, tracked while training (DESIGN 2.5).

    Two running sums per timestep, which forget with `decay` per sample seen there, so that early errors fade.
    """

    def __init__(self, num_timesteps: int, decay: float = 0.98):
        super().__init__()
        self.decay = decay
        self.register_buffer("error_sum", torch.zeros(num_timesteps))
        self.register_buffer("error_count", torch.zeros(num_timesteps))

    @torch.no_grad()
    def update(self, t: Tensor, error: Tensor, weight: Tensor) -> None:
        """error [B]: mean squared errors at timesteps t [B]; weight [B]: 0 leaves a sample out."""
        weight = weight * torch.isfinite(error)
        seen = torch.zeros_like(self.error_count).index_add_(0, t, weight)
        forget = self.decay**seen
        self.error_sum.mul_(forget).index_add_(0, t, torch.nan_to_num(error) * weight)
        self.error_count.mul_(forget).add_(seen)

    def value(self) -> Tensor:
        """v_t [T], smoothed over 1 % of the timesteps to each side (a single timestep is seen too rarely to stand alone).

        Raises ValueError before the first update.
        """
        if not self.error_count.any():
            raise ValueError("no head variance was tracked: the model has not been trained with this head")
        radius = max(1, len(self.error_sum) // 100)
        sums, counts = self.error_sum.double(), self.error_count.double()
        window = torch.ones(1, 1, 2 * radius + 1, dtype=torch.float64, device=sums.device)
        while True:
            smooth = torch.nn.functional.conv1d(
                torch.stack([sums, counts])[:, None], window, padding=window.shape[-1] // 2
            )
            if (smooth[1] > 0).all():
                return (smooth[0] / smooth[1]).clamp(min=1e-6).flatten().float()
            window = torch.ones(1, 1, 2 * window.shape[-1] + 1, dtype=torch.float64, device=sums.device)
