"""Filling in masked images: MT-Diffusion's own way and the methods of Table 1 on an un-conditional model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.network import as_denoising
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..runs.config import SamplingOptions
from .build import respaced
from .drawing import refuse_not_finite
from .generate import Generator

# RePaint's published setting, with jumps of 10 repeated 10 times; --steps and --sampler don't apply.
REPAINT_STEPS = 250
METHODS = ("mt", "sdedit", "repaint", "none")


def restore(
    method: str,
    generator: Generator,
    settings: SamplingOptions,
    masked: Tensor,
    keep: Tensor,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    strength: float = 0.5,
    repaint_resamples: int = 10,
) -> Tensor:
    """Images [B, 3, S, S] for `masked` ones in [-1, 1] and `keep` [B, 1, S, S] (1 where the image stays).

    'mt': the masked image is a known modality; 'sdedit': noise it to `strength` of the way and denoise (Table 1's SDEdit-);
    'repaint': RePaint's resampling, the only one that is told where the mask is; 'none': the masked image as it is. In latents the
    last two work on the masked image's latent, of which `repaint` keeps what lies below no masked pixel.
    Raises UserError for a model that a method can't use.
    """
    space = generator.space
    if method == "none":
        return masked
    if method == "mt":
        name = next((name for name, modality in generator.modalities.items() if modality.is_mask), None)
        if name is None:
            raise UserError("--method mt needs a model trained with --mt_task masked; this one has no masked images")
        known = {name: generator.modalities[name].enter(masked)}
        return space.decode(generator.draw(seeds, settings, known, labels).x_start)
    if method == "sdedit":
        start = space.encode(masked), strength
        return space.decode(generator.draw_unconditional(seeds, settings, labels, noised=start))
    full = generator.process
    steps = generator.timestep_respacing or str(min(REPAINT_STEPS, full.num_timesteps))
    network, kept = generator.unconditional(labels), -F.adaptive_max_pool2d(-keep, space.size)
    z = repaint(network, respaced(full, steps), space.encode(masked), kept, seeds, resamples=repaint_resamples)
    return space.decode(z)


def repaint_schedule(num_timesteps: int, jump: int = 10, resamples: int = 10) -> Iterator[tuple[int, int]]:
    """RePaint's walk as pairs (from, to) of noise levels, T = noise and 0 = clean: from levels 1, 1 + jump, ... below T - jump it
    goes back up by `jump`, `resamples` - 1 times each."""
    left = dict.fromkeys(range(1, num_timesteps - jump + 1, jump), resamples - 1)
    level = num_timesteps
    while level > 0:
        yield level, level - 1
        level -= 1
        if left.get(level, 0) > 0:
            left[level] -= 1
            for _ in range(jump):
                yield level, level + 1
                level += 1


@torch.no_grad()
def repaint(
    model: Callable,
    diffusion: GaussianDiffusion,
    known: Tensor,
    keep: Tensor,
    seeds: Sequence[int],
    *,
    jump: int = 10,
    resamples: int = 10,
) -> Tensor:
    """RePaint (Lugmayr et al. 2022, algorithm 1): after each step the unmasked part is replaced by the noised image."""
    streams = SampleStreams(torch.as_tensor(seeds), device=known.device)
    network, y = as_denoising(model), streams.normal(*known.shape[1:])
    for level, to in repaint_schedule(diffusion.num_timesteps, jump, resamples):
        t = torch.full(
            (len(y),), min(level, to), device=y.device
        )  # the step between two levels has the lower one's number
        noise = streams.normal(*known.shape[1:])
        if to > level:
            beta = diffusion.at("betas", t, y)
            y = torch.sqrt(1 - beta) * y + torch.sqrt(beta) * noise
            continue
        output = network(y, diffusion.model_timesteps(t), {}).output
        y = diffusion.p_sample_step(diffusion.p_mean_variance_from_output(output, y, t), t, noise)
        at_level = known if to == 0 else diffusion.q_sample(known, t - 1, streams.normal(*known.shape[1:]))
        y = torch.where(keep > 0, at_level, y)
    refuse_not_finite("the restored images", y)
    return y
