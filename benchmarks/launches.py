"""How many kernels a training step starts outside of the network's forward and backward pass, by stage.

    python benchmarks/launches.py

Runs on the CPU a step of tiny models and counts the operations that are not views, which is what a GPU would start kernels for; one
operation on many tensors (`_foreach_*`, `_fused_*`) counts once. Of the columns, "Philox as operations" is all outside the network
where the random numbers are integer operations, as on a CPU; the stages and "in all" where they are one kernel, as on a GPU; and
"--compile True" what is left outside the compiled graphs. The line below says how many kernels operations on many tensors are on
a GPU, for the network of the CIFAR-10 presets. The second table counts the kernels of a sampling step, by sampler, as they are and
outside of the graphs of `--compile True`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from device.forms import CIFAR, make_generator, make_loop, settings
from device.forms import TINY as TINY_SIZE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guided_mt.data import open_source
from guided_mt.diffusion import random
from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.generation.build import build_model, run_sections
from guided_mt.runs.config import SampleConfig, parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.train_loop import TrainLoop

TINY = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 --learn_sigma True"
)
TINY += " --noise_schedule cosine --data_dir builtin:digits --global_batch_size 8 --data_workers 0 --num_classes 10"
ROWS = {
    "single": "--mt_task none",
    "U": "--mt_task masked --mt_variant U",
    "X": "--mt_task masked --mt_variant X",
    "any": "--mt_task masked --mt_variant any --mt_drop_prob 0.1",
    "label": "--mt_task label --mt_variant U",
}
STAGES = ("draws and loss", "optimiser", "EMA", "record")
WITHOUT_KERNEL = ("empty", "new_empty", "detach", "lift_fresh")  # beginnings of names

# Of torch's ATen/native/cuda/MultiTensorApply.cuh: numbers in a chunk; {CUDA: (chunks in a launch, tensors in a launch by how many
# each element is of)}.
CHUNK = 65536
LIMITS = {"12": (320, (110, 64, 48, 36)), "13": (2240, (770, 448, 336, 252))}
# The optimiser's and the average's operations on many tensors, by how many tensors an element of them is of.
OF_WEIGHTS = {"_foreach_norm": 1, "_fused_adamw_": 4, "_foreach_lerp_": 2}
OF_COUNTERS = {"_foreach_add_": 1, "_foreach_sub_": 2}  # AdamW's step counters, one number of each tensor


def starts_kernel(operation: torch._ops.OpOverload) -> bool:
    """Whether it computes something, and is no view or bare allocation."""
    returned = [value.alias_info for value in operation._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in returned)
    home, _, name = operation._schema.name.partition("::")
    return not view and home != "profiler" and not name.startswith(WITHOUT_KERNEL)


class Launches(TorchDispatchMode):
    """Counts operations by the stage that is under way; none while it is None."""

    def __init__(self) -> None:
        super().__init__()
        self.stage: str | None = STAGES[0]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.stage is not None and starts_kernel(operation):
            self.counts[self.stage] += 1
        return operation(*args, **(kwargs or {}))

    def during(self, stage: str | None, function: Callable, count: int = 0) -> Callable:
        """`function`, whose operations count for `stage`; count: what a call counts for the stage that it is called in."""

        def counted(*arguments: Any, **options: Any) -> Any:
            outer = self.stage
            if outer is not None:
                self.counts[outer] += count
            self.stage = stage if outer is not None else None
            try:
                return function(*arguments, **options)
            finally:
                self.stage = outer

        return counted


@contextlib.contextmanager
def staged(loop: TrainLoop, *, philox: bool, compiled: bool) -> Iterator[Launches]:
    """Counts what `loop` does inside. philox: the random numbers as one kernel; compiled: the whole step as one graph."""
    launches = Launches()
    outside = [(loop, "network")] if compiled else [(loop.model, name) for name in ("forward", "features", "output")]
    with contextlib.ExitStack() as stack:
        for owner, name in (*outside, (Tensor, "backward")):
            stack.enter_context(mock.patch.object(owner, name, launches.during(None, getattr(owner, name))))
        for owner, name, stage in ((loop.optimizer, "step", 1), (loop.ema, "update", 2), (loop, "track", 3)):
            counted = launches.during(STAGES[stage], getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, counted))
        if philox:
            one = launches.during(None, random.stream_words, count=1)
            stack.enter_context(mock.patch.object(random, "stream_words", one))
        stack.enter_context(launches)
        yield launches


def count(flags: str) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Operations of one step by stage: with Philox as operations, as one kernel, and with the step compiled."""
    config = parse([*TINY.split(), *flags.split()], run_sections(), description="")
    counted = []
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(device=torch.device("cpu"))
        loop = TrainLoop(config, processes, open_source(config.data_dir), Path(folder))
        with loop.stream() as stream:
            batches = iter(stream)
            loop.run_step(next(batches).to(loop.device))  # the first step fills tables
            for options in ({"philox": False}, {"philox": True}, {"philox": True, "compiled": True}):
                batch = next(batches).to(loop.device)
                with staged(loop, **{"compiled": False, **options}) as launches:
                    loop.run_step(batch)
                counted.append(launches.counts)
    return counted[0], counted[1], counted[2]


def of_many(sizes: Sequence[int], per_element: int, cuda: str) -> int:
    """How many kernels one operation on tensors of these sizes is; per_element: how many tensors an element of it is of."""
    chunks_most, by_depth = LIMITS[cuda]
    launches = chunks = tensors = 0
    for size in sizes:
        tensors += 1
        left = -(-size // CHUNK)
        while left:
            taken = min(left, chunks_most - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == chunks_most or (tensors == by_depth[per_element - 1] and not left):
                launches, chunks, tensors = launches + 1, 0, int(left > 0)
    return launches + (chunks > 0)


def of_optimiser(sizes: Sequence[int], cuda: str) -> int:
    """Kernels of OF_WEIGHTS and OF_COUNTERS together."""
    weights = sum(of_many(sizes, depth, cuda) for depth in OF_WEIGHTS.values())
    return weights + sum(of_many([1] * len(sizes), depth, cuda) for depth in OF_COUNTERS.values())


CALLS = 10
DRAWN = {  # flags, whether a masked image is given, guidance
    "nothing given": ("U", (), False, 1.0),
    "own head": ("U", (), True, 1.0),
    "form X, guidance": ("X", ("--mt_drop_prob", "0.1"), True, 2.0),
}


def count_sampling(name: str, sampler: str, compiled: bool) -> float:
    """Operations per network call between the first and the last call, without the network and without gradients through it;
    compiled: and without what is compiled."""
    form, more, given, guidance = DRAWN[name]
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        generator = make_generator(make_loop(form, TINY_SIZE, cpu, Path(folder), *more))
    launches, seen = Launches(), []
    launches.stage = None
    network = generator.network

    def call(*arguments: Any, **options: Any) -> Any:
        seen.append(launches.counts[sampler])
        launches.stage = None
        made = network(*arguments, **options)
        launches.stage = sampler
        return made

    known = {"masked": torch.zeros(2, 3, TINY_SIZE.image_size, TINY_SIZE.image_size)} if given else {}
    options = SampleConfig(steps=CALLS, sampler=sampler, guidance_scale=guidance)
    generator.draw(range(2), options, known)  # fills tables
    generator.network = call
    if compiled:
        generator.arithmetic = lambda function: launches.during(None, function)
    with contextlib.ExitStack() as stack:
        grad = launches.during(None, torch.autograd.grad)
        stack.enter_context(mock.patch.object(torch.autograd, "grad", grad))
        one = launches.during(None, random.stream_words, count=1)
        stack.enter_context(mock.patch.object(random, "stream_words", one))
        stack.enter_context(launches)
        generator.draw(range(2), options, known)
    return (seen[-1] - seen[0]) / (len(seen) - 1)


def main() -> None:
    torch.set_num_threads(1)
    print(f"| | Philox as operations | {' | '.join(STAGES)} | in all | --compile True |")
    print("| --- |" + " ---: |" * (len(STAGES) + 3))
    for name, flags in ROWS.items():
        operations, kernel, compiled = count(flags)
        cells = [operations.total(), *(kernel[stage] for stage in STAGES), kernel.total(), compiled.total()]
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    with torch.device("meta"):
        sizes = [p.numel() for p in build_model(settings("single", CIFAR, "none")).parameters()]
    many = len(OF_WEIGHTS) + len(OF_COUNTERS)
    kernels = ", ".join(f"{of_optimiser(sizes, cuda)} with CUDA {cuda}" for cuda in LIMITS)
    print(
        f"The {many} operations on many tensors as kernels, with {len(sizes)} tensors ({sum(sizes) / 1e6:.1f} M): {kernels}"
    )

    print(f"\n| kernels outside of the network, per call | {' | '.join(DRAWN)} |")
    print("| --- |" + " ---: |" * len(DRAWN))
    for sampler in SAMPLERS:
        pairs = [[count_sampling(name, sampler, compiled) for compiled in (False, True)] for name in DRAWN]
        print(f"| {sampler} | {' | '.join(f'{plain:.0f} / {left:.0f}' for plain, left in pairs)} |", flush=True)


if __name__ == "__main__":
    main()
