"""The U-Net of latent-diffusion: the shared one of guided_mt under LDM's constructor keywords, and Stable Diffusion 2's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from guided_mt.errors import UserError
from guided_mt.networks.unet import UNetModel as SharedUNet


def unet_options(
    image_size: int,
    in_channels: int,
    model_channels: int,
    out_channels: int,
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    dropout: float = 0.0,
    channel_mult: Sequence[float] = (1, 2, 4, 8),
    conv_resample: bool = True,
    dims: int = 2,
    num_classes: int | None = None,
    use_checkpoint: bool = False,
    use_fp16: bool = False,
    num_heads: int = -1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    use_spatial_transformer: bool = False,
    transformer_depth: int = 1,
    context_dim: int | Sequence[int] | None = None,
    n_embed: int | None = None,
    legacy: bool = True,
    use_bf16: bool = False,
    use_linear_in_transformer: bool = False,
    disable_self_attentions: Sequence[bool] | None = None,
    num_attention_blocks: Sequence[int] | None = None,
    disable_middle_self_attn: bool = False,
    adm_in_channels: int | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """LDM's keywords (the `params` of an `unet_config`) -> those of `guided_mt.networks.unet.UNetModel`.

    `legacy` only chose between two ways of counting the same heads. `precision` is ours. Raises UserError for values that no
    released model has and that we don't build, and for contradictions.
    """
    unsupported = {
        "dims": dims != 2,
        "n_embed": n_embed is not None,
        "disable_self_attentions": any(disable_self_attentions or ()),
        "num_attention_blocks": num_attention_blocks is not None,
        "disable_middle_self_attn": disable_middle_self_attn,
        "adm_in_channels": adm_in_channels is not None,
        "num_classes": isinstance(num_classes, str),
        "num_res_blocks": not isinstance(num_res_blocks, int),
    }
    refused = [name for name, wrong in unsupported.items() if wrong]
    if refused:
        raise UserError(f"unet_config: this U-Net has no {', '.join(refused)} of that kind; leave it out")
    if num_heads == -1 and num_head_channels == -1:
        raise UserError("unet_config: set num_heads or num_head_channels")
    if not len(channel_mult):
        raise UserError("unet_config: channel_mult [] has no level; write a list such as [1, 2, 4]")
    if not 0 <= dropout < 1:
        raise UserError(f"unet_config: dropout {dropout} must be a share from 0 up to 1")
    if isinstance(context_dim, Sequence):
        if len(set(context_dim)) != 1:
            raise UserError(
                f"unet_config: context_dim {list(context_dim)} differs between blocks; one width is supported"
            )
        context_dim = context_dim[0]
    if use_spatial_transformer and context_dim is None:
        raise UserError("unet_config: use_spatial_transformer needs context_dim, the width of the conditioning tokens")
    if context_dim is not None and not use_spatial_transformer:
        raise UserError("unet_config: context_dim needs use_spatial_transformer: true")
    return {
        "image_size": image_size,
        "in_channels": in_channels,
        "model_channels": model_channels,
        "out_channels": out_channels,
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": tuple(attention_resolutions),
        "dropout": dropout,
        "channel_mult": tuple(channel_mult),
        "conv_resample": conv_resample,
        "num_classes": num_classes,
        "use_checkpoint": use_checkpoint,
        "num_heads": num_heads,
        "num_head_channels": num_head_channels,
        # LDM's transformers have as many heads going up as going down, whatever this says.
        "num_heads_upsample": -1 if use_spatial_transformer else num_heads_upsample,
        "use_scale_shift_norm": use_scale_shift_norm,
        "resblock_updown": resblock_updown,
        "use_new_attention_order": use_new_attention_order,
        "context_dim": context_dim,
        "use_spatial_transformer": use_spatial_transformer,
        "transformer_depth": transformer_depth,
        "use_linear_in_transformer": use_linear_in_transformer,
        "precision": precision or ("fp16" if use_fp16 else "bf16" if use_bf16 else "fp32"),
    }


class UNetModel(SharedUNet):
    """LDM's `UNetModel(**unet_config.params)`: x [B, in_channels, H, W], timesteps [B], context [B, L, context_dim], classes y [B]
    -> [B, out_channels, H, W]. Keywords as `unet_options`."""

    __signature__ = inspect.signature(unet_options)  # what a configuration may hold

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(**unet_options(*args, **keywords))

    @override
    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor | None = None, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        if timesteps is None:
            raise UserError("timesteps [B] are missing")
        return self.output(self.features(x, timesteps, y, context))
