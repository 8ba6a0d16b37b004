"""Images with a label whose best network is known in closed form: the categorical counterpart of `gaussian.py`.

z_0 | label k ~ N(mean_k, cov_k), E(k) = table[k] and z_t = a z_0 + b E(k) + s eps with a = sqrt(abar_t), b = alpha-tilde_t and
s = sqrt(1 - abar_t); so z_t | k ~ N(a mean_k + b E(k), abar_t cov_k + s^2 I). All float64, and differentiable in z_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.modalities import LabelModality


@dataclass
class LabelledMixture:
    """probabilities [K], means [K, d], covs [K, d, d], table [K, C, H, W] with C H W = d; float64."""

    probabilities: Tensor
    means: Tensor
    covs: Tensor
    table: Tensor

    @classmethod
    def make(cls, shape: Sequence[int], probabilities: Sequence[float], seed: int, apart: float) -> LabelledMixture:
        """Random covariances of trace about d / 8, orthogonal means of length `apart`, encodings of unit variance."""
        rng, count, d = np.random.default_rng(seed), len(probabilities), int(np.prod(shape))
        roots = rng.normal(size=(count, d, d)) / np.sqrt(d)
        covs = 0.1 * roots @ roots.transpose(0, 2, 1) + 0.02 * np.eye(d)
        means = apart * np.linalg.qr(rng.normal(size=(d, count)))[0].T
        arrays = np.array(probabilities), means, covs, rng.normal(size=(count, *shape))
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def __post_init__(self):
        self.values, vectors = torch.linalg.eigh(self.covs)  # covs = vectors diag(values) vectors^T
        self.into = vectors.permute(1, 0, 2).flatten(1)  # (d, K d): every component's axes side by side
        self.axes = lambda x: torch.einsum("kd,kde->ke", x, vectors)

    def __len__(self) -> int:
        return len(self.probabilities)

    def modality(self, name: str = "label") -> LabelModality:
        """The package's own, with the table as its encoder."""
        label = LabelModality(len(self), name=name)
        label.encoder = self.encode
        return label

    def encode(self, x: Tensor) -> Tensor:
        """Ids [B], or probabilities [B, K] as the expected encoding -> [B, C, H, W]."""
        p = x.double() if x.is_floating_point() else F.one_hot(x, len(self)).double()
        return torch.einsum("bk,k...->b...", p, self.table)

    def components(self, state: Tensor, abar: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """For state [B, C, H, W] and abar, b [B]: log p(state, k) up to a constant [B, K], and E[eps | state, k] in the axes of
        each component's covariance [B, K, d]."""
        log_joint, eps, _ = self.posteriors(state, abar, b)
        return log_joint, eps

    def posteriors(self, state: Tensor, abar: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `components` says, and E[z_0 | state, k] in the same axes [B, K, d]."""
        abar, b = abar.view(-1, 1, 1), b.view(-1, 1, 1)
        centres = abar.sqrt() * self.axes(self.means) + b * self.axes(self.table.flatten(1))
        residual = (state.flatten(1).double() @ self.into).view(centres.shape) - centres
        variance = abar * self.values + 1 - abar
        log_joint = self.probabilities.log() - 0.5 * (residual**2 / variance + variance.log()).sum(-1)
        z_0 = self.axes(self.means) + abar.sqrt() * self.values * residual / variance
        return log_joint, (1 - abar).sqrt() * residual / variance, z_0

    def network(self, diffusion: GaussianDiffusion, name: str = "label") -> Callable:
        """The best network of every form for the full process `diffusion` and its target, called as `MTModel` is.

        A given label has left the frame, one that isn't given stands in it (if `diffusion` has weights for it), and a
        `unconditional` sample, or one whose label is `absent`, has neither."""
        abars = torch.from_numpy(diffusion.alphas_cumprod)
        bs = torch.from_numpy(diffusion.aggregation.coefficients.get(name, np.zeros(diffusion.num_timesteps)))

        def network(z_t, t, modalities, unconditional=None, absent=None):
            alone = torch.zeros(len(z_t), dtype=torch.bool) if unconditional is None else unconditional
            alone = alone | absent[name] if absent else alone
            framed = ~alone if name not in modalities else torch.zeros_like(alone)
            log_joint, *each = self.posteriors(z_t, abars[t], bs[t] * framed)
            weights = log_joint.softmax(-1)
            y = z_t - (bs[t] * framed).view(-1, 1, 1, 1) * self.encode(weights)
            if name in modalities:
                weights = torch.where(alone[:, None], weights, F.one_hot(modalities[name], len(self)).double())
            eps, z_0 = (((weights[..., None] * mean).flatten(1) @ self.into.T).view(z_t.shape) for mean in each)
            return ModelOutput(diffusion.target.wanted(diffusion, z_0, eps, y, t), {name: log_joint})

        return network

    def classifier(self, diffusion: GaussianDiffusion) -> Callable:
        """The best noisy classifier (y_t, t) -> logits [B, K]."""
        abars = torch.from_numpy(diffusion.alphas_cumprod)
        return lambda y_t, t: self.components(y_t, abars[t], torch.zeros(len(t), dtype=torch.float64))[0]

    def nearest(self, z_0: Tensor) -> Tensor:
        """The most probable component of clean data [B]."""
        ones = torch.ones(len(z_0), dtype=torch.float64)
        return self.components(z_0, ones, 0 * ones)[0].argmax(-1)
