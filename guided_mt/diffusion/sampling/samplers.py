"""Rules that walk from z_T to z_0. Each is a loop that asks the denoiser where it likes and moves in the frame.

    y = z - s_t(encodings);  y' = a step of plain DDPM or DDIM;  z' = y' + s_t'(encodings)

Unknown modalities' encodings are predictions like z_0: with E = E[E_i(x_i) | z_t] the deterministic rules solve
d(z / sigma) = z_0 d(sqrt(abar) / sigma) + sum_i E_i d(alpha-tilde_i / sigma), sigma = sqrt(1 - abar), the probability flow of z.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..process import GaussianDiffusion
from ..random import SampleStreams
from ..schedules import half_log_snr
from .denoiser import Denoiser, Estimate


class Sampler:
    """A rule z_t -> z_0 for one batch. A new one has `run` and a row in `registry.SAMPLERS`.

    spacing: how `--steps N` places its timesteps, "solver" (see `spacing.solver_timesteps`) or "even". Every rule here calls the
    network once per timestep of the process, so N timesteps cost N calls.
    """

    spacing = "solver"
    renews_noise = False  # whether new noise in each step forgets what was wrong at the start
    shifts_mean = False  # where a separate classifier's gradient enters: the mean of the step, or else eps

    def __init__(self, denoise: Denoiser, streams: SampleStreams, eta: float = 0.0):
        self.denoise, self.streams, self.eta = denoise, streams, eta
        self.diffusion = denoise.diffusion
        self.lambdas = half_log_snr(self.diffusion.alphas_cumprod)  # [T]
        self._moved = denoise.arithmetic(moved)
        self._looks: list[tuple[Tensor, int, Estimate]] = []

    def run(self, z: Tensor, steps: Iterable[int]) -> Tensor:
        """z [B, C, H, W] at the first of `steps`, local timesteps that fall to 0, -> z_0."""
        raise NotImplementedError

    def move(
        self, z: Tensor, step: int, to: int, estimate: Estimate, noise: Tensor | None = None, eta: float = 0.0
    ) -> Tensor:
        """z at timestep `to` (-1: z_0) from z at `step`: a step of DDIM in the frame, with `estimate` held over the step."""
        t, t_to = (torch.full((len(z),), value, device=z.device) for value in (step, to))
        return self._moved(self.diffusion, z, t, t_to, estimate.x_start, estimate.encodings, noise, eta)

    def second_look(self, z: Tensor, step: int, estimate: Estimate) -> Tensor:
        """z at the second timestep once more, by the mean of the estimates at both ends of the first step, where modalities are
        unknown; else z itself. A deterministic rule calls it after each call of the network.

        A first step without a history is of first order only. What it gets wrong of the unknown modalities such a rule carries to
        the end, and with `paper` weights on the cosine schedule that is most of the whole error.
        """
        if len(self._looks) < 2 and self.denoise.unknown:
            self._looks.append((z, step, estimate))
            if len(self._looks) == 2:
                start, first, there = self._looks[0]
                return self.move(start, first, step, there.toward((0.5, estimate)))
        return z

    def shift(self, estimate: Estimate, t: Tensor) -> Tensor:
        """s_t [B, C, H, W] of the encodings of an estimate, at t [B]; -1 is clean data."""
        return self.diffusion.aggregation.shift(estimate.encodings, t)

    def noise(self, z: Tensor) -> Tensor:
        """Standard normal noise of the shape of z, each sample's from its own stream."""
        return self.streams.normal(*z.shape[1:]).to(z.dtype)


def moved(
    diffusion: GaussianDiffusion,
    z: Tensor,
    t: Tensor,
    t_to: Tensor,
    x_start: Tensor,
    encodings: Mapping[str, Tensor],
    noise: Tensor | None,
    eta: float,
) -> Tensor:
    """See `Sampler.move`; t, t_to [B]."""
    y = z - diffusion.aggregation.shift(encodings, t)
    return diffusion.ddim_step(y, x_start, t, noise, eta, t_to) + diffusion.aggregation.shift(encodings, t_to)


def ancestral(
    diffusion: GaussianDiffusion,
    z: Tensor,
    t: Tensor,
    x_start: Tensor,
    encodings: Mapping[str, Tensor],
    log_variance: Tensor,
    moves: tuple[Tensor, Tensor] | None,
    noise: Tensor,
) -> Tensor:
    """A draw of z_{t-1}. moves: the variance, and the gradient that moves the mean times it; None for none."""
    y = z - diffusion.aggregation.shift(encodings, t)
    mean, _, _ = diffusion.q_posterior_mean_variance(x_start, y, t)
    y = diffusion.p_sample_step({"mean": mean, "log_variance": log_variance}, t, noise)
    if moves is not None:
        y = y + moves[0] * moves[1]
    return y + diffusion.aggregation.shift(encodings, t - 1)


class Ancestral(Sampler):
    """z_{t-1} ~ p(z_{t-1} | z_t) (DDPM algorithm 2). Even timesteps: they lose by any other spacing."""

    spacing = "even"
    renews_noise = True
    shifts_mean = True

    def run(self, z: Tensor, steps: Iterable[int]) -> Tensor:
        """A draw from the model's posterior in each step, as in DDPM; a classifier's gradient moves its mean."""
        draw = self.denoise.arithmetic(ancestral)
        for step in steps:
            estimate = self.denoise(z, step)
            t = torch.full((len(z),), step, device=z.device)
            moves = None if estimate.mean_gradient is None else (estimate.variance, estimate.mean_gradient)
            z = draw(
                self.diffusion, z, t, estimate.x_start, estimate.encodings, estimate.log_variance, moves, self.noise(z)
            )
        return z


class DDIM(Sampler):
    """DDIM (Song et al. 2021) with any eta; 0 is the deterministic rule."""

    def run(self, z: Tensor, steps: Iterable[int]) -> Tensor:
        """DDIM steps; with `eta` 0 the first is made again where a modality is unknown."""
        for step in steps:
            estimate = self.denoise(z, step)
            z = self.second_look(z, step, estimate) if self.eta == 0 else z
            z = self.move(z, step, step - 1, estimate, self.noise(z) if self.eta > 0 else None, self.eta)
        return z


class Heun(Sampler):
    """Heun's rule in lambda = log(sqrt(abar) / sigma): predict, ask again at the end of the step, and average.

    z_0 is taken linear in lambda over the step and integrated with the weight e^lambda that it has there, so the rule stays right
    over long steps; for short ones it is that of Karras et al. 2022, algorithm 1. It goes two timesteps at a time, so that it makes
    as many calls as there are timesteps; the last steps, which end at sigma = 0, are DDIM's.
    """

    def run(self, z: Tensor, steps: Iterable[int]) -> Tensor:
        """Two calls for every second timestep: a step to it by the estimate at its start, then one by the mean of both ends."""
        nodes = list(steps)
        while nodes:
            step = nodes.pop(0)
            estimate = self.denoise(z, step)
            if len(nodes) < 2:
                z = self.move(z, step, nodes[0] if nodes else -1, estimate)
                continue
            to = nodes[1]
            del nodes[0]
            h = float(self.lambdas[to] - self.lambdas[step])
            end_weight = (h + math.expm1(-h)) / (-h * math.expm1(-h))  # of z_0(lambda') in the mean over e^lambda
            ahead = self.denoise(self.move(z, step, to, estimate), to)
            z = self.move(z, step, to, estimate.toward((end_weight, ahead)))
        return z
