"""The Gaussian that AutoencoderKL makes of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior of a latent: mean and logvar [B, C, h, w], logvar within -30..20."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """The most likely latent, which is the mean."""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """noise: standard normal of the mean's shape; None draws it from torch's generator."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal in nats, summed over the latent: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(dim=1)

    def nll(self, sample: Tensor) -> Tensor:
        """-log density of `sample` in nats: [B]."""
        squared = (sample - self.mean).square() / self.logvar.exp()
        return 0.5 * (math.log(2.0 * math.pi) + self.logvar + squared).flatten(1).sum(dim=1)
