"""The network as the process sees it: what it returns, and how ADM's models are called like ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
