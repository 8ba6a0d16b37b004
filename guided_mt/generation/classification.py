"""p(class | image) by a network that reads noisy images: a model's label head, or a classifier of its own.

Both are averaged over timesteps and noise draws. An image's noise comes from its own streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..diffusion.aggregation import Aggregation
from ..diffusion.network import as_denoising
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..modalities import Modality
from .drawing import refuse_not_finite

DEFAULT_TIMESTEPS = (0.0, 0.04, 0.08, 0.12)  # of T: little noise
SMALL_FRAME = 0.05  # a larger alpha-tilde would let the first guess of the label colour what the head sees


def read_timesteps(text: str, num_timesteps: int, aggregation: Aggregation | None = None) -> list[int]:
    """'0,20,40' -> those, the largest first; '' -> DEFAULT_TIMESTEPS of num_timesteps, or of the part of them up to which every
    alpha-tilde of `aggregation` stays under SMALL_FRAME. Raises UserError for others than 0..T-1."""
    if not text.strip():
        small = num_timesteps
        for coefficients in (aggregation.coefficients if aggregation else {}).values():
            large = np.flatnonzero(np.abs(coefficients) > SMALL_FRAME)
            last = max(DEFAULT_TIMESTEPS) * num_timesteps
            small = min(small, int(num_timesteps * large[0] / last) if len(large) and large[0] < last else small)
        return sorted({int(share * small) for share in DEFAULT_TIMESTEPS}, reverse=True)
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) >= num_timesteps:
            raise UserError(
                f"--timesteps {text}: '{word}' is no timestep of this network; write some of 0 to {num_timesteps - 1}, as in 0,20"
            )
    return sorted({int(word) for word in words}, reverse=True)


@torch.no_grad()
def head_estimates(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    x_start: Tensor,
    timesteps: Sequence[int],
    draws: int,
    streams: SampleStreams,
    name: str = "label",
) -> Tensor:
    """The estimates [B, ...] of modality `name` by its head, averaged over `timesteps` and `draws` noises at each: for a label the
    probabilities [B, K].

    x_start [B, C, H, W] is known; all `modalities` are unknown and stand in the frame. As in Algorithm 1 they start from their
    priors at the largest timestep. What their heads estimate there, averaged over the draws, is encoded into the frame of the next.
    model: (z_t, t, modalities) -> ModelOutput of form U or any, given no modality.
    """
    network = as_denoising(model)
    unknown = {n: modality.prior(x_start.shape[1:], streams) for n, modality in modalities.items()}
    total = torch.zeros_like(unknown[name])
    for step in sorted(timesteps, reverse=True):
        t = torch.full((len(x_start),), step, device=x_start.device)
        frame = diffusion.aggregation.shift({n: modalities[n].encode(x) for n, x in unknown.items()}, t)
        sums = {n: torch.zeros_like(x) for n, x in unknown.items()}
        for _ in range(draws):
            y_t = diffusion.q_sample(x_start, t, streams.normal(*x_start.shape[1:]))
            predictions = network(y_t + frame, diffusion.model_timesteps(t), {}).predictions
            for n, modality in modalities.items():
                sums[n] += modality.estimate(predictions[n])
        unknown = {n: x / draws for n, x in sums.items()}
        total += unknown[name]
    refuse_not_finite("what the head says", total)
    return total / len(timesteps)


@torch.no_grad()
def classifier_probabilities(
    classifier: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    timesteps: Sequence[int],
    draws: int,
    streams: SampleStreams,
) -> Tensor:
    """[B, K]: softmax of classifier(y_t, model timesteps) for x_start [B, C, H, W], averaged over `timesteps` and `draws`.

    With draws = 0 it sees the images themselves, as one trained with --noised False does.
    """
    seen = []
    for step in timesteps:
        t = torch.full((len(x_start),), step, device=x_start.device)
        for _ in range(max(1, draws)):
            y_t = diffusion.q_sample(x_start, t, streams.normal(*x_start.shape[1:])) if draws else x_start
            seen.append(classifier(y_t, diffusion.model_timesteps(t)).float().softmax(dim=-1))
    probabilities = torch.stack(seen).mean(dim=0)
    refuse_not_finite("the classifier's probabilities", probabilities)
    return probabilities


@torch.no_grad()
def noised_probabilities(
    classifier: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    streams: SampleStreams,
) -> Tensor:
    """[B, K] for images [B, C, H, W] at one timestep each, uniform over all: what the classifier is trained on."""
    t = streams.integers(diffusion.num_timesteps)
    y_t = diffusion.q_sample(x_start, t, streams.normal(*x_start.shape[1:]))
    return classifier(y_t, diffusion.model_timesteps(t)).float().softmax(dim=-1)
