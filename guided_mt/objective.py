"""Algorithm 2: ADM's loss in the moving frame plus lambda times one term per modality (eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion
from .modalities import Modality
from .random import SampleStreams


@dataclass
class Losses:
    """All [B]. `loss` is what is minimised; `terms` {name: values} are its parts, unweighted; `kept` is 0 for the samples that were
    trained as pure generation (`mt_drop_prob`), else 1."""

    loss: Tensor
    terms: dict[str, Tensor]
    kept: Tensor


def multi_task_losses(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    x_start: Tensor,
    labels: Tensor | None,
    t: Tensor,
    noise: Tensor,
    streams: SampleStreams,
    *,
    variant: str = "U",
    loss_weight: float = 0.1,
    drop_prob: float = 0.0,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Losses:
    """x_start, noise [B, C, H, W], labels [B] or None, t [B]; streams: the samples' own random numbers, for masks and drops.

    variant "U": every modality stands in the frame; "X": every modality is given to the network and leaves the frame.
    drop_prob: the share of samples trained as pure generation: no shift or an uninformative condition, and no modality loss
    (DESIGN 2.6.6).
    """
    kept = (streams.uniform() >= drop_prob).to(x_start.dtype)  # (B,)
    data = {name: modality.from_batch(x_start, labels, streams) for name, modality in modalities.items()}
    given: dict[str, Tensor] = {}
    encodings: dict[str, Tensor] = {}
    for name, modality in modalities.items():
        if variant == "X":
            nothing = modality.uninformative(x_start.shape[1:], len(x_start), x_start.device)
            given[name] = torch.where(_column(kept, data[name]) > 0, data[name], nothing)
        else:
            with torch.no_grad():  # e_i = stop_gradient(E_i(x_i))
                encodings[name] = modality.encode(data[name]) * _column(kept, x_start)
    kwargs = {**(model_kwargs or {}), "modalities": given}
    terms = diffusion.training_losses(model, x_start, t, kwargs, noise, encodings)
    predictions = terms.pop("predictions", {})
    loss = terms.pop("loss")
    for name, modality in modalities.items():
        terms[name] = modality.loss(predictions[name], data[name])
        loss = loss + loss_weight * kept * terms[name]
    return Losses(loss, terms, kept)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
