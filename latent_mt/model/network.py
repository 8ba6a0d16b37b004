"""The network of a latent model: a U-Net or a transformer with guided_mt's heads, under LDM's ways of conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.errors import UserError
from guided_mt.generation.build import multi_task_options
from guided_mt.modalities import Space
from guided_mt.modalities.settings import roles_of
from guided_mt.networks.multi_task import MultiTask
from guided_mt.runs.config import Config

from .backbones import Described


class DiffusionWrapper(nn.Module):
    """The network with LDM's ways of conditioning (its `DiffusionWrapper`; the name gives the `diffusion_model.*` entries).

    conditioning_key: None, "concat" (channels beside z_t), "crossattn" (tokens), "hybrid" (both) or "adm" (classes). Where no
    class is given, a network with a null class sees that one.
    """

    KEYS = (None, "concat", "crossattn", "hybrid", "adm")

    def __init__(self, diffusion_model: MultiTask, conditioning_key: str | None):
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
        c_unconditional: Tensor | None = None,
        **options: Any,
    ) -> ModelOutput:
        """z_t [B, C, h, w], timesteps [B]; c_concat [B, C', h, w]; c_crossattn tokens [B, L, width]; c_unconditional [1, L, width]
        those of the samples that are `unconditional`; options: as MultiTask's."""
        # `unconditional` doubles the batch when guidance is on; LDM's conditions are the same in both halves.
        repeats = 1 if c_concat is None and c_crossattn is None else len(z_t) // len(_first(c_concat, c_crossattn))
        if c_concat is not None:
            z_t = torch.cat([z_t, c_concat.repeat(repeats, 1, 1, 1)], dim=1)
        if c_crossattn is not None:
            options["context"] = c_crossattn.repeat(repeats, 1, 1)
        if c_unconditional is not None:
            options["unconditional_context"] = c_unconditional.expand(len(z_t), -1, -1)
        if options.get("y") is not None:
            options["y"] = options["y"].repeat(len(z_t) // len(options["y"]))
        elif self.diffusion_model.has_null_class:
            options["y"] = torch.full((len(z_t),), -1, device=z_t.device)
        return self.diffusion_model(z_t, timesteps, modalities, **options)


def _first(*tensors: Tensor | None) -> Tensor:
    return next(x for x in tensors if x is not None)


def build_network(found: Described, config: Config, process: GaussianDiffusion, space: Space) -> MultiTask:
    """The described network with the heads and inputs of the modalities of `config`, for latents of `space`.

    process: on all timesteps. Raises UserError as `Described.build` does.
    """
    roles = roles_of(config)
    parts = multi_task_options(config, process, space)
    return found.build(space.size, len(roles.sides) if roles.told else 0, config.mt_context_dim, **parts)


def check_channels(
    network: MultiTask, learn_sigma: bool, embed_dim: int | None, channels: int, conditioning_key: str | None
) -> None:
    """Raises UserError where first stage (embed_dim), network and `channels` don't fit; learn_sigma: it says variances, too."""
    if embed_dim is not None and embed_dim != channels:
        raise UserError(
            f"the first stage makes latents of {embed_dim} channels (embed_dim), but model.params.channels is {channels}"
        )
    extra = network.in_channels - channels
    concatenated = conditioning_key in ("concat", "hybrid")
    out_channels = network.out_channels // 2 if learn_sigma else network.out_channels
    if out_channels != channels or extra < 0 or (extra and not concatenated):
        raise UserError(
            f"unet_config: in_channels {network.in_channels} and out_channels {out_channels} don't fit latents of "
            f"{channels} channels (in_channels may be more only for a concatenated condition)"
        )


def check_context(stage: nn.Module, context_dim: int | None, conditioning_key: str | None) -> None:
    """Raises UserError where the tokens of a conditioning stage have another width than the network's context."""
    width = getattr(stage, "width", None)
    if width is not None and conditioning_key in ("crossattn", "hybrid") and width != context_dim:
        raise UserError(
            f"model.params.cond_stage_config: {type(stage).__name__} makes vectors of width {width}, but the network attends to "
            f"context_dim {context_dim}; is this the text encoder that it was trained with?"
        )
