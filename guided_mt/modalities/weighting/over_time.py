"""Weights of each term over the timesteps: fixed factors, or an uncertainty that is learned (docs/method.md, section 7.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...diffusion.process import GaussianDiffusion
from ...diffusion.weighting import LEARNED, timestep_weights
from ...networks.layers import timestep_embedding

IMAGE = "denoising"  # the image's term, as the log calls it
CHANNELS = 128  # of u(t), EDM2's logvar_channels
SCALE = 1000.0  # what u(t) sees t on


class Uncertainty(nn.Module):
    """u(t) of EDM2 (Karras et al. 2024, eq. 14 to 16): one linear layer on sinusoids of t, 0 for all t at first.

    A term L becomes L / exp(u(t)) + u(t). It is least where u(t) = log E[L at t], so every timestep comes to contribute alike.
    EDM2's layer reads random Fourier features of log sigma.
    """

    def __init__(self, num_timesteps: int):
        super().__init__()
        self.scale = SCALE / num_timesteps
        self.linear = nn.Linear(CHANNELS, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """u(t) [B] of timesteps t [B]."""
        return self.linear(timestep_embedding(t * self.scale, CHANNELS))[:, 0]

    def weighted(self, values: Tensor, t: Tensor) -> Tensor:
        """L / exp(u) + u for values L [B] at t [B]."""
        u = self(t)
        return values * torch.exp(-u) + u


class OverTime(nn.Module):
    """rows {term: a name of TIMESTEP_WEIGHTS}, of IMAGE and of each modality, on the timesteps of `diffusion`.

    A head predicts x, as a network may predict z_0, so a modality's factors are those for z_0. The image's own fixed factors are in
    the process's losses; only a learned one is applied here.
    """

    def __init__(self, rows: Mapping[str, str], diffusion: GaussianDiffusion):
        super().__init__()
        self.rows = dict(rows)
        steps = diffusion.num_timesteps
        self.learned = nn.ModuleDict({name: Uncertainty(steps) for name, row in self.rows.items() if row == LEARNED})
        tables = {name: timestep_weights(row, diffusion.alphas_cumprod, "x0") for name, row in self.rows.items()}
        self.fixed = [name for name, row in self.rows.items() if name != IMAGE and (tables[name] != 1).any()]
        if self.fixed:
            table = torch.stack([torch.from_numpy(tables[name]).float() for name in self.fixed])
            self.register_buffer("table", table, persistent=False)  # [fixed, T]

    def image(self, losses: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """The image's loss [B] at t [B]; losses: those of `GaussianDiffusion.training_losses`. u(t) is that of the squared (or
        absolute) error: the bound that teaches the variances stays as it is."""
        if IMAGE not in self.learned:
            return losses["loss"]
        error = losses["mse"] if "mse" in losses else losses["l1"]
        weighted = self._uncertainty(IMAGE).weighted(error, t)
        return weighted + losses["vb"] if "vb" in losses else weighted

    def modality(self, name: str, values: Tensor, t: Tensor) -> Tensor:
        """The term [B] of a modality at t [B], weighed."""
        if name in self.learned:
            return self._uncertainty(name).weighted(values, t)
        if name in self.fixed:
            return self.table[self.fixed.index(name)][t] * values  # type: ignore[index]  # a buffer
        return values

    def _uncertainty(self, name: str) -> Uncertainty:
        return self.learned[name]  # type: ignore[return-value]
