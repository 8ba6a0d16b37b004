"""Stable Diffusion in the layout of Hugging Face's diffusers: a folder with model_index.json and a folder for each part.

unet, vae, text_encoder   the names of a part's entries and its config.json, in both directions
scheduler                 the noise schedule and what is predicted
folder                    the whole: read as latent-diffusion's entries and configuration, and written
"""

from .folder import (
    autoencoder_folder,
    autoencoder_params,
    betas_of,
    configuration,
    is_pipeline,
    read_autoencoder,
    read_state,
    write_pipeline,
)

__all__ = [
    "autoencoder_folder",
    "autoencoder_params",
    "betas_of",
    "configuration",
    "is_pipeline",
    "read_autoencoder",
    "read_state",
    "write_pipeline",
]
