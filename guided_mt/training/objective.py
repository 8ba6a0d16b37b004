"""Algorithm 2: ADM's loss in the moving frame plus lambda times one term per modality (eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..modalities import Images, Modality
from ..modalities.tokens import rms


@dataclass
class Losses:
    """All [B]. `loss` is what is minimised: `denoising` (ADM's loss) plus the weighted terms of the modalities. `terms` {name:
    values} are its parts, unweighted; `encoding_rms` {name: values} the sizes of the encodings in the frame. `multi_task` is 0 for
    the samples that were trained unconditionally (`mt_drop_prob`), else 1; `predicted` {name: values} is 1 where
    a head's term tells how well it predicts: not for those samples, nor where form any was given the modality."""

    loss: Tensor
    denoising: Tensor
    terms: dict[str, Tensor]
    encoding_rms: dict[str, Tensor]
    multi_task: Tensor
    predicted: dict[str, Tensor]


def multi_task_losses(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    images: Images,
    t: Tensor,
    noise: Tensor,
    streams: SampleStreams,
    *,
    variant: str = "U",
    loss_weight: float | Mapping[str, float] = 0.1,
    drop_prob: float = 0.0,
    given_prob: float = 0.5,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Losses:
    """images of B samples, t [B], noise [B, C, H, W]; streams: the samples' own random numbers, for masks, drops and choices.

    variant "U": every modality stands in the frame; "X": every modality is given to the network and leaves the frame; "any": each
    is given to each sample with probability `given_prob`. loss_weight: lambda, or one per modality.
    drop_prob: the share of samples trained unconditionally: no frame, nothing given, no modality loss (docs/method.md,
    section 10.6). The model is told which by `unconditional`, and in form any what is given by `given`, as `MTModel.forward` takes
    them.
    """
    x_start = images.x_start
    dropped = streams.uniform() < drop_prob  # (B,)
    multi_task = (~dropped).to(x_start.dtype)
    data = {name: modality.from_batch(images, streams) for name, modality in modalities.items()}
    given: dict[str, Tensor] = {}
    if variant == "any":
        given = {name: (streams.uniform() < given_prob) & ~dropped for name in modalities}
    encodings: dict[str, Tensor] = {}
    if variant != "X":
        with torch.no_grad():  # e_i = stop_gradient(E_i(x_i))
            encodings = {name: modality.encode(data[name]) for name, modality in modalities.items()}
    in_frame = {}
    for name, encoding in encodings.items():
        inside = ~dropped & ~given[name] if name in given else ~dropped
        in_frame[name] = encoding * inside.view(-1, 1, 1, 1)

    kwargs: dict[str, Any] = {**(model_kwargs or {}), "modalities": data if variant != "U" else {}}
    if given:
        kwargs["given"] = given
    if drop_prob > 0:
        kwargs["unconditional"] = True if drop_prob >= 1 else dropped
    terms = diffusion.training_losses(model, x_start, t, kwargs, noise, in_frame)
    predictions = terms.pop("predictions", {})
    loss = denoising = terms.pop("loss")
    for name, modality in modalities.items():
        terms[name] = modality.loss(predictions[name], data[name])
        weight = loss_weight[name] if isinstance(loss_weight, Mapping) else loss_weight
        loss = loss + weight * multi_task * terms[name]
    predicted = {name: multi_task * ~given[name] if name in given else multi_task for name in modalities}
    return Losses(loss, denoising, terms, {name: rms(e) for name, e in encodings.items()}, multi_task, predicted)
