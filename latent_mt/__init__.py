"""MT-Diffusion in the latent space of an autoencoder: latent-diffusion's configuration files, checkpoints and names.

data          pairs of images, label maps, caches of latents
runs          YAML files and what their targets mean, LDM's checkpoints, a run folder under Lightning
first_stage   LDM's autoencoders, and the losses that train them
conditioners  LDM's conditioning stages
model         LatentMTDiffusion: guided_mt's diffusion, losses and network on latents; drawing from it
training      of first stages and of LatentMTDiffusion
commands      what scripts/ calls

Who may import whom, bottom up: {data, runs}, {first_stage, conditioners}, model, training, commands. Lightning is imported by
runs.run, runs.trained_module and training alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Module of each public name, imported when the name is first asked for: torch and what it brings take seconds.
HOMES = {
    "AutoencoderKL": "first_stage.first_stages",
    "DiT": "model.dit",
    "SiT": "model.dit",
    "FrozenCLIPEmbedder": "conditioners",
    "FrozenOpenCLIPEmbedder": "conditioners",
    "IdentityFirstStage": "first_stage.first_stages",
    "LatentGenerator": "model.generate",
    "LatentMTDiffusion": "model.latent_diffusion",
    "UNetModel": "model.unet",
    "VQModel": "first_stage.first_stages",
    "VQModelInterface": "first_stage.first_stages",
    "VectorQuantizer": "first_stage.quantize",
    "instantiate": "runs.targets",
    "load_config": "runs.configuration",
    "make_beta_schedule": "model.schedules",
    "open_pairs": "data",
    "register": "runs.targets",
}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'latent_mt' has no attribute '{name}'")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
