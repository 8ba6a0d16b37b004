"""latent-diffusion's noise schedules and its choice of DDIM timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guided_mt.diffusion.schedules import get_named_beta_schedule
from guided_mt.errors import UserError, nearest


def _linear(steps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2  # linear in sqrt(beta)


def _cosine(steps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    """IDDPM eq. 17 with offset s, and beta clipped at 0.999; start and end play no part."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    abar = np.cos((u + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
    return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999)


def _sqrt_linear(steps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start, end, steps, dtype=np.float64)


def _sqrt(steps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return np.linspace(start, end, steps, dtype=np.float64) ** 0.5


def _straight(steps: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    return get_named_beta_schedule("straight", steps)  # of flow models; nothing else plays a part


BETA_SCHEDULES = {
    "linear": _linear,
    "cosine": _cosine,
    "sqrt_linear": _sqrt_linear,
    "sqrt": _sqrt,
    "straight": _straight,
}


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """beta_t, float64 [T] (LDM's function of this name). Raises UserError for an unknown schedule and for one that is none."""
    if schedule not in BETA_SCHEDULES:
        known = ", ".join(BETA_SCHEDULES)
        raise UserError(f"beta_schedule '{schedule}' is none of {known}{nearest(schedule, BETA_SCHEDULES)}")
    if n_timestep < 1:
        raise UserError(f"timesteps {n_timestep}: must be at least 1")
    if schedule not in ("cosine", "straight") and not (0 < linear_start <= 1 and 0 < linear_end <= 1):
        raise UserError(f"linear_start {linear_start} and linear_end {linear_end}: must be above 0 and at most 1")
    return check_betas(
        BETA_SCHEDULES[schedule](n_timestep, linear_start, linear_end, cosine_s), f"beta_schedule {schedule}"
    )


def check_betas(values: Sequence[float] | np.ndarray, where: str) -> np.ndarray:
    """float64 [T] of a schedule. Raises UserError where these are no betas."""
    try:
        betas = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        betas = np.zeros(0)
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
        raise UserError(f"{where}: betas must be a list of numbers above 0 and at most 1")
    return betas


def ddim_timesteps(count: int, num_timesteps: int) -> list[int]:
    """LDM's "uniform" DDIM timesteps: every (T // count)-th from 1 on. Raises UserError where `count` can't be had."""
    if not 0 < count < num_timesteps:
        raise UserError(f"timestep_respacing ldm{count}: choose 1..{num_timesteps - 1} steps")
    return [t + 1 for t in range(0, num_timesteps, num_timesteps // count) if t + 1 < num_timesteps]
