"""The moving frame of MT-Diffusion: aggregation weights (eq. 3), coefficients (eq. 4) and the shift s_t (Theorem 2).

The whole method is this file plus a plain DDPM: z_t = y_t + s_t, where y_t is an ordinary diffusion of z_0 and

    s_t = sum_i alpha-tilde_t^(i) E_i(x_i),    alpha-tilde_t = sqrt(alpha_t) (w_t + alpha-tilde_{t-1}),

with t = 0..T-1 and alpha-tilde = 0 before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def _paper(betas: np.ndarray) -> np.ndarray:
    """w_t = (1/T) t/(T - t): the printed odds as a rate per unit of time, so that the drift of a step is O(1/T)."""
    return _paper_literal(betas) / len(betas)


def _paper_literal(betas: np.ndarray) -> np.ndarray:
    """w_t = t/(T - t), section 3 as printed. alpha-tilde grows to hundreds: kept for comparison only."""
    t = np.arange(len(betas), dtype=np.float64)
    return t / (len(betas) - t)


def _bridge(betas: np.ndarray) -> np.ndarray:
    """The weights whose coefficients are alpha-tilde_t = 2 sqrt(abar_t (1 - abar_t)): smooth, at most 1, near 0 at both ends."""
    abar = np.cumprod(1.0 - betas)
    return _weights_of(2.0 * np.sqrt(abar * (1.0 - abar)), betas)


def _early(betas: np.ndarray) -> np.ndarray:
    """alpha-tilde_t = c sqrt(abar_t) (1 - abar_t)^2, c = 25 sqrt(5) / 16: `bridge` with its peak at abar = 1/5, an SNR of 1/4.

    alpha-tilde_t / sqrt(abar_t) = c (1 - abar_t)^2 only grows with t: in pure noise the modality outweighs the image by
    c = 3.5 (`bridge`: 2), and so it is the first that sampling settles.
    """
    abar = np.cumprod(1.0 - betas)
    return _weights_of(_PEAK * np.sqrt(abar) * (1.0 - abar) ** 2, betas)


def _late(betas: np.ndarray) -> np.ndarray:
    """alpha-tilde_t = c abar_t^2 sqrt(1 - abar_t): `early` with signal and noise exchanged, peak at abar = 4/5, an SNR of 4.

    alpha-tilde_t / sqrt(abar_t) = c abar_t^(3/2) sqrt(1 - abar_t) vanishes in noise: the modality follows the image.
    """
    abar = np.cumprod(1.0 - betas)
    return _weights_of(_PEAK * abar**2 * np.sqrt(1.0 - abar), betas)


_PEAK = 25.0 * np.sqrt(5.0) / 16.0  # the largest value of both is 1


def _weights_of(coefficients: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """w_t = alpha-tilde_t / sqrt(alpha_t) - alpha-tilde_{t-1}: eq. 4 solved for the weights. Where a schedule ends in pure noise,
    alpha_t = 0, alpha-tilde_t is 0 whatever they are."""
    roots = np.sqrt(1.0 - betas)
    ratios = np.divide(coefficients, roots, out=np.zeros_like(coefficients), where=roots > 0)
    return ratios - np.append(0.0, coefficients[:-1])


def _constant(betas: np.ndarray) -> np.ndarray:
    return np.full(len(betas), 1.0 / len(betas))


def _none(betas: np.ndarray) -> np.ndarray:
    return np.zeros(len(betas))


WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "paper": _paper,
    "paper-literal": _paper_literal,
    "bridge": _bridge,
    "early": _early,
    "late": _late,
    "constant": _constant,
    "none": _none,
}


def aggregation_weights(name: str, betas: np.ndarray) -> np.ndarray:
    """w_t of eq. 3 for the schedule `betas` [T], float64 [T]. Raises ValueError for a name that is not in WEIGHTS."""
    if name not in WEIGHTS:
        raise ValueError(f"unknown aggregation weights '{name}'; choose from {', '.join(WEIGHTS)}")
    return WEIGHTS[name](np.asarray(betas, dtype=np.float64))


def aggregation_coefficients(weights: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """alpha-tilde_t = sqrt(alpha_t) (w_t + alpha-tilde_{t-1}) of Theorem 2 (eq. 4), float64 [T]."""
    weights, betas = np.asarray(weights, dtype=np.float64), np.asarray(betas, dtype=np.float64)
    if weights.shape != betas.shape or betas.ndim != 1:
        raise ValueError(f"weights {weights.shape} and betas {betas.shape} must be two vectors of the same length T")
    coefficients = np.empty_like(betas)
    previous = 0.0
    for t, alpha in enumerate(1.0 - betas):
        coefficients[t] = previous = np.sqrt(alpha) * (weights[t] + previous)
    return coefficients


class Aggregation:
    """The shift s_t = sum_i alpha-tilde_t^(i) E_i(x_i) of N modalities.

    coefficients: {modality name: alpha-tilde [T]}. Each modality may have its own weights; all share the schedule.
    """

    def __init__(self, coefficients: Mapping[str, np.ndarray] | None = None):
        self.coefficients = {name: np.asarray(c, dtype=np.float64) for name, c in (coefficients or {}).items()}
        if len({c.shape for c in self.coefficients.values()}) > 1:
            shapes = {name: c.shape for name, c in self.coefficients.items()}
            raise ValueError(f"all modalities need coefficients of the same length T, got {shapes}")
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_weights(cls, names: Mapping[str, str], betas: np.ndarray) -> Aggregation:
        """{modality name: weights name} for the base schedule `betas` [T]."""
        return cls({m: aggregation_coefficients(aggregation_weights(w, betas), betas) for m, w in names.items()})

    def respace(self, timesteps: Sequence[int]) -> Aggregation:
        """Keep alpha-tilde at the given timesteps: that preserves the marginals (docs/method.md, section 2.3)."""
        return Aggregation({name: c[list(timesteps)] for name, c in self.coefficients.items()})

    def shift(self, encodings: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """s_t [B, C, H, W] for `encodings` {name: E_i(x_i) [B, C, H, W]} and t [B] in -1..T-1; s_{-1} = 0 (clean data).

        Modalities without an encoding are not in the frame; with none at all the shift is a broadcastable zero.
        Raises ValueError for a modality that has no coefficients.
        """
        total = None
        for name, encoding in encodings.items():
            term = self._at(name, t, encoding) * encoding
            total = term if total is None else total + term
        return torch.zeros((), device=t.device) if total is None else total

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        if name not in self.coefficients:
            raise ValueError(
                f"modality '{name}' has no aggregation weights; known: {', '.join(self.coefficients) or 'none'}"
            )
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (name, like.device, dtype)
        if key not in self._tables:  # copied to the device once, so that a training step never waits for the host
            self._tables[key] = self._table(*key)
        return self._tables[key][t + 1].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.append(0.0, self.coefficients[name])).to(device=device, dtype=dtype)

    def prepare(self, device: torch.device) -> None:
        """Copy the coefficients to the device now, in float32, as `GaussianDiffusion.prepare`."""
        for name in self.coefficients:
            self._tables[name, device, torch.float32] = self._table(name, device, torch.float32)
