"""Joint Gaussian data whose best network is known in closed form: what is left of the error is the process's own.

z_t = a z_0 + b x + s eps with a = sqrt(abar_t), b = alpha-tilde_t, s = sqrt(1 - abar_t); everything float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.schedules import get_named_beta_schedule


def prediction_on(schedule: str) -> str:
    """What a network can predict on a noise schedule: not eps where it ends in pure noise."""
    return "velocity" if get_named_beta_schedule(schedule, 1000)[-1] == 1 else "eps"


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

    def marginal(self, abar: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cov(z_t) [..., d, d] for abar, b of shape [...]."""
        a, b, s2 = (np.asarray(v)[..., None, None] for v in (np.sqrt(abar), b, 1 - np.asarray(abar)))
        mixed = self.cross + self.cross.T
        return a * a * self.cov_z + a * b * mixed + b * b * self.cov_x + s2 * np.eye(len(self.cov_z))

    def regressions(self, abar: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E, K) [..., d, d] with E[eps | z_t] = E z_t and E[x | z_t] = K z_t."""
        inverse = np.linalg.inv(self.marginal(abar, b))
        a, b, s = (np.asarray(v)[..., None, None] for v in (np.sqrt(abar), b, np.sqrt(1 - np.asarray(abar))))
        return s * inverse, (a * self.cross.T + b * self.cov_x) @ inverse

    def clean(self, abar: np.ndarray, b: np.ndarray) -> np.ndarray:
        """R [..., d, d] with E[z_0 | z_t] = R z_t."""
        a, b_ = np.asarray(np.sqrt(abar))[..., None, None], np.asarray(b)[..., None, None]
        return (a * self.cov_z + b_ * self.cross) @ np.linalg.inv(self.marginal(abar, b))

    def head_covariance(self, abar: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cov(x | z_t) [..., d, d]."""
        _, k = self.regressions(abar, b)
        a, b = np.asarray(np.sqrt(abar))[..., None, None], np.asarray(b)[..., None, None]
        return self.cov_x - k @ (a * self.cross + b * self.cov_x)

    def head_variance(self, diffusion: GaussianDiffusion, name: str = "x") -> list[float]:
        """Per timestep, the mean variance of a coordinate of x | z_t."""
        found = self.head_covariance(diffusion.alphas_cumprod, diffusion.aggregation.coefficients[name])
        return list(np.trace(found, axis1=-2, axis2=-1) / len(self.cov_x))

    def network_u(self, diffusion: GaussianDiffusion, name: str = "x") -> Callable:
        """The best form-U network for the full process `diffusion`, of its target: (z_t, t, modalities) -> ModelOutput."""
        abar, b = diffusion.alphas_cumprod, diffusion.aggregation.coefficients[name]
        found = *self.regressions(abar, b), self.clean(abar, b)
        matrices = [torch.from_numpy(matrix) for matrix in found]

        def network(z_t, t, modalities):
            flat, step = z_t.flatten(1).double(), int(t[0])
            eps, x, z_0 = ((flat @ matrix[step].T).view(z_t.shape) for matrix in matrices)
            y = z_t - b[step] * x
            return ModelOutput(diffusion.target.wanted(diffusion, z_0, eps, y, t.long()), {name: x})

        return network

    def network_x(self, diffusion: GaussianDiffusion, name: str = "x") -> Callable:
        """The best form-X network, of the process's target: given x, it sees y_t = a z_0 + s eps."""
        gain, cov = self.given_x()
        abar = diffusion.alphas_cumprod[:, None, None]
        inverses = np.linalg.inv(abar * cov + (1 - abar) * np.eye(len(cov)))
        of_eps, of_z = (torch.from_numpy(m) for m in (np.sqrt(1 - abar) * inverses, np.sqrt(abar) * cov @ inverses))
        gain = torch.from_numpy(gain)

        def network(y_t, t, modalities):
            x, step = modalities[name].flatten(1).double(), int(t[0])
            mean = x @ gain.T
            rest = y_t.flatten(1).double() - mean * np.sqrt(diffusion.alphas_cumprod[step])
            eps, z_0 = (part.view(y_t.shape) for part in (rest @ of_eps[step].T, mean + rest @ of_z[step].T))
            return ModelOutput(diffusion.target.wanted(diffusion, z_0, eps, y_t, t.long()), {name: modalities[name]})

        return network


def frechet(p: np.ndarray, q: np.ndarray) -> float:
    """Frechet distance of two zero-mean Gaussians."""
    values, vectors = np.linalg.eigh(p)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ q @ root)
    return float(np.trace(p) + np.trace(q) - 2 * np.sqrt(np.maximum(middle, 0)).sum())


@dataclass
class SeveralGaussians:
    """Zero-mean sides in R^d, jointly Gaussian: covariance [K d, K d] of all of them one after another."""

    cov: np.ndarray
    d: int

    @classmethod
    def make(cls, sides: int, d: int, seed: int) -> SeveralGaussians:
        rng, size = np.random.default_rng(seed), sides * d
        root = rng.normal(size=(size, size)) / np.sqrt(size)
        return cls(0.5 * root @ root.T + 0.03 * np.eye(size), d)

    def draw(self, n: int, seed: int) -> list[np.ndarray]:
        """n draws [n, d] of each side."""
        rows = np.random.default_rng(seed).normal(size=(n, len(self.cov))) @ np.linalg.cholesky(self.cov).T
        return np.split(rows, len(self.cov) // self.d, axis=1)

    def block(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """The covariance of the sides `a` with the sides `b`."""
        rows, columns = (
            np.concatenate([np.arange(k * self.d, (k + 1) * self.d) for k in each] or [[]]) for each in (a, b)
        )
        return self.cov[np.ix_(rows.astype(int), columns.astype(int))]

    def given(self, side: int, known: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(B, P) with side | known ~ N(B known, P)."""
        if not known:
            return np.zeros((self.d, 0)), self.block([side], [side])
        gain = self.block([side], known) @ np.linalg.inv(self.block(known, known))
        return gain, self.block([side], [side]) - gain @ self.block(known, [side])

    def network(self, diffusion: GaussianDiffusion, slots: Sequence[dict[str, int]]) -> Callable:
        """The best network of form any, called as `MTModel` is with a role as its class; slots[role]: {modality: its side}.

        It sees z_t = a z_0 + sum_open b_i x_i + s eps and the given x_i, all jointly Gaussian, so that all it says is linear.
        """
        abars = diffusion.alphas_cumprod

        def regressions(role: int, known: tuple[str, ...], step: int) -> dict[str, np.ndarray]:
            sides, a, s = slots[role], np.sqrt(abars[step]), np.sqrt(1 - abars[step])
            factors = {role: a}
            for name, side in sides.items():
                if name not in known:
                    factors[side] = diffusion.aggregation.coefficients[name][step]
            mixed, given = list(factors), [sides[name] for name in known]
            mix = np.kron(np.array([list(factors.values())]), np.eye(self.d))  # z_t - s eps of the sides in it
            of_z = mix @ self.block(mixed, mixed) @ mix.T + s * s * np.eye(self.d)
            both = mix @ self.block(mixed, given)
            inverse = np.linalg.inv(np.block([[of_z, both], [both.T, self.block(given, given)]]))
            with_eps = np.concatenate([s * np.eye(self.d), np.zeros((self.d, self.d * len(given)))], axis=1)
            found = {"eps": with_eps @ inverse}
            for name, side in sides.items():
                found[name] = (
                    np.concatenate([self.block([side], mixed) @ mix.T, self.block([side], given)], axis=1) @ inverse
                )
            return found

        def network(z_t, t, modalities, y):
            known = tuple(name for name in slots[0] if name in modalities)
            seen = torch.cat([z_t.flatten(1), *(modalities[name].flatten(1) for name in known)], dim=1).double()
            found = regressions(int(y[0]), known, int(t[0]))
            says = {name: (seen @ torch.from_numpy(matrix).T).view(z_t.shape).float() for name, matrix in found.items()}
            return ModelOutput(says.pop("eps"), says)

        return network
