"""MT-Diffusion in the latent space of an autoencoder: latent-diffusion's configuration files, checkpoints and names.

autoencoder, quantize, losses         the first stage and its training objective
latent_diffusion, modalities          LatentMTDiffusion: guided_mt's diffusion, losses and network on latents
generate                              translation either way, and pairs from nothing
configuration, ldm_checkpoint, data   what latent-diffusion's users bring along
run                                   a run folder under Lightning
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported when first asked for: Lightning takes seconds.
_HOMES = {
    "AutoencoderKL": "first_stage.autoencoder",
    "IdentityFirstStage": "first_stage.autoencoder",
    "LatentGenerator": "model.generate",
    "LatentMTDiffusion": "model.latent_diffusion",
    "UNetModel": "model.unet",
    "VQModel": "first_stage.autoencoder",
    "VQModelInterface": "first_stage.autoencoder",
    "VectorQuantizer": "first_stage.quantize",
    "instantiate": "runs.configuration",
    "load_config": "runs.configuration",
    "make_beta_schedule": "model.schedules",
    "open_pairs": "data",
    "register": "runs.configuration",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latent_mt' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
