"""The text encoder: transformers' CLIPTextModel, which is Stable Diffusion 1's stage, and open_clip's tower of version 2.

Version 2 reads the block before the last. Its files in this layout hold the blocks that are computed, 23 of 24, so that the last
one and what compares texts with images have no weights here (see `conditioners.base.Stage.leave_out`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guided_mt.errors import UserError
from guided_mt.networks.clip import clip_config

from .values import refuse_others, whole

CLASS = "CLIPTextModel"
TARGETS = "ldm.modules.encoders.modules."
OPEN_CLIP, CLIP = TARGETS + "FrozenOpenCLIPEmbedder", TARGETS + "FrozenCLIPEmbedder"
PREFIX = "text_model."  # of transformers' entries before version 5, and of nearly all files
WORDS, END, PADDING = 49408, 49407, {OPEN_CLIP: 0, CLIP: 49407}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_REST = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_ONLY: dict[str, Any] = {"max_position_embeddings": 77, "vocab_size": WORDS, "layer_norm_eps": 1e-5}
_SD2 = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
_SD1 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def state_to_transformers(state: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """transformers' entries of those that a stage `target` uses."""
    if target == CLIP:
        return {
            key.removeprefix("transformer."): value for key, value in state.items() if not key.endswith("position_ids")
        }
    found = {}
    for key, value in state.items():
        name = key.removeprefix("model.")
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name in _REST:
            found[PREFIX + _REST[name]] = value
        elif block:
            start, rest = f"{PREFIX}encoder.layers.{block[1]}.", block[2]
            if rest.startswith("attn.in_proj_"):
                for part, tensor in zip("qkv", value.chunk(3), strict=True):
                    found[f"{start}self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = tensor.contiguous()
            else:
                module, _, parameter = rest.rpartition(".")
                found[f"{start}{_BLOCK[module]}.{parameter}"] = value
    return found


def state_to_stage(state: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """A stage's entries of transformers'."""
    plain = {key.removeprefix(PREFIX): value for key, value in state.items() if not key.endswith("position_ids")}
    if target == CLIP:
        return {f"transformer.{PREFIX}{key}": value for key, value in plain.items()}
    back = {theirs: ours for ours, theirs in _REST.items()}
    modules = {theirs: ours for ours, theirs in _BLOCK.items()}
    found = {}
    for key, value in plain.items():
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in back:
            found[f"model.{back[key]}"] = value
        elif block:
            start = f"model.transformer.resblocks.{block[1]}."
            if block[2] in modules:
                found[f"{start}{modules[block[2]]}.{block[3]}"] = value
            elif block[2] == "self_attn.q_proj":
                parts = [plain.get(f"encoder.layers.{block[1]}.self_attn.{part}_proj.{block[3]}") for part in "qkv"]
                if all(part is not None for part in parts):  # else the model says which entry is missing
                    found[f"{start}attn.in_proj_{block[3]}"] = torch.cat(parts)  # type: ignore[arg-type]
            elif block[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
                found[key] = value  # unknown: the model says so
        else:
            found[key] = value
    return found


def to_transformers(stage: Any, target: str) -> dict[str, Any]:
    """config.json of a stage. Raises UserError where its output is not a CLIPTextModel's last one."""
    if target == CLIP:
        if stage.layer != "last":
            raise UserError(
                f"cond_stage_config: layer {stage.layer}: this layout has no other than last of FrozenCLIPEmbedder"
            )
        found = dict(stage.config.to_dict())
    else:
        config = clip_config(stage.arch)
        text, blocks = config["text_cfg"], stage.model.transformer.resblocks
        found = {
            "hidden_size": stage.width,
            "intermediate_size": int(stage.width * text.get("mlp_ratio", 4.0)),
            "num_attention_heads": text["heads"],
            "num_hidden_layers": len(blocks) - (stage.layer == "penultimate"),
            "hidden_act": "quick_gelu" if type(blocks[0].mlp.gelu).__name__ == "QuickGELU" else "gelu",
            "projection_dim": config["embed_dim"],
        }
    own = {
        "architectures": [CLASS],
        "model_type": "clip_text_model",
        "vocab_size": WORDS,
        "max_position_embeddings": 77,
    }
    ids = {"bos_token_id": END - 1, "eos_token_id": END, "pad_token_id": PADDING[target]}
    return {"layer_norm_eps": 1e-5, **found, **own, **ids, "dtype": "float32"}


def padding_of(special_tokens: Mapping[str, Any]) -> int | None:
    """The id behind a text's end by a tokenizer's special_tokens_map.json: of version 1 END, of version 2 0, the word "!"; None
    where that doesn't say."""
    token = special_tokens.get("pad_token")
    word = token.get("content") if isinstance(token, Mapping) else token
    return {"<|endoftext|>": END, "!": 0}.get(str(word))


def to_stage(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LDM's `cond_stage_config` of a config.json: version 2's where the activation is GELU, version 1's where it is quick GELU."""
    refuse_others(config, _ONLY, where)
    if config.get("model_type", CLASS) not in (CLASS, "clip_text_model", "clip"):
        raise UserError(
            f"{where}: is a {config['model_type']}; Stable Diffusion 1 and 2 read texts by CLIP's text model"
        )
    sizes = {key: whole(config, key, where) for key in _SD2}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(f"{where}: hidden_size {sizes['hidden_size']} is no multiple of its num_attention_heads")
    act = config.get("hidden_act", "quick_gelu")
    if act == "quick_gelu":
        # Stable Diffusion 1's own is known by its name, and then also to its own code.
        return {"target": CLIP, "params": {} if sizes == _SD1 else {"version": None, "config": sizes}}
    if act != "gelu":
        raise UserError(f"{where}: hidden_act {act!r} is none of CLIP's, gelu and quick_gelu")
    text = {
        "context_length": 77,
        "vocab_size": WORDS,
        "width": sizes["hidden_size"],
        "heads": sizes["num_attention_heads"],
        "layers": sizes["num_hidden_layers"] + 1,
        "mlp_ratio": sizes["intermediate_size"] / sizes["hidden_size"],
    }
    other = {
        "embed_dim": whole(config, "projection_dim", where, sizes["hidden_size"]),
        "vision_cfg": {},
        "text_cfg": text,
    }
    params = {"arch": "ViT-H-14" if sizes == _SD2 else other, "version": None, "freeze": True, "layer": "penultimate"}
    return {"target": OPEN_CLIP, "params": params}
