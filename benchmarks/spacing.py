"""How the constants of `guided_mt.diffusion.spacing` were found: the closed-form error of Gaussians, minimised.

    python benchmarks/spacing.py [--iterations 60]

Every pixel is a Gaussian with its best network, so a deterministic rule multiplies it by a number, and the error of what is drawn
is known exactly: no sampling. Variances 0.03 to 4; cosine, linear, latent-diffusion's and Stable Diffusion's schedules; DDIM,
DPM-Solver++ and UniPC at 8 to 50 calls. FRAME is then the best of a few values with an unknown modality in the frame.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize

from guided_mt.diffusion import spacing
from guided_mt.diffusion.aggregation import Aggregation
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion, ModelVarType
from guided_mt.diffusion.sampling import sample
from guided_mt.diffusion.schedules import get_named_beta_schedule
from guided_mt.modalities import ImageModality

VARIANCES = np.array([0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.2, 4.0])
# (Var z_0, Var x, Cov) per channel, with a modality
JOINT = np.array(
    [[0.5, 0.4, 0.35], [0.5, 0.4, 0], [0.1, 0.1, 0.09], [1, 1, 0.9], [2, 0.5, 0.7], [0.3, 0.3, -0.2], [0.3, 2, 0.5]]
)
CALLS = (8, 10, 15, 20, 30, 50)
SAMPLERS = {"ddim": 0.5, "dpm++": 1.0, "unipc": 1.0}  # and their shares of the objective


def processes(weights: str) -> list[GaussianDiffusion]:
    ends = ((0.0015, 0.0195), (0.00085, 0.012))  # latent-diffusion's default and Stable Diffusion's
    schedules = [get_named_beta_schedule(name, 1000) for name in ("cosine", "linear")]
    schedules += [np.linspace(start**0.5, end**0.5, 1000) ** 2 for start, end in ends]
    return [
        GaussianDiffusion(
            betas=betas,
            model_var_type=ModelVarType.FIXED_SMALL,
            aggregation=Aggregation.from_weights({"x": weights}, betas),
        )
        for betas in schedules
    ]


def best_network(full: GaussianDiffusion, joint: np.ndarray) -> Callable:
    """E[eps | z_t] and E[x | z_t] of channels with (Var z_0, Var x, Cov) `joint` [C, 3]."""
    of_z, of_x, cross = (torch.from_numpy(column).view(1, -1, 1, 1) for column in joint.T)

    def network(z: torch.Tensor, t: torch.Tensor, modalities: dict) -> ModelOutput:
        abar, b = full.alphas_cumprod[int(t[0])], full.aggregation.coefficients["x"][int(t[0])]
        a = math.sqrt(abar)
        whole = abar * of_z + 2 * a * b * cross + b * b * of_x + 1 - abar
        return ModelOutput(math.sqrt(1 - abar) * z / whole, {"x": (a * cross + b * of_x) / whole * z})

    return network


def errors(full: GaussianDiffusion, joint: np.ndarray, sampler: str, count: int) -> np.ndarray:
    """Relative errors of the variances drawn, [C]."""
    coefficients = [c for c in full.aggregation.coefficients.values() if c.any()]
    kept = full.respace(spacing.solver_timesteps(full.alphas_cumprod, coefficients, count))
    start = torch.ones(1, len(joint), 1, 1, dtype=torch.float64), count - 1
    modalities = {"x": ImageModality("x", channels=len(joint))}
    drawn = sample(
        best_network(full, joint),
        kept,
        modalities,
        start[0].shape,
        sampler=sampler,
        seeds=[0],
        clip_denoised=False,
        start=start,
    )
    return np.abs(drawn.x_start.flatten().numpy() ** 2 / joint[:, 0] - 1)


def objective(values: np.ndarray, plain: list[GaussianDiffusion], joint: np.ndarray) -> float:
    """Mean logarithm of the largest error of the middle variances, plus a share of the largest of all."""
    spacing.START, spacing.FLOOR = float(values[0]), 1 / (1 + math.exp(-float(values[1])))
    total = 0.0
    for full in plain:
        for sampler, share in SAMPLERS.items():
            for count in CALLS:
                found = errors(full, joint, sampler, count)
                total += share * math.log(1e-3 + found[2:7].max() + 0.3 * found.max())
    return total / (len(plain) * len(CALLS) * sum(SAMPLERS.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    args = parser.parse_args()
    plain, joint = processes("none"), np.stack([VARIANCES, 1 + 0 * VARIANCES, 0 * VARIANCES], axis=1)
    written = np.array([spacing.START, math.log(spacing.FLOOR / (1 - spacing.FLOOR))])
    print(f"as written: START {spacing.START}, FLOOR {spacing.FLOOR}: {objective(written, plain, joint):.4f}")
    print(f"even in log SNR: {objective(np.array([-100.0, 0.0]), plain, joint):.4f}", flush=True)
    found = minimize(
        objective,
        np.array([-2.0, -2.0]),
        args=(plain, joint),
        method="Nelder-Mead",
        options={"maxiter": args.iterations, "xatol": 0.02, "fatol": 1e-3},
    )
    print(f"found: START {found.x[0]:.3f}, FLOOR {1 / (1 + math.exp(-found.x[1])):.4f}: {found.fun:.4f}")
    spacing.START, spacing.FLOOR = float(found.x[0]), 1 / (1 + math.exp(-float(found.x[1])))
    framed = [full for weights in ("bridge", "constant") for full in processes(weights)]
    for frame in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5):
        spacing.FRAME = frame
        worst = {
            sampler: np.mean(
                [math.log(2e-3 + errors(full, JOINT, sampler, n).max()) for full in framed for n in (10, 20)]
            )
            for sampler in SAMPLERS
        }
        print(f"FRAME {frame}: " + ", ".join(f"{sampler} {value:.3f}" for sampler, value in worst.items()), flush=True)


if __name__ == "__main__":
    main()
