"""MT-Diffusion in pixel space: one diffusion model for images and a second kind of data (Chen et al., ICLR 2024).

The names below can be imported from here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Aggregation": "aggregation",
    "GaussianDiffusion": "gaussian_diffusion",
    "ModelOutput": "gaussian_diffusion",
    "create_gaussian_diffusion": "respacing",
    "create_model": "unet",
    "create_classifier": "classifier",
    "ImageModality": "modalities",
    "MaskedImage": "modalities",
    "MTModel": "model",
    "sample": "samplers",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
