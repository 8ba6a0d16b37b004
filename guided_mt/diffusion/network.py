"""The network as the process sees it: what it returns, how ADM's models are called like ours, and how flow models are told t."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .schedules import straight_path


class ModelOutput(NamedTuple):
    """What a denoiser returns: ADM's output [B, C or 2C, H, W], one prediction per modality head, and where it was asked for them
    (`with_middle`) its middle features [B, C', h, w]."""

    output: Tensor
    predictions: Mapping[str, Tensor] = {}
    middle: Tensor | None = None


Denoising = Callable[..., ModelOutput]  # (z_t, t, modalities, **options) -> ModelOutput


def as_denoising(model: Callable) -> Denoising:
    """`model` as (z_t, t, modalities, **options) -> ModelOutput, whether it is that already or ADM's (x, t, **options) -> Tensor.

    Decided once, by the signature. An ADM model that is handed a modality raises ValueError.
    """
    takes = takes_modalities(model)

    def network(z_t: Tensor, t: Tensor, modalities: Mapping[str, Tensor], **options: Any) -> ModelOutput:
        if takes:
            return as_output(model(z_t, t, modalities, **options))
        if modalities:
            raise ValueError(f"this model takes no modalities, but {', '.join(modalities)} was given to it")
        return as_output(model(z_t, t, **options))

    return network


def as_output(result: ModelOutput | Tensor) -> ModelOutput:
    """A plain tensor is the output of a model without heads."""
    return result if isinstance(result, ModelOutput) else ModelOutput(result)


def _unwrapped(model: Callable) -> Callable:
    """The model inside partial, DistributedDataParallel and torch.compile, which hide its signature."""
    if isinstance(model, functools.partial) and isinstance(model.func, torch.nn.Module):
        return _unwrapped(model.func)
    for name in ("module", "_orig_mod"):
        inner = model._modules.get(name) if isinstance(model, torch.nn.Module) else None
        if inner is not None:
            return _unwrapped(inner)
    return model


def takes_modalities(model: Callable) -> bool:
    """True for (z_t, t, modalities, ...), False for ADM's (x, timesteps, y=None, ...) whose third argument has a default."""
    model = _unwrapped(model)
    signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    if "modalities" in signature.parameters:
        return True
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        return True
    return len(positional) > 2 and positional[2].default is inspect.Parameter.empty and positional[2].name != "y"


# {name of --mt_time: the time that a network is told, of tau [T] (`straight_path`)}. Such a network sees the state on the straight
# path, (1 - tau) z_0 + tau eps. None: it is told t, and sees y_t as it is.
TIMES: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "steps": None,
    "noise-level": lambda tau: tau,  # data at 0, noise at 1, as in REPA
    "data-level": lambda tau: 1 - tau,  # noise at 0, data at 1, as in SiT
    "noise-level-1000": lambda tau: 1000 * tau,  # as in Stable Diffusion 3
}


class Told(torch.nn.Module):
    """(z_t, t) as a network is told them by a row of TIMES: forward(z_t [B, ...], t [B] in 0..T-1) -> (state [B, ...], time [B]).

    alphas_cumprod [T], of all timesteps. A frame is scaled with the state that it stands in. Raises ValueError for a name that is
    not in TIMES.
    """

    times: Tensor  # [T]
    scales: Tensor  # [T]

    def __init__(self, name: str, alphas_cumprod: np.ndarray):
        super().__init__()
        if name not in TIMES:
            raise ValueError(f"unknown time '{name}'; choose from {', '.join(TIMES)}")
        time = TIMES[name]
        self.steps = time is None
        if time is not None:
            scales, tau = straight_path(alphas_cumprod)
            self.register_buffer("times", torch.from_numpy(time(tau)), persistent=False)
            self.register_buffer("scales", torch.from_numpy(scales), persistent=False)

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; in the state's precision, but the time at least in float32."""
        if self.steps:
            return z_t, t
        index = t.round().long()
        scale = self.scales[index].to(z_t.dtype).view(-1, *[1] * (z_t.ndim - 1))
        return scale * z_t, self.times[index].to(torch.promote_types(z_t.dtype, torch.float32))


def as_told(model: Callable, name: str, alphas_cumprod: np.ndarray) -> Denoising:
    """A `model` that is told time and state by the row `name` of TIMES, as one of (z_t, t, modalities): see `as_denoising`."""
    told, network = Told(name, alphas_cumprod), as_denoising(model)

    def denoising(z_t: Tensor, t: Tensor, modalities: Mapping[str, Tensor], **options: Any) -> ModelOutput:
        return network(*told.to(z_t.device)(z_t, t), modalities, **options)

    return denoising
