"""A tiny diffusion transformer for latents: the released model in small, as it is published, with an autoencoder beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_latent import DDCONFIG, DIT, FIRST_STAGE, model_params

from guided_mt.networks.dit import DiT
from latent_mt.runs.hugging_face import vae
from latent_mt.runs.targets import instantiate

CLASSES = 5
RELEASED = {**DIT, "num_classes": CLASSES}
# imagenet256_dit_xl in small: its schedule, its classes, its learned variances.
PUBLISHED = {
    "timesteps": 1000,
    "beta_schedule": "sqrt_linear",
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "scale_factor": 0.18215,
    "cond_stage_key": "class_label",
    "mt_sides": [],
    "mt_swap_prob": 0.0,
    "mt_drop_prob": 0.1,
}


def random_dit(**options: Any) -> DiT:
    """The published architecture in small with weights like a trained model's: nothing is zero."""
    torch.manual_seed(3)
    network = DiT(**{"learn_sigma": True, **RELEASED, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 / parameter.shape[-1] ** 0.5 * torch.randn_like(parameter))
    return network.eval()


def params_of(**values: Any) -> dict[str, Any]:
    network = {"target": "models.DiT", "params": {**RELEASED, **values.pop("network", {})}}
    return model_params(**{**PUBLISHED, "unet_config": network, **values})


def write_released(folder: Path) -> Path:
    """dit.pt as facebookresearch publishes it, dit.yaml that describes it, and vae/, an autoencoder's folder of diffusers'."""
    torch.save(random_dit().state_dict(), folder / "dit.pt")
    torch.manual_seed(5)
    stage = instantiate(FIRST_STAGE, "stage")
    state, about = stage.state_dict(), vae.to_diffusers(FIRST_STAGE["params"], PUBLISHED["scale_factor"])
    names = vae.names(state, len(DDCONFIG["ch_mult"]))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(about))
    written = {names[key]: vae.reshaped(names[key], value, linear=True).contiguous() for key, value in state.items()}
    save_file(written, str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    torch.save({"state_dict": state}, folder / "kl.ckpt")
    config = {"model": {"target": "latent_mt.LatentMTDiffusion", "params": params_of()}}
    (folder / "dit.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return folder
