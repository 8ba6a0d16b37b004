"""Where a few network calls do most good: the timesteps of "solverN".

A rule of second order errs in a step by its length, in lambda = log(sqrt(abar) / sigma) for z_0 and in alpha-tilde for a modality
that stands in the frame. So the timesteps are spread evenly in

    rho = int (FLOOR + (1 - FLOOR) sigmoid(lambda - START)) dlambda  +  FRAME sum_i int |dalpha-tilde_i|,

each integral as a share of its own total. Below START = -2.4, where z_t is noise, z_0 hardly depends on z_t and a few long steps
are enough; above it even steps are best, down to t = 0. At these three constants the closed-form error of Gaussians of variance
0.03 to 4 is least, at 8 to 50 calls over the cosine, linear and latent-diffusion's schedules; it is flat there
(benchmarks/spacing.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .schedules import half_log_snr

START = -2.4
FLOOR = 0.056
FRAME = 0.1


def solver_timesteps(alphas_cumprod: np.ndarray, coefficients: Iterable[np.ndarray], count: int) -> list[int]:
    """`count` sorted timesteps out of 0..T-1, both ends included (T - 1 alone where count is 1).

    alphas_cumprod [T]; coefficients: alpha-tilde [T] of each modality. Raises ValueError if count is not in 1..T.
    """
    steps = len(alphas_cumprod)
    if not 1 <= count <= steps:
        raise ValueError(f"timestep_respacing: can't take {count} steps of {steps}; choose 1..{steps}")
    if count == 1:
        return [steps - 1]
    lambdas = half_log_snr(np.clip(alphas_cumprod, 1e-12, 1 - 1e-12))
    middle = (lambdas[1:] + lambdas[:-1]) / 2
    length = -np.diff(lambdas) * (FLOOR + (1 - FLOOR) / (1 + np.exp(START - middle)))
    density = length / length.sum()
    for alpha_tilde in coefficients:
        variation = np.abs(np.diff(alpha_tilde))
        if variation.any():
            density = density + FRAME * variation / variation.sum()
    reached = np.append(0.0, np.cumsum(density))
    kept = np.interp(np.linspace(0, reached[-1], count), reached, np.arange(steps)).round().astype(int)
    forward = np.maximum.accumulate(kept - np.arange(count)) + np.arange(count)  # distinct, pushing up ...
    return np.minimum(forward, np.arange(steps - count, steps)).tolist()  # ... but leaving room for what is above
