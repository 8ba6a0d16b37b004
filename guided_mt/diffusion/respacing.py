"""Fewer timesteps than in training: which to keep, and the process that keeps their marginals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .aggregation import Aggregation
from .process import GaussianDiffusion, LossType, ModelVarType
from .schedules import get_named_beta_schedule
from .spacing import solver_timesteps


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> list[int]:
    """Sorted timesteps to keep out of 0..num_timesteps-1, by ADM's rules.

    "ddimN": the fixed stride that gives exactly N steps, starting at 0 (DDIM). "a,b,c" or a list: the timesteps are cut into
    equal sections, with a, b, c evenly spaced steps in each, both ends included. A single number is one section.
    Raises ValueError where the counts can't be had.
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
            raise ValueError(f"timestep_respacing: can't take {count} steps from a section of {length}")
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
        raise ValueError(f"timestep_respacing '{whole}': write '250', 'ddim25', '10,15,20' or 'solver20'") from None


def _fixed_stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        steps = list(range(0, num_timesteps, stride))
        if len(steps) == count:
            return steps
    raise ValueError(
        f"timestep_respacing: no whole-number stride gives {count} of {num_timesteps} steps; use '{count}'"
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
    predict_v: bool = False,
    prediction: str = "eps",
    timestep_weights: str = "uniform",
    mt_weights: Mapping[str, str] | None = None,
) -> GaussianDiffusion:
    """ADM's function of this name, plus predict_v, timestep_weights (a name of `weighting.TIMESTEP_WEIGHTS`) and mt_weights
    {modality name: aggregation weights name}.

    prediction: what the network predicts, a name of `targets.TARGETS`; predict_xstart and predict_v stand for "x0" and "v".
    timestep_respacing: see `kept_timesteps`. Raises ValueError for settings that contradict each other.
    """
    if predict_v and predict_xstart:
        raise ValueError("predict_v and predict_xstart exclude each other: a network predicts one of them")
    asked = "v" if predict_v else "x0" if predict_xstart else prediction
    if prediction not in ("eps", asked):
        raise ValueError(
            f"prediction {prediction} contradicts predict_{'v' if predict_v else 'xstart'}; give one of them"
        )
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
        model_mean_type=asked,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        aggregation=Aggregation.from_weights(mt_weights or {}, betas),
        timestep_weights=timestep_weights,
    )
    # Always respaced, as ADM does: its betas are recomputed from abar_t even when every step is kept.
    return base.respace(kept_timesteps(base, timestep_respacing))


def kept_timesteps(diffusion: GaussianDiffusion, timestep_respacing: str | Sequence[int]) -> list[int]:
    """The timesteps that a spacing keeps of a process; "" keeps all.

    "solverN": the N that few-step solvers use best (`spacing.solver_timesteps`), also by its former name "frameN"; else one of
    ADM's, see `space_timesteps`. Raises ValueError where the counts can't be had.
    """
    steps = diffusion.num_timesteps
    for name in ("solver", "frame"):
        if isinstance(timestep_respacing, str) and timestep_respacing.startswith(name):
            count = _count(timestep_respacing.removeprefix(name), timestep_respacing)
            return solver_timesteps(diffusion.alphas_cumprod, diffusion.aggregation.coefficients.values(), count)
    return space_timesteps(steps, timestep_respacing or [steps])
