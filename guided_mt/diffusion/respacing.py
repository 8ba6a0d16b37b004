"""Fewer timesteps than in training: which to keep, and the process that keeps their marginals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from .aggregation import Aggregation
from .process import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> list[int]:
    """Sorted timesteps to keep out of 0..num_timesteps-1, by ADM's rules.

    "ddimN": the fixed stride that gives exactly N steps, starting at 0 (DDIM). "a,b,c" or a list: the timesteps are cut into
    equal sections, with a, b, c evenly spaced steps in each, both ends included. A single number is one section.
    Raises UserError where the counts can't be had.
    """
    if isinstance(section_counts, int):
        section_counts = [section_counts]
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _fixed_stride(num_timesteps, _count(section_counts[4:], section_counts))
        section_counts = [_count(part, section_counts) for part in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(section_counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(section_counts):
        length = size + (i < extra)
        if not 0 < count <= length:
            raise UserError(f"timestep_respacing: can't take {count} steps from a section of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):  # summed up as in ADM, whose rounding of the sum decides between neighbours
            kept.append(start + round(position))
            position += stride
        start += length
    return sorted(set(kept))


def _count(text: str, whole: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"timestep_respacing '{whole}': write '250', 'ddim25' or '10,15,20'") from None


def _fixed_stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        steps = list(range(0, num_timesteps, stride))
        if len(steps) == count:
            return steps
    raise UserError(f"timestep_respacing: no whole-number stride gives {count} of {num_timesteps} steps; use '{count}'")


def frame_timesteps(aggregation: Aggregation, num_timesteps: int, count: int) -> list[int]:
    """`count` sorted timesteps, evenly spaced but denser where the frame moves, both ends included.

    Their density is 1/T plus 0.3 times each modality's share |alpha-tilde_t - alpha-tilde_{t-1}| of its total variation. For
    unknown modalities that is where deterministic samplers err: on a Gaussian of variance 5.4 with `paper` weights, 50
    DPM-Solver++ steps end 0.025 from the data this way and 0.089 evenly spaced; ancestral steps lose by it, 0.026 against 0.019
    (benchmarks/samplers.py). Raises UserError if count is not in 2..num_timesteps.
    """
    if not 2 <= count <= num_timesteps:
        raise UserError(f"steps: can't take {count} steps of {num_timesteps}; choose 2..{num_timesteps}")
    density = np.full(num_timesteps, 1.0 / num_timesteps)
    for coefficients in aggregation.coefficients.values():
        variation = np.abs(np.diff(np.append(0.0, coefficients)))
        if variation.any():
            density += 0.3 * variation / variation.sum()
    reached = np.cumsum(density) - density[0]
    kept = np.interp(np.linspace(0, reached[-1], count), reached, np.arange(num_timesteps)).round().astype(int)
    forward = np.maximum.accumulate(kept - np.arange(count)) + np.arange(count)  # distinct, pushing up ...
    backward = np.arange(num_timesteps - count, num_timesteps)  # ... but leaving room for what is above
    return np.minimum(forward, backward).tolist()


def respace(diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> GaussianDiffusion:
    """The process that keeps abar_t and alpha-tilde_t at `timesteps` (local indices), so all kept marginals (DESIGN 2.2)."""
    kept = sorted(set(timesteps))
    abar = diffusion.alphas_cumprod[kept]
    return GaussianDiffusion(
        betas=1 - abar / np.append(1.0, abar[:-1]),
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        rescale_timesteps=diffusion.rescale_timesteps,
        aggregation=diffusion.aggregation.respace(kept),
        timestep_map=diffusion.timestep_map[kept],
        original_num_steps=diffusion.original_num_steps,
    )


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
    mt_weights: Mapping[str, str] | None = None,
) -> GaussianDiffusion:
    """ADM's function of this name, plus `mt_weights` {modality name: aggregation weights name}.

    timestep_respacing: see `space_timesteps`, or "frameN" for N steps of `frame_timesteps`.
    """
    betas = get_named_beta_schedule(noise_schedule, steps)
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    base = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        aggregation=Aggregation.from_weights(mt_weights or {}, betas),
    )
    # Always through respace, as ADM does: its betas are recomputed from abar_t even when every step is kept.
    return respace(base, kept_timesteps(base, timestep_respacing))


def kept_timesteps(diffusion: GaussianDiffusion, timestep_respacing: str | Sequence[int]) -> list[int]:
    """The timesteps of `space_timesteps`, or of "frameN", see `frame_timesteps`; "" keeps all. Raises UserError."""
    steps = diffusion.num_timesteps
    if isinstance(timestep_respacing, str) and timestep_respacing.startswith("frame"):
        return frame_timesteps(diffusion.aggregation, steps, _count(timestep_respacing[5:], timestep_respacing))
    return space_timesteps(steps, timestep_respacing or [steps])
