"""The noise schedule and the prediction: LDM's keywords, and the config.json of diffusers' schedulers, which share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from guided_mt.errors import UserError, nearest

from .values import number, whole

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
}  # LDM's name: diffusers'
CLASS = "DDIMScheduler"
OTHER_PROCESSES = ("FlowMatch", "EDM", "CM", "KarrasVe", "Score")  # how the names of schedulers of these begin


def to_diffusers(params: Mapping[str, Any], betas: np.ndarray) -> dict[str, Any]:
    """scheduler_config.json of LDM's `model.params`; betas [T]. Raises UserError for a prediction that has no name there."""
    prediction = params.get("parameterization", "eps")
    if prediction not in PREDICTIONS:
        raise UserError(f"parameterization {prediction}: diffusers' schedulers know {', '.join(PREDICTIONS)} alone")
    schedule = params.get("beta_schedule", "linear")
    named = schedule in SCHEDULES and params.get("given_betas") is None and params.get("cosine_s", 8e-3) == 8e-3
    return {
        "_class_name": CLASS,
        "num_train_timesteps": len(betas),
        "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 2e-2),
        "beta_schedule": SCHEDULES[schedule] if named else "linear",
        "trained_betas": None if named else [float(beta) for beta in betas],
        "prediction_type": PREDICTIONS[prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def to_ldm(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LDM's keywords of `model.params`. Raises UserError for a schedule or prediction that LDM has no name for."""
    predictions, schedules = ({b: a for a, b in table.items()} for table in (PREDICTIONS, SCHEDULES))
    name = str(config.get("_class_name", CLASS))
    if name.startswith(OTHER_PROCESSES):
        raise UserError(f"{where}: {name} is no scheduler of a diffusion by betas, which Stable Diffusion 1 and 2 are")
    prediction, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    for key, value, known in (("prediction_type", prediction, predictions), ("beta_schedule", schedule, schedules)):
        if value not in known:
            raise UserError(f"{where}: {key} '{value}' is none of {', '.join(known)}{nearest(str(value), known)}")
    if (betas := config.get("trained_betas")) is not None and not _are_betas(betas):
        raise UserError(f"{where}: trained_betas: a list of numbers between 0 and 1 is expected")
    found = {
        "timesteps": whole(config, "num_train_timesteps", where, 1000) if betas is None else len(betas),
        "beta_schedule": schedules[schedule],
        "linear_start": number(config, "beta_start", where, 1e-4),
        "linear_end": number(config, "beta_end", where, 2e-2),
        "parameterization": predictions[prediction],
    }
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        found["given_betas"] = betas_of(found, config).tolist()
    return found


def _are_betas(values: Any) -> bool:
    numbers = isinstance(values, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values)
    return bool(numbers and values) and all(0 < x <= 1 for x in values)


def betas_of(named: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray:
    """The betas [T] themselves, those of zero terminal SNR by Lin et al. 2023, algorithm 1. named: as `to_ldm` gives them."""
    steps, start, end = named["timesteps"], named["linear_start"], named["linear_end"]
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif named["beta_schedule"] == "cosine":
        u = np.arange(steps + 1, dtype=np.float64) / steps
        abar = np.cos((u + 8e-3) / (1 + 8e-3) * np.pi / 2) ** 2
        betas = np.clip(1 - abar[1:] / abar[:-1], 0, 0.999)
    elif named["beta_schedule"] == "linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    else:
        betas = np.linspace(start, end, steps)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(np.cumprod(1 - betas))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        betas = 1 - np.append(root[0], root[1:] / root[:-1]) ** 2
    return betas
