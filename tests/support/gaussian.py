"""Joint Gaussian data whose best network is known in closed form: what is left of the error is the process's own.

z_t = a z_0 + b x + s eps with a = sqrt(abar_t), b = alpha-tilde_t, s = sqrt(1 - abar_t); everything float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion


@dataclass
class JointGaussian:
    """Zero-mean z_0 and x in R^d with covariances [d, d]; `cross` is Cov(z_0, x)."""

    cov_z: np.ndarray
    cov_x: np.ndarray
    cross: np.ndarray

    @classmethod
    def make(cls, d: int, seed: int, isotropic: bool = False) -> JointGaussian:
        """A random one, or z_0 and x with all covariances multiples of the identity."""
        if isotropic:
            eye = np.eye(d)
            return cls(0.5 * eye, 0.4 * eye, 0.35 * eye)
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(2 * d, 2 * d)) / np.sqrt(2 * d)
        joint = 0.5 * root @ root.T + 0.02 * np.eye(2 * d)
        return cls(joint[:d, :d], joint[d:, d:], joint[:d, d:])

    def given_x(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, P) with z_0 | x ~ N(B x, P)."""
        gain = self.cross @ np.linalg.inv(self.cov_x)
        return gain, self.cov_z - gain @ self.cross.T

    def draw_x(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(n, len(self.cov_x))) @ np.linalg.cholesky(self.cov_x).T

    def marginal(self, abar: float, b: float) -> np.ndarray:
        mixed = self.cross + self.cross.T
        a = np.sqrt(abar)
        return a * a * self.cov_z + a * b * mixed + b * b * self.cov_x + (1 - abar) * np.eye(len(self.cov_z))

    def regressions(self, abar: float, b: float) -> tuple[np.ndarray, np.ndarray]:
        """(E, K) with E[eps | z_t] = E z_t and E[x | z_t] = K z_t."""
        inverse = np.linalg.inv(self.marginal(abar, b))
        return np.sqrt(1 - abar) * inverse, (np.sqrt(abar) * self.cross.T + b * self.cov_x) @ inverse

    def head_covariance(self, abar: float, b: float) -> np.ndarray:
        """Cov(x | z_t)."""
        _, k = self.regressions(abar, b)
        return self.cov_x - k @ (np.sqrt(abar) * self.cross + b * self.cov_x)

    def network_u(self, diffusion: GaussianDiffusion, name: str = "x") -> Callable:
        """The best form-U network for the full process `diffusion`: (z_t, t, modalities) -> ModelOutput."""
        b = diffusion.aggregation.coefficients[name]
        pairs = [self.regressions(abar, bt) for abar, bt in zip(diffusion.alphas_cumprod, b, strict=True)]
        e, k = (torch.from_numpy(np.stack(m)) for m in zip(*pairs, strict=True))

        def network(z_t, t, modalities):
            flat, step = z_t.flatten(1).double(), int(t[0])
            eps, x = (flat @ matrix[step].T for matrix in (e, k))
            return ModelOutput(eps.view(z_t.shape), {name: x.view(z_t.shape)})

        return network

    def network_x(self, diffusion: GaussianDiffusion, name: str = "x") -> Callable:
        """The best form-X network: given x, it sees y_t = a z_0 + s eps."""
        gain, cov = self.given_x()
        gain, eye = torch.from_numpy(gain), np.eye(len(cov))
        inverses = [
            np.sqrt(1 - abar) * np.linalg.inv(abar * cov + (1 - abar) * eye) for abar in diffusion.alphas_cumprod
        ]
        inverses = torch.from_numpy(np.stack(inverses))

        def network(y_t, t, modalities):
            x, step = modalities[name].flatten(1).double(), int(t[0])
            mean = x @ gain.T * np.sqrt(diffusion.alphas_cumprod[step])
            eps = (y_t.flatten(1).double() - mean) @ inverses[step].T
            return ModelOutput(eps.view(y_t.shape), {name: modalities[name]})

        return network


def frechet(p: np.ndarray, q: np.ndarray) -> float:
    """Frechet distance of two zero-mean Gaussians."""
    values, vectors = np.linalg.eigh(p)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ q @ root)
    return float(np.trace(p) + np.trace(q) - 2 * np.sqrt(np.maximum(middle, 0)).sum())
