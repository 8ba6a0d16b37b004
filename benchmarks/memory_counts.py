"""The activations that autograd keeps for the backward pass, counted from shapes: tensors without memory, by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from guided_mt.networks.layers import Block

GIB = 2**30


class Activations(NamedTuple):
    """GiB as (what every batch takes, what each image of it adds), without and with recomputation."""

    kept: tuple[float, float]
    recomputed: tuple[float, float]


class Counter:
    """Inside `watching`, what is kept of a forward pass: {storage: bytes} in all, and of each block that may be recomputed."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.weights = {_key(p) for p in network.parameters()} | {_key(b) for b in network.buffers()}
        self.outside: dict[Any, int] = {}  # kept by what is in no block
        self.inputs: dict[Any, int] = {}  # of the blocks
        self.inside: dict[nn.Module, dict[Any, int]] = {}
        self.alive: list[Any] = []  # a storage that is freed would give its key to another
        self.within: list[nn.Module] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = []
        for module in self.network.modules():
            if isinstance(module, Block) and hasattr(module, "compute"):
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not self.within:  # a block in a block is recomputed with the outer one
            for tensor in _tensors(arguments):
                self._note(self.inputs, tensor)
        self.within.append(block)

    def _leave(self, block: nn.Module, arguments: Any, output: Any) -> None:
        self.within.pop()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._note(self.inside.setdefault(self.within[0], {}) if self.within else self.outside, tensor)
        return tensor

    def _note(self, where: dict[Any, int], tensor: Tensor) -> None:
        if _key(tensor) not in self.weights:
            self.alive.append(tensor.untyped_storage())
            where[_key(tensor)] = tensor.untyped_storage().nbytes()

    def kept(self) -> int:
        """Bytes kept where nothing is recomputed."""
        whole = dict(self.outside)
        for block in self.inside.values():
            whole |= block
        return sum(whole.values())

    def held(self) -> int:
        """Bytes kept where each block is recomputed: the blocks' inputs, and what is in no block."""
        return sum({**self.outside, **self.inputs}.values())

    def recomputed(self) -> int:
        """Bytes at the worst moment where each block is recomputed: what is `held`, and all of one block."""
        held = {**self.outside, **self.inputs}
        most = max(sum(size for key, size in block.items() if key not in held) for block in self.inside.values())
        return sum(held.values()) + most


def _key(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def count(network: nn.Module, batch: int, size: int, width: int, length: int = 77) -> Counter:
    """What a pass of `batch` latents [4, size, size] with tokens [length, width] keeps."""
    counter = Counter(network)
    with counter.watching():
        z = torch.zeros(batch, 4, size, size)
        found = network(z, torch.zeros(batch), {}, context=torch.zeros(batch, length, width))
        (found.output.sum() + sum(x.sum() for x in found.predictions.values())).backward()
    return counter


def activations(make: Any, size: int, width: int) -> Activations:
    """Of the network that `make()` builds, in bf16 with float32 weights."""
    with FakeTensorMode():
        network = make()
        network.precision = "bf16"
        for module in network.modules():
            if isinstance(module, Block):
                module.use_checkpoint = False
        one, two = (count(network, batch, size, width) for batch in (1, 2))
    return Activations(
        *(_line(a / GIB, b / GIB) for a, b in ((one.kept(), two.kept()), (one.recomputed(), two.recomputed())))
    )


def _line(one: float, two: float) -> tuple[float, float]:
    return one - (two - one), two - one


class Alive(TorchDispatchMode):
    """Inside, the bytes of all tensors that operations make and that are still held: `now`, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return made

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def at_work(call: Callable[[], Any]) -> float:
    """GiB that `call()` holds at its worst moment, without gradients and without memory: to be made inside FakeTensorMode."""
    with torch.no_grad(), Alive() as alive:
        call()
    return alive.most / GIB
