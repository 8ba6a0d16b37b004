"""Stable Diffusion's configurations as they are published, and tiny models of the same kind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tiny_latent import DDCONFIG, LATENT

from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.runs.ldm_checkpoint import LDMCheckpoint, schedule_buffers, write_ldm
from latent_mt.runs.targets import instantiate

_KL_F8 = {
    "embed_dim": 4,
    "monitor": "val/rec_loss",
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
    "lossconfig": {"target": "torch.nn.Identity"},
}
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "use_checkpoint": True,
    "legacy": False,
}
_DDPM = {
    "linear_start": 0.00085,
    "linear_end": 0.0120,
    "num_timesteps_cond": 1,
    "log_every_t": 200,
    "timesteps": 1000,
    "first_stage_key": "jpg",
    "cond_stage_key": "txt",
    "image_size": 64,
    "channels": 4,
    "cond_stage_trainable": False,
    "conditioning_key": "crossattn",
    "monitor": "val/loss_simple_ema",
    "scale_factor": 0.18215,
    "use_ema": False,
}
_V2_UNET = {
    **_UNET,
    "use_fp16": True,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
_WARMUP = {
    "warm_up_steps": [10000],
    "cycle_lengths": [10000000000000],
    "f_start": [1e-06],
    "f_max": [1.0],
    "f_min": [1.0],
}


def _file(
    unet: dict[str, Any], stage: str, stage_params: dict[str, Any] | None = None, **params: Any
) -> dict[str, Any]:
    cond = {"target": f"ldm.modules.encoders.modules.{stage}"} | ({"params": stage_params} if stage_params else {})
    return {
        "model": {
            "base_learning_rate": 1.0e-4,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **_DDPM,
                **params,
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": _KL_F8},
                "cond_stage_config": cond,
            },
        }
    }


_OPEN_CLIP = ("FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"})
# The keys and values of the published files, by their names.
PUBLISHED: dict[str, dict[str, Any]] = {
    "v1-inference": _file(
        {**_UNET, "num_heads": 8, "context_dim": 768},
        "FrozenCLIPEmbedder",
        scheduler_config={"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": _WARMUP},
    ),
    "v2-inference": _file(_V2_UNET, *_OPEN_CLIP),
    "v2-inference-v": _file(_V2_UNET, *_OPEN_CLIP, parameterization="v"),
}

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
_TINY_UNET = {
    "image_size": LATENT,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "context_dim": 32,
    "use_checkpoint": False,
}


def tiny_config(name: str = "v2-inference", **params: Any) -> dict[str, Any]:
    """A published configuration with the same keys and tiny sizes; params: over those of the model."""
    config = copy.deepcopy(PUBLISHED[name])
    own = config["model"]["params"]
    own["image_size"] = LATENT
    heads = {"num_heads": 2} if name.startswith("v1") else {"num_head_channels": 16}
    own["unet_config"]["params"] |= {**_TINY_UNET, **heads}
    own["first_stage_config"]["params"]["ddconfig"] = dict(DDCONFIG)
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    stage = own["cond_stage_config"].setdefault("params", {})
    stage |= {"config": text} if name.startswith("v1") else {"arch": TINY_CLIP}
    own |= params
    return config


def tiny_model(config: dict[str, Any], seed: int = 0) -> LatentMTDiffusion:
    """The model of `tiny_config` with random weights everywhere."""
    torch.manual_seed(seed)
    model = instantiate({key: config["model"][key] for key in ("target", "params")}, "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.cond_stage_model.version = None  # it has its weights
    return model.eval()


def write_checkpoint(folder: Path, config: dict[str, Any], model: LatentMTDiffusion) -> tuple[Path, Path]:
    """(the .ckpt, its YAML file) as they are published: without averages, with the schedule, and position_ids of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    cond = dict(model.cond_stage_model.state_dict())
    for name in model.cond_stage_model.not_weights:
        cond[name] = torch.arange(77)[None]
    content = LDMCheckpoint(
        model.network.state_dict(),
        model.first_stage_model.state_dict(),
        cond,
        buffers=schedule_buffers(model.diffusion.betas),
        step=7,
    )
    write_ldm(folder / "sd.ckpt", content)
    (folder / "sd.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return folder / "sd.ckpt", folder / "sd.yaml"
