"""Times of the parents' code and ours, taken in turn on one thread: a ratio within one run, since machines are noisy.

What is counted is processor time. Neither side waits for anything, so on an idle machine it is the time on the clock, and on a busy
one it leaves out what other programs took.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from guided_mt.data import Batch, open_source
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.diffusion.sampling import sample
from guided_mt.generation.build import run_sections
from guided_mt.runs import distributed
from guided_mt.runs.config import parse
from guided_mt.training.train_loop import TrainLoop

from . import standins
from .inputs import PROCESS, fill
from .table import Row

CALLS = 2  # network calls of one timed run of a sampler


@dataclass(frozen=True)
class Size:
    """A network and a batch: the name in the table, and ADM's flags for the network."""

    name: str
    batch: int
    network: dict[str, Any] = field(default_factory=dict)

    def flags(self) -> dict[str, Any]:
        """ADM's flags, those that are the same at every size included."""
        return {"num_res_blocks": 2, "use_scale_shift_norm": True, "learn_sigma": True, **self.network}


SIZES = {
    "a": Size("32 px, attention at 16 and 8", 8, {
        "image_size": 32, "num_channels": 64, "channel_mult": "1,2,2", "attention_resolutions": "16,8", "num_heads": 4,
    }),
    "b": Size("32 px, attention at 32, 16 and 8, resampling blocks", 8, {
        "image_size": 32, "num_channels": 64, "channel_mult": "1,2,2,2", "attention_resolutions": "32,16,8",
        "num_head_channels": 64, "resblock_updown": True, "use_new_attention_order": True,
    }),
    "c": Size("64 px, attention at 16 and 8", 4, {
        "image_size": 64, "num_channels": 64, "channel_mult": "", "attention_resolutions": "16,8", "num_heads": 4,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Times:
    """What was timed in every round, in milliseconds: ours and theirs, one after the other."""

    what: str
    ours: list[float]
    theirs: list[float]

    def ratio(self) -> tuple[float, float, float]:
        """How many times as fast ours is: lower quartile, median and upper quartile of the rounds' ratios."""
        ratios = [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, median, high


def timed(what: str, ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Times:
    """Both by turns, `rounds` times after a first round that doesn't count. Each call returns the seconds it took."""
    taken: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        sides = [(ours, taken[0]), (theirs, taken[1])]
        for run, times in sides if round_ % 2 else reversed(sides):
            seconds = run()
            if round_:
                times.append(1000 * seconds)
    return Times(what, *taken)


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Processor time of a run, or of each of the calls that it makes."""
    started = time.process_time()
    run()
    return (time.process_time() - started) / calls


def row(times: Times) -> Row:
    ours, theirs = statistics.median(times.ours), statistics.median(times.theirs)
    return Row(
        f"{times.what}: ours, theirs", f"{ours:.0f} ms, {theirs:.0f} ms", f"{times.ratio()[1]:.2f} times as fast"
    )


def adm(checkout: Path, rounds: int) -> list[Row]:
    """Speed of training steps and of network calls."""
    return [row(times) for times in against_adm(checkout, "b", rounds)]


class Side:
    """One of the two codes in a process of its own, as its users run it: what it asks of the allocator, the other doesn't get."""

    def __init__(self, size: str, checkout: Path | None):
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=serve, args=(there, size, checkout), daemon=True).start()
        there.close()
        self.connection, self.parameters = here, here.recv()

    def seconds(self, run: str) -> float:
        """Processor time of one of `RUNS`, or of CONVOLUTIONS."""
        self.connection.send(run)
        return self.connection.recv()


RUNS = {"training step": 1, "network call, ddpm": CALLS, "network call, ddim": CALLS}
CONVOLUTIONS = "our training step, were all but its convolutions free"


def serve(connection: Any, size: str, checkout: Path | None) -> None:
    """The process of a `Side`: sends the number of parameters, then the seconds of each run that it is asked for."""
    torch.set_num_threads(1)
    if checkout is not None:
        standins.for_guided_diffusion(checkout)
    with tempfile.TemporaryDirectory() as folder:
        loop, sampler = (our_loop, our_sampler) if checkout is None else (their_loop, their_sampler)
        network, step = loop(SIZES[size], Path(folder))
        connection.send(sum(p.numel() for p in network.parameters()))
        samplers = (sampler(network, SIZES[size], name) for name in ("ddpm", "ddim"))
        runs = {**dict(zip(RUNS, (step, *samplers), strict=True)), CONVOLUTIONS: convolutions(network, SIZES[size])}
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            connection.send(seconds(runs[name], RUNS.get(name, 1)))


def against_adm(checkout: Path, name: str, rounds: int) -> list[Times]:
    """A training step and a network call of two samplers at one of `SIZES`, by guided-diffusion's loops and by ours."""
    size, ours, theirs = SIZES[name], Side(name, None), Side(name, checkout)
    if ours.parameters != theirs.parameters:
        raise ValueError(f"the networks differ: {ours.parameters} and {theirs.parameters} parameters")
    what = f"{size.name}, {ours.parameters / 1e6:.1f} M parameters, batch {size.batch}"
    pairs = [(run, run) for run in RUNS]
    pairs.insert(1, (CONVOLUTIONS, "training step"))
    return [
        timed(f"{what}: {own}", partial(ours.seconds, own), partial(theirs.seconds, other), rounds)
        for own, other in pairs
    ]


def convolutions(network: nn.Module, size: Size) -> Callable[[], None]:
    """The two-dimensional convolutions of one training step alone, forward and backward, each as its module does them."""
    found: list[tuple[nn.Module, torch.Size, torch.Size]] = []
    hooks = [
        module.register_forward_hook(lambda module, x, y: found.append((module, x[0].shape, y.shape)))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    pixels = size.network["image_size"]
    with torch.no_grad():
        network(torch.zeros(size.batch, 3, pixels, pixels), torch.zeros(size.batch, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    images = {shape: torch.randn(shape) for _, *shapes in found for shape in shapes}

    def run() -> None:
        for module, given, made in found:
            x = images[given].requires_grad_(given[1] != 3)
            wanted = [*module.parameters(), *([x] if x.requires_grad else [])]
            torch.autograd.grad(module(x), wanted, images[made])

    return run


def our_loop(size: Size, folder: Path) -> tuple[nn.Module, Callable[[], None]]:
    """(the network, a step) of our training loop on a batch in memory."""
    processes = distributed.setup("cpu")
    pixels = size.network["image_size"]
    images = torch.randint(256, (size.batch, 3, pixels, pixels), dtype=torch.uint8)
    np.savez(folder / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    flags = {
        **size.flags(), "mt_task": "none", "noise_schedule": "cosine", "batch_size": size.batch, "lr": 1e-4,
        "ema_rate": "0.9999", "data_dir": folder / "images.npz",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    config = parse(words, run_sections(), description="")
    loop = TrainLoop(config, processes, open_source(config.data_dir), folder)
    fill(loop.model).train()
    numbers = torch.arange(size.batch)
    batch = Batch(images, None, numbers, numbers)
    return loop.model, lambda: loop.run_step(batch)


def their_loop(size: Size, folder: Path) -> tuple[nn.Module, Callable[[], None]]:
    """(the network, a step) of guided-diffusion's training loop on a batch in memory."""
    import torch.distributed as dist
    from guided_diffusion import logger
    from guided_diffusion.resample import UniformSampler
    from guided_diffusion.script_util import create_model
    from guided_diffusion.train_util import TrainLoop as TheirLoop

    from .adm import process

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    logger.configure(dir=str(folder), format_strs=[])
    network = fill(create_model(**size.flags())).train()
    images = torch.rand(size.batch, 3, size.network["image_size"], size.network["image_size"]) * 2 - 1
    diffusion = process()
    loop = TheirLoop(
        model=network, diffusion=diffusion, data=itertools.repeat((images, {})), batch_size=size.batch, microbatch=-1,
        lr=1e-4, ema_rate="0.9999", log_interval=10**9, save_interval=10**9, resume_checkpoint="",
        schedule_sampler=UniformSampler(diffusion),
    )  # fmt: skip

    def step() -> None:
        loop.run_step(*next(loop.data))
        loop.step += 1

    return network, step


def our_sampler(network: nn.Module, size: Size, name: str) -> Callable[[], None]:
    """A run of our sampler of so many network calls."""
    network, shape = frozen(network), (size.batch, 3, size.network["image_size"], size.network["image_size"])
    diffusion = create_gaussian_diffusion(**PROCESS, timestep_respacing=str(CALLS))
    return lambda: sample(network, diffusion, {}, shape, sampler=name, seeds=range(size.batch))


def their_sampler(network: nn.Module, size: Size, name: str) -> Callable[[], None]:
    """A run of guided-diffusion's sampler of so many network calls."""
    from .adm import process

    network, shape = frozen(network), (size.batch, 3, size.network["image_size"], size.network["image_size"])
    diffusion = process(str(CALLS))
    loop = diffusion.p_sample_loop if name == "ddpm" else diffusion.ddim_sample_loop
    return lambda: loop(network, shape, device="cpu")


def ldm(rounds: int) -> list[Row]:
    """Speed of a network call in latents."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel as Theirs

    from latent_mt import UNetModel

    options = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "attention_resolutions": [2, 4],
        "num_res_blocks": 2, "channel_mult": [1, 2, 2], "num_head_channels": 32,
    }  # fmt: skip
    theirs = fill(Theirs(**options))
    ours = UNetModel(**options)
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(8, 4, 32, 32), torch.randint(1000, (8,))
    return [row(timed("U-Net call", called(ours.to_fast_layout(), x, t), called(theirs, x, t), rounds))]


def called(network: nn.Module, x: torch.Tensor, t: torch.Tensor) -> Callable[[], float]:
    """What times one call of the network."""
    network = frozen(network)
    return torch.no_grad()(lambda: seconds(lambda: network(x, t)))


def frozen(network: nn.Module) -> nn.Module:
    """A copy that is only called."""
    return copy.deepcopy(network).eval().requires_grad_(False)
