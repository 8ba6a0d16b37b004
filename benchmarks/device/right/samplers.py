"""Every sampler with the exact denoiser of a Gaussian, in float32 on the device against float64 on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.spacing import solver_timesteps

from ..runner import Stage, within
from .arithmetic import FLOAT32, distance

CALLS, BATCH, SHAPE = 10, 8, (3, 16, 16)
MEAN, STD = 0.2, 0.4


def run(stage: Stage) -> None:
    for name in SAMPLERS:
        stage.check(f"sampler: {name}", lambda name=name: compare(name, stage.device))


class Exact:
    """eps of N(MEAN, STD^2): E[eps | y] = sqrt(1 - abar) (y - sqrt(abar) MEAN) / (abar STD^2 + 1 - abar)."""

    def __init__(self, full: GaussianDiffusion):
        self.abar = torch.from_numpy(full.alphas_cumprod)

    def __call__(self, y: Tensor, t: Tensor) -> Tensor:
        abar = self.abar.to(y.device, y.dtype)[t.long()].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (y - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)


def compare(name: str, device: torch.device) -> dict[str, Any]:
    """The relative error of the samples."""
    full = create_gaussian_diffusion(steps=1000, noise_schedule="linear")
    process = full.respace(solver_timesteps(full.alphas_cumprod, [], CALLS))
    noise = SampleStreams(torch.arange(BATCH)).normal(*SHAPE)
    made = {}
    for place, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        start = noise.to(place, dtype), process.num_timesteps - 1
        options: dict[str, Any] = {"sampler": name, "seeds": range(BATCH), "device": place, "start": start}
        made[dtype] = sample(Exact(full), process, {}, (BATCH, *SHAPE), clip_denoised=False, **options).x_start
    # y is divided by sqrt(abar) at the first timestep, which makes its rounding so much larger; then some ten roundings a call.
    largest = float(process.sqrt_recip_alphas_cumprod[-1])
    allowed = FLOAT32 * (largest + 16) * math.sqrt(10 * CALLS)
    return within(distance(made[torch.float32], made[torch.float64]), allowed, std=float(made[torch.float32].std()))
