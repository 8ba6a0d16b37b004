"""The first stage: LDM's AutoencoderKL, and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from guided_mt.errors import UserError

from .values import multiples, refuse_others, swapped, whole, wholes

CLASS = "AutoencoderKL"
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# By the names of diffusers before version 0.17, which files of that time have.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def names(entries: Iterable[str], levels: int) -> dict[str, str]:
    """{LDM's entry: diffusers'}."""
    return {key: _name(key, levels) for key in entries}


def _name(key: str, levels: int) -> str:
    key = key.replace("nin_shortcut", "conv_shortcut").replace(".norm_out.", ".conv_norm_out.")
    key = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = re.sub(r"\.mid\.attn_1\.(\w+)\.", lambda m: f".mid_block.attentions.0.{_ATTENTION[m[1]]}.", key)
    key = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", key)
    key = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", key)
    key = re.sub(r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.resnets.", key)
    return re.sub(r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.", key)


def present_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries by the names of diffusers of today."""
    former = re.compile(rf"\.attentions\.0\.({'|'.join(_FORMER)})\.")
    return {former.sub(lambda m: f".attentions.0.{_FORMER[m[1]]}.", key): value for key, value in state.items()}


def is_own(entries: Iterable[str]) -> bool:
    """Whether these are the entries of a diffusers autoencoder."""
    return any(key.startswith("encoder.down_blocks.") for key in entries)


def state_to_ldm(state: Mapping[str, Tensor], own: Iterable[str], levels: int, where: str) -> dict[str, Tensor]:
    """The entries by LDM's names. own: those of LDM's autoencoder of as many `levels`. Raises UserError for others."""
    theirs, found = swapped(names(own, levels)), {}
    for key, value in present_names(state).items():
        if key not in theirs:
            raise UserError(f"{where}: its entry '{key}' is none of the network that its config.json describes")
        found[theirs[key]] = reshaped(key, value, linear=False)
    return found


def reshaped(key: str, value: Tensor, linear: bool) -> Tensor:
    """A weight of attention, by diffusers' name: linear layers there, 1 x 1 convolutions in LDM."""
    if ".attentions." not in key or not key.endswith("weight") or "group_norm" in key:
        return value
    return value.flatten(1) if linear else value.reshape(*value.shape[:2], 1, 1)


def to_diffusers(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """config.json of LDM's `first_stage_config.params`. Raises UserError for what diffusers' autoencoder can't be."""
    dd = params["ddconfig"]
    if dd.get("attn_resolutions") or dd.get("attn_type", "vanilla") != "vanilla" or not dd.get("double_z", True):
        raise UserError(
            f"first_stage_config: diffusers' {CLASS} has attention in the middle alone, and a mean and variance"
        )
    if params["embed_dim"] != dd["z_channels"]:
        raise UserError(
            f"first_stage_config: diffusers' {CLASS} has embed_dim {params['embed_dim']} = z_channels {dd['z_channels']}"
        )
    channels = [m * dd["ch"] for m in dd["ch_mult"]]
    return {
        "_class_name": CLASS,
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "down_block_types": [DOWN] * len(channels),
        "up_block_types": [UP] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": dd["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": params["embed_dim"],
        "norm_num_groups": dd.get("norm_groups", 32),
        "sample_size": dd["resolution"],
        "scaling_factor": scale_factor,
    }


def to_ldm(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LDM's `first_stage_config.params` of a config.json. Raises UserError for an autoencoder that LDM's can't be."""
    refuse_others(config, _ONLY, where)
    channels = wholes(config, "block_out_channels", where)
    for key, block in (("down_block_types", DOWN), ("up_block_types", UP)):
        if list(config.get(key) or []) not in ([], [block] * len(channels)):
            raise UserError(
                f"{where}: {key} {config[key]}: {len(channels)} {block} are expected, as in Stable Diffusion"
            )
    latent = whole(config, "latent_channels", where, 4)
    groups = whole(config, "norm_num_groups", where, 32)
    return {
        "embed_dim": latent,
        "ddconfig": {
            "double_z": True,
            "z_channels": latent,
            "resolution": whole(config, "sample_size", where, 256),
            "in_channels": whole(config, "in_channels", where, 3),
            "out_ch": whole(config, "out_channels", where, 3),
            "ch": channels[0],
            "ch_mult": multiples(channels, where),
            "num_res_blocks": whole(config, "layers_per_block", where, 1),
            "attn_resolutions": [],
            "dropout": 0.0,
            **({} if groups == 32 else {"norm_groups": groups}),
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }
