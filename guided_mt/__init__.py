"""MT-Diffusion in pixel space: one diffusion model for images and a second kind of data (Chen et al., ICLR 2024).

The names below can be imported from here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Aggregation": "diffusion.aggregation",
    "DiT": "networks.dit",
    "GaussianDiffusion": "diffusion.process",
    "ImageModality": "modalities",
    "MTModel": "networks.model",
    "MaskedImage": "modalities",
    "ModelOutput": "diffusion.network",
    "aggregation_coefficients": "diffusion.aggregation",
    "aggregation_weights": "diffusion.aggregation",
    "create_classifier": "networks.classifier",
    "create_gaussian_diffusion": "diffusion.respacing",
    "create_model": "networks.create",
    "sample": "diffusion.sampling",
    "timestep_weights": "diffusion.weighting",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
