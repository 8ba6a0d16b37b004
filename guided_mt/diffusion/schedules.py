"""Noise schedules beta_t of the pixel-space models, by ADM's names."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def _linear_betas(steps: int) -> np.ndarray:
    """Ho et al.'s 1e-4 .. 0.02 over 1000 steps, rescaled to any number of steps."""
    return np.linspace(0.0001, 0.02, steps, dtype=np.float64) * (1000 / steps)


def _cosine_betas(steps: int, max_beta: float = 0.999) -> np.ndarray:
    """IDDPM eq. 17, with beta clipped at 0.999."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    abar = np.array([math.cos((v + 0.008) / 1.008 * math.pi / 2) ** 2 for v in u])
    return np.minimum(1 - abar[1:] / abar[:-1], max_beta)


def _straight_betas(steps: int) -> np.ndarray:
    """The straight path of flow models, x = (1 - tau) z_0 + tau eps at tau = (t + 1) / T (Liu et al. 2023, Lipman et al. 2023).

    Divided by sqrt((1 - tau)^2 + tau^2) it is a variance-preserving process with abar = (1 - tau)^2 / ((1 - tau)^2 + tau^2). It
    ends at tau = 1, in pure noise: the last beta is 1.
    """
    tau = np.arange(1, steps + 1, dtype=np.float64) / steps
    abar = (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)
    return 1 - abar / np.append(1.0, abar[:-1])


def straight_path(alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where y_t = a z_0 + s eps lies on the straight path, a = sqrt(abar_t), s = sqrt(1 - abar_t): y_t / (a + s) is its point at
    tau = s / (a + s). (1 / (a + s), tau), each [T]."""
    a, s = np.sqrt(alphas_cumprod), np.sqrt(1 - np.asarray(alphas_cumprod))
    return 1 / (a + s), s / (a + s)


# abar below which nothing of z_0 is left beside the noise in float32, sqrt(abar) < 2^-24: zero terminal SNR (Lin et al. 2023).
LEAST_SIGNAL = 2.0**-48

SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": _linear_betas,
    "cosine": _cosine_betas,
    "straight": _straight_betas,
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """beta_t, float64 [T]. Raises ValueError for a name that is not in SCHEDULES."""
    if schedule_name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule '{schedule_name}'; choose from {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule_name](num_diffusion_timesteps)


def with_signal(alphas_cumprod: np.ndarray) -> np.ndarray:
    """abar_t, at least LEAST_SIGNAL: for what divides by it or takes its logarithm, where a schedule ends in pure noise."""
    return np.maximum(alphas_cumprod, LEAST_SIGNAL)


def refuse_pure_noise(alphas_cumprod: np.ndarray) -> None:
    """ValueError where a network that predicts eps can't say z_0 at the last timestep."""
    if alphas_cumprod[-1] < LEAST_SIGNAL:
        raise ValueError(
            f"the schedule ends in pure noise (zero terminal SNR, abar {alphas_cumprod[-1]:.2g}), where eps says nothing of z_0: "
            "let the network predict velocity, v or x0, or take other betas"
        )


def half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """lambda_t = log(sqrt(abar_t) / sqrt(1 - abar_t)), the time of DPM-Solver and UniPC, float64 [T]."""
    return 0.5 * (np.log(with_signal(alphas_cumprod)) - np.log1p(-alphas_cumprod))
