"""A search for operations that make the host wait for the GPU, on the CPU, where they cost nothing and nobody notices.

with search():
    loop.run_step(batch)  # raises Waits where a value is read, or a shape depends on values

On a GPU `torch.cuda.set_sync_debug_mode("error")` finds the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Values that the host reads, or shapes that depend on values. Boolean masks as indices are found by their arguments.
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.item,
    aten.masked_select,
    aten.nonzero,
    aten.nonzero_numpy,
    aten._unique,
    aten._unique2,
    aten.bincount,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.unique_dim_consecutive,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
FROM_HOST = {torch.tensor, torch.from_numpy}  # a copy of memory that is not pinned waits too
# On a CPU alone these look at their arguments' values.
CHECKS_ON_CPU = {F.one_hot}


class Waits(RuntimeError):
    """An operation for which the host would wait for the GPU."""


class _Values(TorchDispatchMode):
    """Raises where an operation reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if not self.allowed:
            if packet in READS or (packet is aten.repeat_interleave and not (kwargs or {}).get("output_size")):
                raise Waits(f"{func} reads a value, or makes a shape of values")
            if packet in INDEXED and any(_is_mask(index) for index in args[1]):
                raise Waits(f"{func} with a boolean mask makes a shape of values")
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Raises where a tensor goes to the host or comes from there. host: tensors that lie on the host anyway."""

    def __init__(self, values: _Values, host: Collection[Tensor]):
        super().__init__()
        self.values, self.host = values, {id(x) for x in host}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in CHECKS_ON_CPU:
            self.values.allowed += 1
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.values.allowed -= 1
        if func in TO_HOST and id(args[0]) not in self.host:
            raise Waits(f"Tensor.{func.__name__} brings a tensor to the host")
        if func is Tensor.to and any(isinstance(x, str) and x == "cpu" for x in args[1:]):
            raise Waits("Tensor.to('cpu') brings a tensor to the host")
        if func in FROM_HOST or (func is torch.as_tensor and not isinstance(args[0], Tensor)):
            raise Waits(f"torch.{func.__name__} copies from the host")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


@contextlib.contextmanager
def search(host: Collection[Tensor] = ()) -> Iterator[None]:
    """Inside, an operation that would wait raises Waits. host: tensors that may be read, as they never are on the GPU."""
    values = _Values()
    with values, _Copies(values, host):
        yield


@contextlib.contextmanager
def cuda_errors() -> Iterator[None]:
    """Inside, CUDA's own watch: whatever waits raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def watch(device: torch.device, host: Collection[Tensor] = ()) -> contextlib.AbstractContextManager[None]:
    """The watch that fits the device."""
    return cuda_errors() if device.type == "cuda" else search(host)


def watched_calls(
    network: Callable[..., Any], calls: int, make_watch: Callable[[], contextlib.AbstractContextManager[None]]
) -> Callable[..., Any]:
    """The network of a sampler that is called `calls` times: all between its first call and its last is watched. `close` ends it
    early, `seen` says how many calls there were."""
    stack, seen = contextlib.ExitStack(), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 1:
            stack.enter_context(make_watch())
        result = network(*args, **kwargs)
        if seen == calls:
            stack.close()
        return result

    call.close, call.seen = stack.close, lambda: seen  # type: ignore[attr-defined]
    return call
