"""The network of a latent model: LDM's U-Net with guided_mt's heads, under LDM's ways of conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.diffusion.network import ModelOutput
from guided_mt.errors import UserError
from guided_mt.networks.heads import HeadVariance, ImageHead
from guided_mt.networks.model import MTModel

from ..runs.targets import arguments
from .modalities import PAIRED, SWAPPED
from .unet import UNetModel, unet_options


class DiffusionWrapper(nn.Module):
    """The network with LDM's ways of conditioning (its `DiffusionWrapper`; the name gives the `diffusion_model.*` entries).

    conditioning_key: None, "concat" (channels beside z_t), "crossattn" (tokens), "hybrid" (both) or "adm" (classes).
    """

    KEYS = (None, "concat", "crossattn", "hybrid", "adm")

    def __init__(self, diffusion_model: MTModel, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in self.KEYS:
            known = ", ".join(str(key) for key in self.KEYS)
            raise UserError(f"model.params.conditioning_key '{conditioning_key}' is none of {known}")
        self.diffusion_model, self.conditioning_key = diffusion_model, conditioning_key

    def forward(
        self,
        z_t: Tensor,
        timesteps: Tensor,
        modalities: Mapping[str, Tensor],
        *,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        **options: Any,
    ) -> ModelOutput:
        """z_t [B, C, h, w], timesteps [B]; c_concat [B, C', h, w]; c_crossattn tokens [B, L, width]; options: as MTModel's."""
        # `unconditional` doubles the batch when guidance is on; LDM's conditions are the same in both halves.
        repeats = 1 if c_concat is None and c_crossattn is None else len(z_t) // len(_first(c_concat, c_crossattn))
        if c_concat is not None:
            z_t = torch.cat([z_t, c_concat.repeat(repeats, 1, 1, 1)], dim=1)
        if c_crossattn is not None:
            options["context"] = c_crossattn.repeat(repeats, 1, 1)
        if options.get("y") is not None:
            options["y"] = options["y"].repeat(len(z_t) // len(options["y"]))
        return self.diffusion_model(z_t, timesteps, modalities, **options)


def _first(*tensors: Tensor | None) -> Tensor:
    return next(x for x in tensors if x is not None)


def build_network(
    unet_config: Mapping[str, Any], channels: int, *, paired: bool, both_roles: bool, variant: str, timesteps: int
) -> MTModel:
    """The U-Net that `unet_config` describes, for latents of `channels` channels.

    paired: with a head and, as the form `variant` asks, inputs for the modality PAIRED. both_roles: with a class that tells which
    side is z_0. timesteps: T. Raises UserError for what is no U-Net and for classes where the role takes their place.
    """
    cls, keywords = arguments(unet_config, "model.params.unet_config")
    if cls is not UNetModel:
        raise UserError(f"model.params.unet_config: {unet_config['target']} is no U-Net")
    if both_roles:
        if keywords.get("num_classes") is not None:
            raise UserError(
                "model.params.unet_config.num_classes: taken by mt_swap_prob, which tells the role as a class"
            )
        keywords["num_classes"] = 2
    options = unet_options(**keywords)
    network = MTModel(
        heads={PAIRED: lambda unet: ImageHead(unet, channels)} if paired else {},
        image_inputs={PAIRED: channels} if paired else {},
        tracked=(PAIRED,) if paired else (),
        variant=variant if paired else "U",
        num_timesteps=timesteps,
        conditioned=options["context_dim"] is not None,
        **options,
    )
    if both_roles and variant == "U":
        # Own head divides by the head's squared error, which is larger in the direction that leaves more open.
        network.head_variance[SWAPPED] = HeadVariance(timesteps)
    return network


def check_channels(network: MTModel, embed_dim: int | None, channels: int, conditioning_key: str | None) -> None:
    """Raises UserError where first stage (embed_dim), U-Net and `channels` don't fit."""
    if embed_dim is not None and embed_dim != channels:
        raise UserError(
            f"the first stage makes latents of {embed_dim} channels (embed_dim), but model.params.channels is {channels}"
        )
    extra = network.in_channels - channels
    concatenated = conditioning_key in ("concat", "hybrid")
    if network.out_channels != channels or extra < 0 or (extra and not concatenated):
        raise UserError(
            f"unet_config: in_channels {network.in_channels} and out_channels {network.out_channels} don't fit latents of "
            f"{channels} channels (in_channels may be more only for a concatenated condition)"
        )
