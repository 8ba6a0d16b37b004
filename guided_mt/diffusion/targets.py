"""What the network predicts: eps, z_0, v, a velocity, or ADM's y_{t-1}; each a row with its conversions, all in the frame.

eps:  y_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps
v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0  (Salimans and Ho 2022), so z_0 = sqrt(abar_t) y_t - sqrt(1 - abar_t) v_t
velocity: u = eps - z_0 = dx/dtau of the straight path x = (1 - tau) z_0 + tau eps. With a = sqrt(abar_t) and s = sqrt(1 - abar_t)
every y_t = a z_0 + s eps is a point of that path, x = y_t / (a + s) at tau = s / (a + s): z_0 = x - tau u = (y_t - s u) / (a + s)
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from .schedules import straight_path


class ModelMeanType(str, enum.Enum):
    """ADM's names of the rows of TARGETS, and `V`. A row that is added later is known by its own name alone."""

    EPSILON = "eps"
    START_X = "x0"
    PREVIOUS_X = "previous"
    V = "v"


class Tables(Protocol):
    """The arrays [T] of a process that the conversions read; see `process.GaussianDiffusion`."""

    alphas_cumprod: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The entries at t [B] of the table `name`, to be broadcast over `like` [B, C, H, W]."""

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(y_{t-1} | y_t, z_0), for `x_t` = y_t; t [B]."""


@dataclass(frozen=True)
class Target:
    """wanted(tables, x_start, noise, y_t, t): what the network is to predict, of the shape of x_start.

    xstart_coefficients(tables): (a, b) [T] with z_0 = a_t y_t + b_t prediction, by which z_0 is read off. eps_error(SNR_t): the
    squared error of eps over that of the prediction, SNR_t b_t^2, which the timestep weights multiply by; None: these are not
    defined for it.
    """

    wanted: Callable[[Tables, Tensor, Tensor, Tensor, Tensor], Tensor]
    xstart_coefficients: Callable[[Tables], tuple[np.ndarray, np.ndarray]]
    eps_error: Callable[[np.ndarray], np.ndarray] | None


def _v(p: Tables, x_start: Tensor, noise: Tensor, y_t: Tensor, t: Tensor) -> Tensor:
    return p.at("sqrt_alphas_cumprod", t, y_t) * noise - p.at("sqrt_one_minus_alphas_cumprod", t, y_t) * x_start


def _straight(p: Tables) -> tuple[np.ndarray, np.ndarray]:
    return straight_path(p.alphas_cumprod)


def _velocity_error(snr: np.ndarray) -> np.ndarray:
    return snr / (1 + np.sqrt(snr)) ** 2


TARGETS: dict[str, Target] = {
    "eps": Target(
        wanted=lambda p, x_start, noise, y_t, t: noise,
        xstart_coefficients=lambda p: (p.sqrt_recip_alphas_cumprod, -p.sqrt_recipm1_alphas_cumprod),
        eps_error=np.ones_like,
    ),
    "x0": Target(
        wanted=lambda p, x_start, noise, y_t, t: x_start,
        xstart_coefficients=lambda p: (np.zeros_like(p.alphas_cumprod), np.ones_like(p.alphas_cumprod)),
        eps_error=lambda snr: snr,
    ),
    "v": Target(
        wanted=_v,
        xstart_coefficients=lambda p: (p.sqrt_alphas_cumprod, -p.sqrt_one_minus_alphas_cumprod),
        eps_error=lambda snr: snr / (snr + 1),
    ),
    "velocity": Target(  # time runs to the noise, as in REPA and Stable Diffusion 3
        wanted=lambda p, x_start, noise, y_t, t: noise - x_start,
        xstart_coefficients=lambda p: (_straight(p)[0], -_straight(p)[1]),
        eps_error=_velocity_error,
    ),
    "velocity-to-data": Target(  # time runs to the data, as in SiT
        wanted=lambda p, x_start, noise, y_t, t: x_start - noise,
        xstart_coefficients=_straight,
        eps_error=_velocity_error,
    ),
    "previous": Target(  # the posterior mean, solved for z_0
        wanted=lambda p, x_start, noise, y_t, t: p.q_posterior_mean_variance(x_start, y_t, t)[0],
        xstart_coefficients=lambda p: (-p.posterior_mean_coef2 / p.posterior_mean_coef1, 1.0 / p.posterior_mean_coef1),
        eps_error=None,
    ),
}
