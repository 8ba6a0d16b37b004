"""Tiny latent models and pairs for the tests: a folder of aligned pairs, a configuration, and runs of the real command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from latent_mt.commands import latent_train

SIZE, LATENT = 16, 8

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": SIZE,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
FIRST_STAGE = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": DDCONFIG}}
UNET = {
    "image_size": LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
    "num_heads": 2,
}


def model_params(**values: Any) -> dict[str, Any]:
    """Keywords of a tiny LatentMTDiffusion; a value None for `mt_sides` leaves the multi-task part out."""
    params = {
        "timesteps": 40,
        "linear_start": 0.01,
        "linear_end": 0.3,
        "image_size": LATENT,
        "channels": 4,
        "mt_sides": ["day", "night"],
        "mt_swap_prob": 0.5,
        "unet_config": {"target": "latent_mt.unet.UNetModel", "params": UNET},
        "first_stage_config": FIRST_STAGE,
    }
    return {**params, **values}


def write_pairs(folder: Path, train: int = 8, val: int = 3, size: int = SIZE) -> Path:
    """Aligned pairs: a bright scene of stripes on the left, the same one dark on the right."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            day = rng.integers(100, 255, (size, 1, 3)) * np.ones((1, size, 1))
            pair = np.concatenate([day, day / 4], axis=1).astype(np.uint8)
            Image.fromarray(pair).save(folder / split / f"{k:03d}.png")
    return folder


def write_config(file: Path, pairs: Path, run: Path, **params: Any) -> Path:
    """The YAML file of a tiny run of 4 steps, with these values of model.params."""
    config = {
        "model": {
            "learning_rate": 1e-3,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": model_params(**params),
        },
        "data": {
            "target": "latent_mt.data.PairData",
            "params": {"path": str(pairs), "val_split": "val", "image_size": SIZE, "batch_size": 4, "num_workers": 0}
            | {"sides": ["day", "night"], "random_flip": True},
        },
        "lightning": {"trainer": {"accelerator": "cpu"}},
        "run": {"log_dir": str(run), "total_steps": 4, "log_interval": 1, "save_interval": 2, "ema_rate": "0.9"},
    }
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return file


def train(file: Path, *overrides: str) -> None:
    latent_train.main(["--config", str(file), *overrides])


def newest_weights(run: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    return load_file(str(sorted((run / "checkpoints").glob("step_*"))[-1] / f"{stem}.safetensors"))
