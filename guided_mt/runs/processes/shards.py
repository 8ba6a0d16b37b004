"""Weights that are spread over the processes, each of which has a part of every tensor (torch's FSDP2 and its DTensor).

Along its first dimension a tensor is cut as torch.chunk cuts it, a part per process in the order of ranks; a part may be empty.
Every function takes whole tensors too, and does to them what would be done without any of this. torch's modules are imported
where they are used: that takes a second, and most programs have no use for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether the processes have a part of this tensor each."""
    return hasattr(tensor, "placements")


def shard(root: nn.Module, unit: type[nn.Module], device_type: str, methods: Sequence[str] = ()) -> None:
    """Spread the parameters of `root` over all processes, in place; they are other objects from then on.

    unit: the class of the modules inside whose parameters are brought together when the module runs, and left again after it;
    the rest comes together for the whole pass. methods: of `root`, which run parts of it without gradient beside `forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    inner = [module for module in root.modules() if isinstance(module, unit) and module is not root]
    for module in reversed(inner):  # what stands inside another first
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(root, mesh=mesh)
    root.register_forward_hook(_part_without_gradient)
    for name in methods:
        register_fsdp_forward_method(root, name)
        setattr(root, name, _parted_after(root, getattr(root, name)))


def _parted_after(root: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*arguments: Any, **options: Any) -> Any:
        found = method(*arguments, **options)
        root.reshard()
        return found

    return run


def _part_without_gradient(root: Any, arguments: Any, output: Any) -> None:
    """FSDP leaves the outermost module whole until its backward pass: without one the parts could change unseen."""
    if not torch.is_grad_enabled():
        root.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory where gradients are off; the tensor itself where it is whole."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def cut(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor that belongs to `parameter`: a view. Where the parameter is whole, all of it."""
    if not is_shard(parameter):
        return whole
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    parts = whole.chunk(mesh.size())
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


def joined(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which every process has `part`, as it has of `parameter`; nothing is sent yet."""
    if not is_shard(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        part.to(own_part(parameter).device),
        mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def gathered(value: Any) -> Any:
    """`value` with whole tensors, in host memory, in the place of those that are spread, in dictionaries and lists.

    All processes have to call it; the main one gets them, the others tensors without elements. One tensor at a time is whole
    on the device.
    """
    if isinstance(value, Tensor):
        if not is_shard(value):
            return value
        whole = value.detach().full_tensor()  # type: ignore[attr-defined]
        return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(gathered, value))
    return value


def divided(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimiser's state dict of whole tensors with this process's parts in the place of those that belong to a parameter
    that is spread, such as moments. parameters: those of the optimiser, in order."""

    def part(value: Any, parameter: Tensor) -> Any:
        belongs = isinstance(value, Tensor) and is_shard(parameter) and value.shape == parameter.shape
        return joined(cut(value, parameter).clone(), parameter) if belongs else value

    of_each = {
        index: {name: part(value, parameters[index]) for name, value in own.items()}
        for index, own in state["state"].items()
    }
    return {**state, "state": of_each}


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together (0-dim, the same on all processes), which are all whole or all spread.

    What is not finite in one process is so in all.
    """
    norm = torch.nn.utils.get_total_norm([own_part(grad) for grad in grads], foreach=True)
    if not grads or not is_shard(grads[0]):
        return norm
    squares = norm.square()
    dist.all_reduce(squares, group=grads[0].device_mesh.get_group())  # type: ignore[attr-defined]
    return squares.sqrt()
