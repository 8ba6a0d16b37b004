"""The stage `fast`: training steps of every form through the project's own loop, sampling, encodings, data and scores."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guided_mt.data import ImageStream, open_source
from guided_mt.runs.compiling import COMPILE
from guided_mt.runs.config import SampleConfig
from guided_mt.training.train_loop import TrainLoop

from . import flops
from .forms import CIFAR, DIT_B2, IMAGENET64, SMALL, TINY, Size, batches, make_generator, make_loop, random_images
from .runner import Needs, Stage
from .warm import NEEDED

ROUNDS = 3
ROUND_SECONDS = 0.5
EAGER_SECONDS, COMPILED_SECONDS = 5.0, 45.0  # what a row takes, until one has told better
WARMED_SECONDS = 20.0


@dataclass(frozen=True)
class Row:
    """A training step. precision: fp32, TF32 or bf16. how: the value of `--compile`."""

    form: str
    size: Size
    precision: str = "bf16"
    how: str = "False"

    @property
    def compiled(self) -> bool:
        """Whether anything is."""
        return self.how != "False"

    @property
    def warmed(self) -> bool:
        """Whether another process compiles it meanwhile."""
        return (
            self.precision == "bf16"
            and (self.form, self.size.name, self.how) in NEEDED["fast"]
            and self.size.batch < 512
        )

    @property
    def name(self) -> str:
        """For people."""
        how = {"False": "eager", "True": "compiled"}.get(self.how, f"compiled, {self.how}")
        return f"{self.size.name}, batch {self.size.batch}, {self.form}, {self.precision}, {how}"

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the command line."""
        flag = "bf16" if self.precision == "bf16" else "fp32"
        return ("--precision", flag, "--compile", self.how)


FIRST = 14  # rows that come before compiled sampling: those at CIFAR-10's size, and the small network's
MAIN_FORMS = ("single", "U", "X", "any", "label", "label, K = 100")


def rows(tiny: bool) -> list[Row]:
    """What matters most first, since time may end before the list does."""
    if tiny:
        return [Row(form, TINY, "fp32") for form in ("single", "U", "any")]
    big = CIFAR.with_batch(512)
    found = [Row("single", DIT_B2, how="True"), Row("single", CIFAR, how="True")]
    found += [*(Row(form, DIT_B2) for form in ("single", "X", "any")), *(Row(form, CIFAR) for form in MAIN_FORMS)]
    found += [Row("single", SMALL, how=how) for how in COMPILE]
    found += [Row(form, IMAGENET64) for form in ("single", "X", "any", "label, K = 100")]
    found += [Row("single", size, kind) for size in (CIFAR, IMAGENET64) for kind in ("TF32", "fp32")]
    found += [Row("single", big), Row("single", IMAGENET64, how="True"), Row("single", big, how="True")]
    found += [Row("U", IMAGENET64), Row("label", IMAGENET64), *(Row(form, big) for form in MAIN_FORMS[1:])]
    found += [Row(form, CIFAR, how="True") for form in MAIN_FORMS[1:]]
    found += [Row("single", size, kind, how="True") for size in (CIFAR, IMAGENET64) for kind in ("TF32", "fp32")]
    return found


def run(stage: Stage) -> None:
    if stage.run.warming and stage.run.warming.started:
        stage.measure("networks compiled meanwhile", lambda: stage.run.warming.wait(min(90.0, 0.6 * stage.left())))
    _sampled(stage, TINY if stage.tiny else CIFAR, "False")
    stage.measure("data: images from a stream", lambda: pipeline(stage), 5.0)
    first, later = rows(stage.tiny)[:FIRST], rows(stage.tiny)[FIRST:]
    _stepped(stage, first)
    if not stage.tiny:
        for size, how in ((CIFAR, "True"), *((SMALL, how) for how in COMPILE)):
            _sampled(stage, size, how)
    _stepped(stage, later)
    sizes = ((TINY, "label"),) if stage.tiny else ((CIFAR, "label"), (IMAGENET64, "label, K = 100"))
    for size, form in sizes:
        stage.measure(f"encodings: {size.name}, all classes", lambda s=size, f=form: encodings(stage, f, s), 3.0)
    stage.measure("scores: Frechet distance and KID of 10,000 features", lambda: scores(stage), 4.0)
    stage.measure("scores: Inception features", lambda: inception(stage), 10.0)


def _sampled(stage: Stage, size: Size, how: str) -> None:
    takes = EAGER_SECONDS if how == "False" else WARMED_SECONDS
    stage.measure(f"sampling: {size.name}, single, --compile {how}", lambda: sampling(stage, size, how), takes)


def _stepped(stage: Stage, steps: Sequence[Row]) -> None:
    compiled = COMPILED_SECONDS
    for row in steps:
        before, takes = time.monotonic(), 0.5 if stage.tiny else EAGER_SECONDS
        if row.compiled:
            takes = WARMED_SECONDS if row.warmed else compiled
        found = stage.measure(f"step: {row.name}", lambda row=row: training_step(row, stage), takes)
        if row.compiled and found and not row.warmed:
            compiled = max(COMPILED_SECONDS / 2, time.monotonic() - before)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(function: Callable[[], Any], device: torch.device, tiny: bool) -> float:
    """Median over rounds of the seconds that a call takes when calls follow each other without a wait."""

    def round_of(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            function()
        synchronize(device)
        return (time.perf_counter() - start) / count

    once = round_of(1)
    if tiny:
        return once
    count = min(100, max(2, int(ROUND_SECONDS / once)))
    return statistics.median(round_of(count) for _ in range(ROUNDS))


def training_step(row: Row, stage: Stage) -> dict[str, Any]:
    """ms, images/s, memory, share of the card's peak, and how much of a step is not the network's forward and backward."""
    device, matmul, cudnn = stage.device, torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = row.precision == "TF32"
    try:
        loop = make_loop(row.form, row.size, device, stage.folder, *row.flags)
        turns = itertools.cycle(batches(loop, 2))
        start = time.perf_counter()
        loop.run_step(next(turns).to(device))
        synchronize(device)
        first = time.perf_counter() - start
        if not stage.tiny:
            for _ in range(2):
                loop.run_step(next(turns).to(device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = seconds_each(lambda: loop.run_step(next(turns).to(device)), device, stage.tiny)
        found: dict[str, Any] = {"ms": 1000 * step, "images/s": row.size.batch / step, "first step s": first}
        if device.type == "cuda":
            found["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        if row.size is SMALL and device.type == "cuda":
            found["kernels"] = kernels(lambda: loop.run_step(next(turns).to(device)))
        if not row.compiled:
            network = seconds_each(network_pass(loop, next(turns).to(device)), device, stage.tiny)
            found["share outside the network"] = 1 - network / step
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        torch._dynamo.reset()  # which else keeps every network, and gives up compiling after the eighth of a kind
    operations = flops.per_image(row.form, row.size)
    found["TFLOP/s"] = operations * row.size.batch / step / 1e12
    best = flops.peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if best:
        found["of bf16 peak"] = found["TFLOP/s"] / best
    return found


def kernels(step: Callable[[], Any]) -> int | str:
    """How many kernels and copies CUDA's profiler sees in a step, or that it saw none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    count = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events() or [])
    return count or "the profiler saw none"


def network_pass(loop: TrainLoop, batch: Any) -> Callable[[], None]:
    """The network's forward and backward alone, on the arguments that a step of the loop gives it."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = loop.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    loop.losses(batch, slice(0, len(batch.images)))
    hook.remove()
    args, kwargs = seen[-1]

    def both() -> None:
        made = loop.model(*args, **kwargs)
        sum(x.mean() for x in (made.output, *made.predictions.values())).backward()
        loop.model.zero_grad(set_to_none=True)

    both()
    return both


def sampling(stage: Stage, size: Size, how: str) -> dict[str, Any]:
    """Images per second and network call, with the network compiled as `how` says."""
    calls, batch = (2, 4) if stage.tiny else (10, 500 if size is CIFAR else 32)
    loop = make_loop("single", size, stage.device, stage.folder, "--precision", "fp32" if stage.tiny else "bf16")
    generator = make_generator(loop, how)
    draw = lambda: generator.draw(range(batch), SampleConfig(steps=calls))  # noqa: E731
    start = time.perf_counter()
    draw()
    first = time.perf_counter() - start
    draw()  # CUDA graphs are recorded the second time
    try:
        each = seconds_each(draw, stage.device, stage.tiny)
    finally:
        torch._dynamo.reset()
    return {"images/s per call": batch * calls / each, "ms per call": 1000 * each / calls, "first batch s": first}


def encodings(stage: Stage, form: str, size: Size) -> dict[str, Any]:
    """ms to encode every class once, which `--mt_encoder_refresh K` does every K steps."""
    precision = ("--precision", "fp32" if stage.tiny else "bf16")
    loop = make_loop(form, size.with_batch(8), stage.device, stage.folder, *precision)
    label, ids = loop.modalities["label"], torch.arange(size.classes, device=stage.device)
    label.encode(ids)
    each = seconds_each(lambda: label.encode(ids), stage.device, stage.tiny)
    return {"ms": 1000 * each, "classes": size.classes}


def pipeline(stage: Stage) -> dict[str, Any]:
    """Images per second that decoding gives: CIFAR-10's files where there are some, else an array."""
    cifar, size = stage.run.cifar10, TINY if stage.tiny else CIFAR
    path = str(cifar["train"]) if cifar else str(random_images(stage.folder, size))
    workers = 0 if stage.tiny else min(16, os.cpu_count() or 1)
    source, batch = open_source(path), size.batch
    with ImageStream(source, size.image_size, seed=0, global_batch=batch, num_workers=workers) as stream:
        each = iter(stream)
        next(each)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < (0.2 if stage.tiny else 3.0):
            count += len(next(each).images)
        return {"images/s": count / (time.perf_counter() - start), "workers": workers, "from": Path(path).name}


def scores(stage: Stage) -> dict[str, Any]:
    """Seconds of the evaluator's Frechet distance, and of KID on the device."""
    from evaluations.features.moments import statistics as moments
    from evaluations.scores.metrics import frechet_distance

    from .distances import kernel_distance

    count, width = (200, 16) if stage.tiny else (10_000, 2048)
    rng = np.random.default_rng(0)
    ours, theirs = (rng.standard_normal((count, width), dtype=np.float32) for _ in range(2))
    start = time.perf_counter()
    distance = frechet_distance(*moments(ours), *moments(theirs))
    middle = time.perf_counter()
    kid = kernel_distance(torch.from_numpy(ours).to(stage.device), torch.from_numpy(theirs).to(stage.device))
    return {"Frechet s": middle - start, "KID s": time.perf_counter() - middle, "Frechet": distance, "KID": kid}


def inception(stage: Stage) -> dict[str, Any]:
    """Images per second of the evaluator's Inception. Raises Needs where its weights are not on this machine."""
    import torch_fidelity  # noqa: F401 - the package that has the network

    from evaluations.features import inception as network
    from evaluations.features.weights import INCEPTION_TORCH, cache_folder, torch_hub_folder

    places: Iterator[Path] = (folder / INCEPTION_TORCH.name for folder in (cache_folder(), torch_hub_folder()))
    file = next((path for path in places if path.exists()), None)
    if file is None:
        raise Needs(f"{INCEPTION_TORCH.name} in the evaluator's cache folder")
    inception = network.load(str(file), str(stage.device))
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    inception(images)
    return {"images/s": len(images) / seconds_each(lambda: inception(images), stage.device, stage.tiny)}
