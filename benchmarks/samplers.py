"""The samplers' own error at few network calls, with networks whose best is known: no training, Markdown tables.

    python benchmarks/samplers.py [--samples 20000] [--seed 0] [--weights paper,bridge,constant]

1. Without a modality, beside PyPI's diffusers: pixels of variance 0.3, 1 and 2.2, the largest relative error of the variance drawn.
   A deterministic rule is linear there, so its error is exact; the stochastic ones are drawn --samples times. On the straight path
   the network predicts the velocity, on the others eps.
2. With an unknown modality: Frechet distance of drawn to true z_0 (12 dimensions); exact draws are about 25 / samples away.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from gaussian import JointGaussian, frechet, prediction_on

from guided_mt.diffusion.aggregation import Aggregation
from guided_mt.diffusion.process import GaussianDiffusion, ModelVarType
from guided_mt.diffusion.respacing import kept_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.schedules import get_named_beta_schedule
from guided_mt.modalities import ImageModality

VARIANCES = np.array([0.3, 1.0, 2.2])
CALLS = (10, 20, 50)
STOCHASTIC = ("ddpm", "sde-dpm++")


def betas_of(schedule: str) -> np.ndarray:
    """beta_t [1000] of ADM's schedules, and of latent-diffusion's, linear in sqrt(beta)."""
    if schedule == "ldm":
        return np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    return get_named_beta_schedule(schedule, 1000)


def process(schedule: str, weights: str = "none") -> GaussianDiffusion:
    betas = betas_of(schedule)
    return GaussianDiffusion(
        betas=betas,
        model_mean_type="eps" if schedule == "ldm" else prediction_on(schedule),
        model_var_type=ModelVarType.FIXED_SMALL,
        aggregation=Aggregation.from_weights({"x": weights}, betas),
    )


def best(full: GaussianDiffusion) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(z [B, 3, 1, 1], t [B]) -> the prediction that `full` asks for, with the best network for pixels with VARIANCES."""
    variances = torch.from_numpy(VARIANCES).view(1, 3, 1, 1)

    def network(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = float(full.alphas_cumprod[int(t[0])])
        marginal = abar * variances + 1 - abar
        z_0, eps = np.sqrt(abar) * variances / marginal * z, np.sqrt(1 - abar) / marginal * z
        return full.target.wanted(full, z_0, eps, z, t)

    return network


def best_eps(alphas_cumprod: np.ndarray) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """(z [B, 3, 1, 1], t) -> E[eps | z_t] of pixels with VARIANCES; between timesteps abar is interpolated in log SNR."""
    variances = torch.from_numpy(VARIANCES).view(1, 3, 1, 1)
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))

    def eps(z: torch.Tensor, t: float) -> torch.Tensor:
        abar = 1 / (1 + np.exp(-np.interp(t, np.arange(len(log_snr)), log_snr)))
        return np.sqrt(1 - abar) * z / (abar * variances + 1 - abar)

    return eps


def ours(schedule: str, sampler: str, spacing: str, samples: int, seed: int) -> float:
    full = process(schedule)
    kept = full.respace(kept_timesteps(full, spacing))
    count = samples if sampler in STOCHASTIC else 1
    unit = torch.ones(1, 3, 1, 1, dtype=torch.float64), kept.num_timesteps - 1
    z = sample(
        best(full),
        kept,
        {},
        (count, 3, 1, 1),
        sampler=sampler,
        seeds=torch.arange(count) + seed * 1_000_000,
        clip_denoised=False,
        start=unit if count == 1 else None,
    ).x_start.double()
    drawn = z.square().mean(dim=(0, 2, 3)).numpy()
    return float(np.abs(drawn / VARIANCES - 1).max())


def diffusers_schedulers() -> dict[str, Callable]:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    dpm, unipc = DPMSolverMultistepScheduler, UniPCMultistepScheduler
    return {
        "DPM++ 2M": lambda betas: dpm(trained_betas=betas),
        "DPM++ 2M, Karras": lambda betas: dpm(trained_betas=betas, use_karras_sigmas=True),
        "DPM++ 2M, even in log SNR": lambda betas: dpm(trained_betas=betas, use_lu_lambdas=True, euler_at_final=True),
        "UniPC": lambda betas: unipc(trained_betas=betas),
        "UniPC, Karras": lambda betas: unipc(trained_betas=betas, use_karras_sigmas=True),
    }


def euler(make: Callable, count: int) -> float:
    """diffusers' rule of flow models, on the straight path alone."""
    scheduler, variances = make(), torch.from_numpy(VARIANCES).view(1, 3, 1, 1)
    scheduler.set_timesteps(count)
    z = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        tau = float(sigma)
        velocity = (tau - (1 - tau) * variances) / ((1 - tau) ** 2 * variances + tau**2) * z
        z = scheduler.step(velocity, t, z).prev_sample.double()
    return float(np.abs(z.square().flatten().numpy() / VARIANCES - 1).max())


def theirs(schedule: str, make: Callable, count: int) -> float:
    if schedule == "straight":
        return float("nan")  # its betas end at 1, which these rules don't take
    betas = betas_of(schedule)
    scheduler, eps = make(betas), best_eps(np.cumprod(1 - betas))
    scheduler.set_timesteps(count)
    scheduler.set_begin_index(0)  # rounded timesteps may repeat
    z = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        z = scheduler.step(eps(z, float(t)), t, z).prev_sample
    return float(np.abs(z.square().flatten().numpy() / VARIANCES - 1).max())


def with_a_modality(schedule: str, weights: str, sampler: str, spacing: str, samples: int, seed: int) -> float:
    data, full = JointGaussian.make(12, seed=1), process(schedule, weights)
    drawn = sample(
        data.network_u(full),
        full.respace(kept_timesteps(full, spacing)),
        {"x": ImageModality("x")},
        (samples, 3, 2, 2),
        sampler=sampler,
        seeds=torch.arange(samples) + seed * 1_000_000,
        clip_denoised=False,
    )
    z = drawn.x_start.flatten(1).double().numpy()
    return frechet(z.T @ z / len(z), data.cov_z)


def table(head: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[float]]], digits: int) -> None:
    columns = list(columns)
    print(f"\n| {head} | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, values in rows:
        cells = ["-" if np.isnan(value) else f"{value:.{digits}f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--weights", default="paper,bridge,constant", help="aggregation weights of the modality, as in paper,early"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # diffusers', of numpy
    drawn = (args.samples, args.seed)
    cells = [(schedule, count) for schedule in ("cosine", "linear", "straight", "ldm") for count in CALLS]
    columns = [f"{schedule} {count}" for schedule, count in cells]
    rows = [
        (f"ours: {sampler}, {spacing or 'even'}", [ours(s, sampler, f"{spacing}{n}", *drawn) for s, n in cells])
        for sampler in SAMPLERS
        for spacing in ("solver", "")
    ]
    rows += [(f"diffusers: {n}", [theirs(s, make, c) for s, c in cells]) for n, make in diffusers_schedulers().items()]
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    rows.append(("diffusers: Euler", [euler(Euler, c) if s == "straight" else float("nan") for s, c in cells]))
    table("no modality: relative error of the variance", columns, rows, 3)
    for schedule in ("cosine", "linear", "straight"):
        weights = args.weights.split(",")
        columns = [f"{w} {count}" for w in weights for count in CALLS]
        rows = []
        for sampler in SAMPLERS:
            spacing = "solver" if SAMPLERS[sampler].spacing == "solver" else ""
            cell = [with_a_modality(schedule, w, sampler, f"{spacing}{n}", *drawn) for w in weights for n in CALLS]
            rows.append((sampler, cell))
        rows.append(
            ("ddpm, 250", [with_a_modality(schedule, w, "ddpm", "250", *drawn) for w in weights for _ in CALLS])
        )
        table(f"{schedule}, x unknown: Frechet distance", columns, rows, 4)


if __name__ == "__main__":
    main()
