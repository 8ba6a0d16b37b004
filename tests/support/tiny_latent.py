"""Tiny latent models and pairs for the tests: a folder of aligned pairs, a configuration, and runs of the real command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from guided_mt.runs.checkpoint import save_checkpoint
from latent_mt.commands import latent_train
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.runs.targets import instantiate

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

DIT = {
    "input_size": LATENT,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": None,
}


def model_params(**values: Any) -> dict[str, Any]:
    """Keywords of a tiny LatentMTDiffusion; mt_sides [] leaves the multi-task part out."""
    params = {
        "timesteps": 40,
        "linear_start": 0.01,
        "linear_end": 0.3,
        "image_size": LATENT,
        "channels": 4,
        "mt_sides": ["day", "night"],
        "mt_swap_prob": 0.5,
        "unet_config": {"target": "latent_mt.model.unet.UNetModel", "params": UNET},
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


def write_images(folder: Path, count: int = 3, size: int = SIZE) -> Path:
    """`count` images of noise in each of three folders, which are their classes."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")
    return folder


def write_config(file: Path, path: Path, run: Path, **params: Any) -> Path:
    """The YAML file of a tiny run of 4 steps on the pairs at `path`, or with mt_sides [] on its images, with these values of
    model.params."""
    params = model_params(**params)
    data = {"path": str(path), "image_size": SIZE, "batch_size": 4, "num_workers": 0, "random_flip": True}
    pairs = {"val_split": "val", "sides": ["day", "night"]}
    config = {
        "model": {
            "learning_rate": 1e-3,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": params,
        },
        "data": {
            "target": f"latent_mt.data.{'PairData' if params['mt_sides'] else 'ImageData'}",
            "params": {**data, **(pairs if params["mt_sides"] else {})},
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


# ---------------------------------------------------------------- photos and label maps, and runs without training

CLASSES = "# index name R G B\n0 Sky 128 128 128\n1 Road 128 64 128\n2 Car 64 0 128\n9 Unlabelled 0 0 0\n"
MAPS = {"mt_sides": ["photo", "map"]}


def write_labelled_pairs(
    folder: Path, train: int = 4, val: int = 3, size: int = SIZE, drives: Sequence[str] = ()
) -> Path:
    """CamVid's layout: noise as photos, and maps of three classes with a void corner. drives: prefixes of the names, in turn."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            classes = rng.integers(0, 3, (size, size), dtype=np.uint8)
            classes[:3, :3] = 9
            photo = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            name = f"{drives[k % len(drives)]}_{k:03d}.png" if drives else f"{k:03d}.png"
            Image.fromarray(photo).save(folder / split / "images" / name)
            Image.fromarray(classes).save(folder / split / "labels" / name)
    (folder / "classes.txt").write_text(CLASSES)
    return folder


def random_model(seed: int = 0, **params: Any) -> LatentMTDiffusion:
    """`params` over those of `model_params`, with random weights everywhere and a tracked head, as a trained model has."""
    torch.manual_seed(seed)
    made = instantiate({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model_params(**params)}, "m")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for tracked in made.network.head_variance.values():
        tracked.update(torch.tensor([[0.5], [1.0]]).expand(2, made.diffusion.num_timesteps))
    return made.eval()


def write_run(
    run: Path, pairs: Path, step: int = 4, seed: int = 0, data: dict[str, Any] | None = None, **params: Any
) -> Path:
    """A run folder as training leaves it, finished at `step`, of `random_model`; the first stage is the same for every seed.

    data: over the file's data.params.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = write_config(run / "config.yaml", pairs, run, **params)
    config = OmegaConf.load(file)
    config.run |= {"total_steps": step, "images_per_step": 4, "seed": seed}
    config.data.params |= {"sides": list(params.get("mt_sides", config.data.params.get("sides"))), **(data or {})}
    file.write_text(OmegaConf.to_yaml(config))
    model = random_model(seed, **params)
    torch.manual_seed(0)
    model.first_stage_model.load_state_dict(instantiate(FIRST_STAGE, "m").state_dict())
    save_checkpoint(
        run,
        step,
        config_yaml=file.read_text(),
        weights={"model": model.state_dict()},
        training_state={},
        classes=None,
    )
    return run
