"""Where a request for samples becomes a call of Algorithm 1: the one place for pixels and latents, previews and commands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.process import GaussianDiffusion
from ..diffusion.sampling import SAMPLERS, Sample, sample
from ..diffusion.spacing import solver_timesteps
from ..errors import UserError
from ..modalities import Modality
from ..runs.config import Config, SamplingOptions
from .build import respaced

FAR_FROM_NOISE = 0.5  # alpha-tilde_T of an unknown modality that a start at N(0, I) bears


def start_warning(full: GaussianDiffusion, options: SamplingOptions, unknown: Collection[str]) -> str:
    """What to say where the start N(0, I) is far from z_T because of the modalities `unknown`, and the sampler carries that along;
    else ''."""
    largest = max((abs(float(full.aggregation.coefficients[name][-1])) for name in unknown), default=0.0)
    if largest <= FAR_FROM_NOISE or SAMPLERS[options.rule].renews_noise:
        return ""
    return (
        f"the aggregation weights end at alpha-tilde {largest:.1f} on this schedule, so z_T is far from N(0, I), where drawing "
        "begins; only new noise in each step forgets that: take --sampler sde-dpm++ or ddpm, or a model trained with bridge weights"
    )


def take_parents_sampler(config: Config) -> None:
    """Where `--timestep_respacing` says which timesteps to visit and no flag by which sampler, take the one of the code that the
    name comes from: ADM's ancestral steps for its counts, latent-diffusion's DDIM for "ldmN"."""
    respacing = config.timestep_respacing
    if not respacing or config.use_ddim or "sampler" in config.typed or respacing.startswith(("solver", "frame")):
        return
    config[SamplingOptions].sampler = "ddim" if respacing.startswith("ldm") else "ddpm"


def visited(
    full: GaussianDiffusion, options: SamplingOptions, respacing: str = "", in_frame: Collection[str] = ()
) -> GaussianDiffusion:
    """The process `full` on the timesteps that a request visits: those of `respacing` (see `respacing.kept_timesteps`), or
    `options.steps` as its sampler wants them, denser where the shift of the modalities `in_frame` moves, known (own head's
    gradient is steep there) or not.

    Raises UserError where the counts can't be had.
    """
    if respacing:
        return respaced(full, respacing)
    count = min(options.steps, full.num_timesteps)
    if SAMPLERS[options.rule].spacing == "even":
        return respaced(full, str(count))
    coefficients = [full.aggregation.coefficients[name] for name in in_frame]
    return full.respace(solver_timesteps(full.alphas_cumprod, coefficients, count))


def draw(
    network: Callable,
    process: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    shape: Sequence[int],
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    known: Mapping[str, Tensor] | None = None,
    gives: bool = False,
    device: torch.device,
    progress: bool = False,
    start: tuple[Tensor, int] | None = None,
    cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    absent: Collection[str] = (),
    arithmetic: Callable[[Callable], Callable] | None = None,
) -> Sample:
    """One sample of `shape` (C, H, W) per seed, on the timesteps of `process`; see `sampling.sample`.

    gives: the `known` modalities are handed to the network (forms X and any) instead of standing in the frame (U).
    Raises NotFinite.
    """
    drawn = sample(
        network,
        process,
        modalities,
        (len(seeds), *shape),
        known=known,
        sampler=options.rule,
        conditioning="network" if gives else options.mt_condition,
        conditioning_scale=options.mt_condition_scale,
        seeds=seeds,
        clip_denoised=options.clip_denoised,
        dynamic_threshold=options.dynamic_threshold,
        device=device,
        progress=progress,
        eta=options.eta,
        start=start,
        guidance_scale=options.guidance_scale,
        guidance_channels=options.guidance_channels,
        cond_fn=cond_fn,
        clip_before_guidance=options.use_ddim,
        absent=absent,
        arithmetic=arithmetic,
    )
    made = [x for name, x in drawn.modalities.items() if name not in (known or {})]
    refuse_not_finite("the samples", drawn.x_start, *made)
    return drawn


class NotFinite(UserError):
    """What a network made holds NaN or infinity: as pictures it would be black, as figures nothing."""


def refuse_not_finite(what: str, *made: Tensor) -> None:
    """Raises NotFinite where one of the floating-point tensors `made` is not finite. Waits for the device: once per batch."""
    values = [x for x in made if x.is_floating_point()]
    if values and not bool(torch.stack([torch.isfinite(x).all() for x in values]).all()):
        raise NotFinite(
            f"{what} became NaN or infinite, and nothing is made of them: half precision overflowed (take --precision fp32), or "
            "these are the weights of a run that diverged (take an earlier checkpoint, or other averages)"
        )
