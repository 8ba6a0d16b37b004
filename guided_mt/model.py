"""The denoiser of MT-Diffusion: ADM's U-Net, a decoder head per modality, and the inputs of form X (DESIGN 2.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gaussian_diffusion import ModelOutput
from .heads import HeadVariance
from .unet import UNetModel

__all__ = ["MTModel", "ModelOutput"]

VARIANTS = ("U", "X")


class MTModel(UNetModel):
    """(z_t, t, modalities) -> ModelOutput. Its state dict is ADM's plus `heads.*`, `condition_in.*` and `head_variance.*`.

    heads: {modality name: function of this U-Net that makes the head}. variant "U" sees z_t alone; "X" is also given every
    modality, concatenated to its input (then z_t is y_t, since a given modality leaves the frame).
    condition_names: the modalities that make up `condition`, in this order. num_timesteps: T of training, for the heads'
    variances. The rest are the U-Net's keywords.
    """

    def __init__(
        self,
        *,
        heads: Mapping[str, Callable[[UNetModel], nn.Module]],
        condition_names: Sequence[str] = (),
        variant: str = "U",
        num_timesteps: int = 1000,
        **unet: Any,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant '{variant}'; choose from {', '.join(VARIANTS)}")
        super().__init__(**unet)
        self.variant = variant
        self.condition_names = tuple(condition_names)
        self.heads = nn.ModuleDict({name: make(self) for name, make in heads.items()})
        self.head_variance = nn.ModuleDict({name: HeadVariance(num_timesteps) for name in heads})

    def forward(
        self, z_t: Tensor, timesteps: Tensor, modalities: Mapping[str, Tensor] | None = None, y: Tensor | None = None
    ) -> ModelOutput:
        """z_t [B, C, H, W], timesteps [B], modalities {name: x} exactly those of form X (none in form U), y [B] class ids."""
        given = modalities or {}
        if set(given) != set(self.condition_names):
            wanted = ", ".join(self.condition_names) or "no modality"
            raise ValueError(f"variant {self.variant} is given {wanted}; got {', '.join(given) or 'none'}")
        condition = torch.cat([given[name] for name in self.condition_names], dim=1) if given else None
        features = self.features(z_t, timesteps, y, condition=condition)
        return ModelOutput(self.output(features), {name: head(features) for name, head in self.heads.items()})
