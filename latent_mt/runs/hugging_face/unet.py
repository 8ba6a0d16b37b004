"""The U-Net: LDM's keywords and entries, and those of diffusers' UNet2DConditionModel.

LDM numbers all blocks on the way down and up in one row each; diffusers by level, with residual blocks, attention and the change of
size in rows of their own. The weights are the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from guided_mt.errors import UserError

from .values import multiples, needed, refuse_others, whole, wholes

CLASS = "UNet2DConditionModel"
PLAIN, ATTENDING = "DownBlock2D", "CrossAttnDownBlock2D"
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Of diffusers' keywords those that LDM's U-Net has no counterpart of, with the one value that means what it does.
_ONLY: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "encoder_hid_dim": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "encoder_hid_dim_type": None,
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
}


def names(entries: Iterable[str], num_res_blocks: int) -> dict[str, str]:
    """{LDM's entry: diffusers'} of a U-Net's entries. Raises UserError for an entry that diffusers has no place for."""
    entries = list(entries)
    whole = {key.rpartition(".")[0] for key in entries}
    levels = 1 + max(int(key.split(".")[1]) for key in entries if key.startswith("input_blocks.")) // (
        num_res_blocks + 1
    )
    return {key: _name(key, num_res_blocks, levels, whole) for key in entries}


def _name(key: str, count: int, levels: int, whole: set[str]) -> str:
    module, _, parameter = key.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{parameter}"
    found = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)", key)
    middle = re.fullmatch(r"middle_block\.(\d)\.(.+)", key)
    if middle:
        where, rest = ("attentions.0", "resnets.0", "resnets.1")[(1, 0, 2).index(int(middle[1]))], middle[2]
        return f"mid_block.{where}.{_inner(rest, where)}"
    if not found:
        raise UserError(f"the U-Net's entry '{key}' has no counterpart in diffusers' {CLASS}")
    side, block, part, rest = found[1], int(found[2]), int(found[3]), found[4]
    if side == "input_blocks":
        level, index = divmod(block - 1, count + 1)
        if index == count:  # LDM's downsampling stands alone
            return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        where = f"{'attentions' if part else 'resnets'}.{index}"
        return f"down_blocks.{level}.{where}.{_inner(rest, where)}"
    level, index = divmod(block, count + 1)
    if rest in ("conv.weight", "conv.bias"):
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    where = f"{'attentions' if part else 'resnets'}.{index}"
    return f"up_blocks.{level}.{where}.{_inner(rest, where)}"


def _inner(rest: str, where: str) -> str:
    if where.startswith("attentions"):
        return rest
    module, _, parameter = rest.rpartition(".")
    if module not in _RESIDUAL:
        raise UserError(f"the U-Net has a residual block with '{rest}', which diffusers' {CLASS} has no place for")
    return f"{_RESIDUAL[module]}.{parameter}"


def to_diffusers(params: Mapping[str, Any], size: int) -> dict[str, Any]:
    """config.json of LDM's `unet_config.params`; size: of the latents. Raises UserError for what diffusers' U-Net can't be."""
    wrong = {
        "num_classes": params.get("num_classes") is not None,
        "use_scale_shift_norm": params.get("use_scale_shift_norm", False),
        "resblock_updown": params.get("resblock_updown", False),
        "conv_resample": not params.get("conv_resample", True),
        "use_spatial_transformer": not params.get("use_spatial_transformer", False),
    }
    for key, refused in wrong.items():
        if refused:
            raise UserError(f"unet_config: diffusers' {CLASS} has no {key}: {params.get(key, False)}")
    mult, width = list(params.get("channel_mult", (1, 2, 4, 8))), params["model_channels"]
    attends = [2**level in list(params["attention_resolutions"]) for level in range(len(mult))]
    heads, per_head = params.get("num_heads", -1), params.get("num_head_channels", -1)
    channels = [int(m * width) for m in mult]
    context = params["context_dim"]
    return {
        "_class_name": CLASS,
        "sample_size": size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": [ATTENDING if yes else PLAIN for yes in attends],
        "up_block_types": [(ATTENDING if yes else PLAIN).replace("Down", "Up") for yes in attends[::-1]],
        "block_out_channels": channels,
        "layers_per_block": params["num_res_blocks"],
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": params.get("dropout", 0.0),
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": context if isinstance(context, int) else next(iter(context)),
        "transformer_layers_per_block": params.get("transformer_depth", 1),
        # The number of heads, whatever its name says; diffusers keeps it for the sake of older files.
        "attention_head_dim": [c // per_head for c in channels] if per_head != -1 else heads,
        "use_linear_projection": params.get("use_linear_in_transformer", False),
    }


def to_ldm(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LDM's `unet_config.params` of a config.json. Raises UserError for a U-Net that LDM's can't be."""
    refuse_others(config, _ONLY, where)
    channels, down = wholes(config, "block_out_channels", where), list(needed(config, "down_block_types", where))
    unknown = [str(name) for name in down if name not in (PLAIN, ATTENDING)]
    wanted = [str(name).replace("Down", "Up") for name in down[::-1]]
    if unknown or list(config.get("up_block_types", wanted)) != wanted:
        raise UserError(
            f"{where}: blocks {', '.join(unknown or map(str, config['up_block_types']))} are not Stable Diffusion's 1 and 2"
        )
    if len(down) != len(channels):
        raise UserError(f"{where}: {len(down)} down_block_types and {len(channels)} block_out_channels")
    return {
        "image_size": whole(config, "sample_size", where, 64),
        "in_channels": whole(config, "in_channels", where, 4),
        "out_channels": whole(config, "out_channels", where, 4),
        "model_channels": channels[0],
        "attention_resolutions": [2**level for level, name in enumerate(down) if name == ATTENDING],
        "num_res_blocks": whole(config, "layers_per_block", where),
        "channel_mult": multiples(channels, where),
        "dropout": config.get("dropout") or 0.0,
        **_heads(config, channels, where),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "transformer_depth": whole(config, "transformer_layers_per_block", where, 1),
        "context_dim": whole(config, "cross_attention_dim", where),
        "legacy": False,
    }


def _heads(config: Mapping[str, Any], channels: list[int], where: str) -> dict[str, int]:
    """{num_heads} or {num_head_channels}: LDM's are the same number of heads, or the same channels per head, on all levels."""
    key = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
    if not isinstance(config.get(key), list):
        return {"num_heads": whole(config, key, where, 8)}
    heads = wholes(config, key, where)
    if len(heads) != len(channels):
        raise UserError(f"{where}: {key} {heads}: as many as block_out_channels are expected, {len(channels)}")
    sizes = {c // h for c, h in zip(channels, heads, strict=True)}
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    if len(sizes) == 1:
        return {"num_head_channels": sizes.pop()}
    raise UserError(f"{where}: {key} {heads} is neither one number of heads nor one width of a head")
