"""Algorithm 1: draw z_0 and every unknown modality, any subset of them given, by any sampler (docs/method.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network import as_denoising
from ..process import GaussianDiffusion
from ..random import SampleStreams
from .denoiser import CONDITIONINGS, Denoiser, Modality
from .registry import SAMPLERS


@dataclass
class Sample:
    """x_start [B, C, H, W] and the value of every modality: the given ones, and the heads' last word on the others."""

    x_start: Tensor
    modalities: dict[str, Tensor]


def sample(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    shape: Sequence[int],
    *,
    known: Mapping[str, Tensor] | None = None,
    sampler: str = "ddpm",
    conditioning: str = "own-head",
    conditioning_scale: float = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    clip_denoised: bool = True,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    start: tuple[Tensor, int] | None = None,
    guidance_scale: float = 1.0,
    cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    clip_before_guidance: bool = False,
    dynamic_threshold: float = 0.0,
    absent: Collection[str] = (),
    arithmetic: Callable[[Callable], Callable] | None = None,
) -> Sample:
    """Draw z_0 of `shape` (B, C, H, W) and every unknown modality (Algorithm 1).

    model: (z_t, t, modalities) -> ModelOutput, or ADM's model (see `network.as_denoising`). modalities: {name: modality}; known:
    {name: x}, any subset. With conditioning "network" the known ones leave the frame and are handed to the model (forms X
    and any); with "own-head" they stay in the frame and eps is corrected by the gradient of the heads' log probability,
    times `conditioning_scale` (form U); "algorithm1" is the paper's printed rule, which only puts them into the frame. With
    "own-head" and further, unknown modalities these are estimated from z_t alone, not from the known ones: separate heads don't
    hold their dependence; "network" is exact for any mix.
    The network is called as often as `diffusion` has timesteps, whatever the sampler. seeds: one integer per sample (default: drawn
    from torch's generator); a sample depends on its own seed and conditions alone. eta is DDIM's.
    start: (y_t [B, C, H, W], t) begins there instead of with noise at the last timestep (SDEdit).
    guidance_scale: classifier-free guidance, eps = eps_u + scale (eps - eps_u) (Ho and Salimans 2022, with scale = 1 + w);
    other than 1 it needs a model that takes `unconditional` bool [B], the samples to be seen without any condition (`MultiTask`).
    With a further modality unknown it is approximate: y_t is then known only as far as that one is.
    cond_fn: (y_t [B, C, H, W], the network's timesteps [B]) -> scaled gradient of log p(condition | y_t), as of a separate
    classifier: ancestral steps add variance * gradient to their mean (ADM algorithm 1), the others shift eps (algorithm 2).
    clip_before_guidance: clip z_0 before that shift and not after it, as ADM's DDIM does, whose z_0 may then leave [-1, 1].
    dynamic_threshold: clip z_0 to that percentile of each sample's values, if it is above 1, and scale back (Imagen); 0: off.
    absent: modalities that the samples are to have none of, as images in training that lacked them: they stand in no frame, and the
    model is told by `absent` {name: bool [B]}, see `MultiTask`. Others are known or unknown.
    arithmetic: as `torch.compile`, what the arithmetic between calls of the network is called through; None: nothing.
    Raises ValueError for names, shapes and counts that don't fit.
    """
    known = dict(known or {})
    _check(modalities, known, shape, sampler, conditioning, seeds, absent)
    device = torch.device(device) if device is not None else _device_of(model, known)
    known = {name: x.to(device) for name, x in known.items()}
    if seeds is None:
        seeds = torch.randint(2**62, (shape[0],))
    streams, rule = SampleStreams(torch.as_tensor(seeds), device=device), SAMPLERS[sampler]
    if arithmetic is not None:
        diffusion.prepare(device)
    with torch.no_grad():
        denoise = Denoiser(
            as_denoising(model),
            diffusion,
            modalities,
            known,
            {n: m.prior(shape[1:], streams) for n, m in modalities.items() if n not in known and n not in absent},
            conditioning=conditioning,
            conditioning_scale=conditioning_scale,
            guidance_scale=guidance_scale,
            cond_fn=cond_fn,
            clip_before_guidance=clip_before_guidance,
            shifts_mean=rule.shifts_mean,
            clip_denoised=clip_denoised,
            dynamic_threshold=dynamic_threshold,
            absent=absent,
            arithmetic=arithmetic,
        )
        y, first = start if start is not None else (streams.normal(*shape[1:]), diffusion.num_timesteps - 1)
        t = torch.full((shape[0],), first, device=device)
        z = y.to(device) + diffusion.aggregation.shift(denoise.encodings, t)
        z = rule(denoise, streams, eta).run(z, diffusion.reversed_steps(progress, first))
    return Sample(z, {**known, **denoise.unknown})


def _device_of(model: Callable, known: Mapping[str, Tensor]) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    for x in known.values():
        return x.device
    return torch.device("cpu")


def _check(
    modalities: Mapping[str, Modality],
    known: Mapping[str, Tensor],
    shape: Sequence[int],
    sampler: str,
    conditioning: str,
    seeds: Sequence[int] | Tensor | None,
    absent: Collection[str],
) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler '{sampler}'; choose from {', '.join(SAMPLERS)}")
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"unknown conditioning '{conditioning}'; choose from {', '.join(CONDITIONINGS)}")
    for name, x in known.items():
        if name not in modalities:
            raise ValueError(f"unknown modality '{name}' in known; this model has: {', '.join(modalities) or 'none'}")
        if len(x) != shape[0]:
            raise ValueError(f"known['{name}'] has {len(x)} samples, but shape asks for {shape[0]}")
    for name in absent:
        if name not in modalities or name in known:
            why = "both known and absent" if name in known else "no modality of this model"
            raise ValueError(f"absent modality '{name}' is {why}")
    if seeds is not None and len(seeds) != shape[0]:
        raise ValueError(f"{len(seeds)} seeds for {shape[0]} samples: give one per sample")
