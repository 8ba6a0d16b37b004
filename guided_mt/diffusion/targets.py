"""What the network predicts: eps, z_0, v, or ADM's y_{t-1}; each a row with its conversions, all in the frame.

eps:  y_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps
v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0  (Salimans and Ho 2022), so z_0 = sqrt(abar_t) y_t - sqrt(1 - abar_t) v_t
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


class ModelMeanType(enum.Enum):
    """ADM's names of the targets, and `V`."""

    EPSILON = "epsilon"
    START_X = "start_x"
    PREVIOUS_X = "previous_x"
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

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor: ...

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Target:
    """prediction: its name in `weighting`; '' where no timestep weights are defined.

    xstart(tables, prediction, y_t, t): z_0 of a prediction. wanted(tables, x_start, noise, y_t, t): what the network is to predict.
    xstart_coefficients(tables): (a, b) [T] with z_0 = a_t y_t + b_t prediction, the same conversion as a linear map.
    """

    prediction: str
    xstart: Callable[[Tables, Tensor, Tensor, Tensor], Tensor]
    wanted: Callable[[Tables, Tensor, Tensor, Tensor, Tensor], Tensor]
    xstart_coefficients: Callable[[Tables], tuple[np.ndarray, np.ndarray]]


def xstart_from_eps(p: Tables, eps: Tensor, y_t: Tensor, t: Tensor) -> Tensor:
    """z_0 = (y_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    return p.at("sqrt_recip_alphas_cumprod", t, y_t) * y_t - p.at("sqrt_recipm1_alphas_cumprod", t, y_t) * eps


def _xstart_from_v(p: Tables, v: Tensor, y_t: Tensor, t: Tensor) -> Tensor:
    return p.at("sqrt_alphas_cumprod", t, y_t) * y_t - p.at("sqrt_one_minus_alphas_cumprod", t, y_t) * v


def _xstart_from_previous(p: Tables, previous: Tensor, y_t: Tensor, t: Tensor) -> Tensor:
    # y_{t-1} is predicted: solve the posterior mean for z_0.
    return 1.0 / p.at("posterior_mean_coef1", t, y_t) * (previous - p.at("posterior_mean_coef2", t, y_t) * y_t)


def _v(p: Tables, x_start: Tensor, noise: Tensor, y_t: Tensor, t: Tensor) -> Tensor:
    return p.at("sqrt_alphas_cumprod", t, y_t) * noise - p.at("sqrt_one_minus_alphas_cumprod", t, y_t) * x_start


TARGETS: dict[ModelMeanType, Target] = {
    ModelMeanType.EPSILON: Target(
        "eps",
        xstart_from_eps,
        lambda p, x_start, noise, y_t, t: noise,
        lambda p: (p.sqrt_recip_alphas_cumprod, -p.sqrt_recipm1_alphas_cumprod),
    ),
    ModelMeanType.START_X: Target(
        "x0",
        lambda p, prediction, y_t, t: prediction,
        lambda p, x_start, noise, y_t, t: x_start,
        lambda p: (np.zeros_like(p.alphas_cumprod), np.ones_like(p.alphas_cumprod)),
    ),
    ModelMeanType.V: Target(
        "v", _xstart_from_v, _v, lambda p: (p.sqrt_alphas_cumprod, -p.sqrt_one_minus_alphas_cumprod)
    ),
    ModelMeanType.PREVIOUS_X: Target(
        "",
        _xstart_from_previous,
        lambda p, x_start, noise, y_t, t: p.q_posterior_mean_variance(x_start, y_t, t)[0],
        lambda p: (-p.posterior_mean_coef2 / p.posterior_mean_coef1, 1.0 / p.posterior_mean_coef1),
    ),
}
