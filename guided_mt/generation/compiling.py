"""`--compile` in sampling: the network, and the arithmetic around it, with sizes that stay, so that the same graphs serve all
timesteps of all batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..diffusion.network import ModelOutput
from ..networks.multi_task import MultiTask
from ..runs.compiling import CUDA_GRAPHS, compiled


def compiled_network(model: Callable[..., ModelOutput], how: str) -> Callable[..., ModelOutput]:
    """`model` as it is called, compiled as `how` says (see `runs.compiling.compiled`).

    The timestep is a tensor, no constant of the graph. Guidance, a batch twice as large, has a graph of its own, and own head one
    with a backward pass, through which its gradient is taken as through the network itself.
    """
    if how == "False":
        return model
    call = compiled(model, how)

    def network(
        z_t: Tensor,
        timesteps: Tensor,
        modalities: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> ModelOutput:
        # The first z_T lies in memory as it was drawn, and the others, on a GPU, as the network left them.
        seen = call(z_t.contiguous(), timesteps, modalities, **options)
        if how != CUDA_GRAPHS:
            return seen
        return ModelOutput(seen.output.clone(), {name: x.clone() for name, x in seen.predictions.items()})

    return network


def compiled_encoder(model: MultiTask, how: str) -> Callable[[str, Tensor], Tensor]:
    """`model.encode_modality`, compiled for estimates, which are encoded at every step. Class ids are known and encoded once, in
    batches of as many as there are different ones."""
    if how == "False":
        return model.encode_modality
    call = compiled(model.encode_modality, how)

    @torch.no_grad()
    def encode(name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return model.encode_modality(name, x)
        return call(name, x).clone() if how == CUDA_GRAPHS else call(name, x)

    return encode


def compiled_arithmetic(how: str) -> Callable[[Callable], Callable] | None:
    """For `sampling.sample`, which has two functions between calls of the network: one reads off what it says, with own head,
    guidance and clipping, and one moves. CUDA graphs, whose results have to be copied, are for the network alone."""
    return None if how == "False" else lambda function: compiled(function, "True")
