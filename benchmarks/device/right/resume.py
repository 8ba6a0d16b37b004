"""A run that was cut off and goes on: to the bit with deterministic algorithms, to rounding without, and from device to device."""

from __future__ import annotations

import contextlib
import csv
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from guided_mt.runs.checkpoint import checkpoints, read_weights

from ..forms import TINY, make_loop
from ..runner import Stage, Wrong, within
from .arithmetic import no_tf32

STEPS, HALF = 4, 2
# Losses of float32 runs that differ in rounding, after some steps of Adam, which makes small gradients as large as others.
ROUNDING = 5e-3


def run(stage: Stage) -> None:
    cpu, device = torch.device("cpu"), stage.device
    stage.check("resume: to the bit with deterministic algorithms", lambda: to_the_bit(stage), 5.0)
    stage.check("resume: to rounding by default", lambda: near(stage, device, device), 5.0)
    for name, first, then in (("from CPU to GPU", cpu, device), ("from GPU to CPU", device, cpu)):
        if device.type == "cuda":
            stage.check(f"resume: {name}", lambda first=first, then=then: near(stage, first, then), 5.0)
        else:
            stage.leave_out(f"resume: {name}", "needs cuda")


def train(folder: Path, device: torch.device, steps: int, dropout: float) -> list[dict[str, str]]:
    """Train in `folder` to so many steps, as `mt-diffusion train` does; the rows of progress.csv."""
    words = ("--total_steps", str(steps), "--log_interval", "1", "--save_interval", "1000", "--lr", "1e-3")
    loop = make_loop("any", TINY, device, folder, *words, "--dropout", str(dropout), "--ema_rate", "0.9", trained=False)
    loop.folder.mkdir(parents=True, exist_ok=True)
    loop.run_loop()
    with open(loop.folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def _both(
    folder: Path, first: torch.device, then: torch.device, dropout: float = 0.0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of a run without a pause on `then`, and of one that begins on `first` and goes on on `then`."""
    shutil.rmtree(folder, ignore_errors=True)
    whole = train(folder / "whole", then, STEPS, dropout)
    train(folder / "parts", first, HALF, dropout)
    return whole, train(folder / "parts", then, STEPS, dropout)


def to_the_bit(stage: Stage) -> dict[str, Any]:
    """Every loss and every weight. Raises Wrong for the first that differs."""
    folder = stage.folder / "bits"
    with deterministic():
        whole, parts = _both(folder, stage.device, stage.device, dropout=0.1)
    for row, other in zip(whole, parts, strict=True):
        differ = [name for name in row if name != "images_per_second" and row[name] != other[name]]
        if differ:
            raise Wrong(f"step {row['step']}: {', '.join(differ)} differ", step=int(row["step"]))
    count = 0
    for file in ("model.safetensors", "ema_0.9.safetensors"):
        one, two = (read_weights(checkpoints(folder / kind / "run")[-1] / file) for kind in ("whole", "parts"))
        for name, values in one.items():
            if not torch.equal(values, two[name]):
                raise Wrong(f"{file}: {name} differs")
            count += values.numel()
    return {"weights": count, "rows": len(whole)}


def near(stage: Stage, first: torch.device, then: torch.device) -> dict[str, Any]:
    """The largest relative difference of a loss after the pause. Without dropout, which devices draw each in its own way."""
    folder = stage.folder / f"near_{first.type}_{then.type}"
    with no_tf32():
        whole, parts = _both(folder, first, then)
    error = 0.0
    for row, other in zip(whole[HALF:], parts[HALF:], strict=True):
        for name in ("loss", "mse", "grad_norm"):
            error = max(error, abs(float(row[name]) - float(other[name])) / abs(float(row[name])))
    return within(error, ROUNDING)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch's deterministic algorithms; an operation that has none raises an error that names it."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
