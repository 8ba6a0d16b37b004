"""Random numbers of samples: the same bits on the device as on the CPU, and normal numbers to rounding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from guided_mt.diffusion.random import SampleStreams

from ..compiling import backend
from ..runner import Stage, Wrong, within

# log, cos and sin differ by a few units in the last place between libraries; |x| < 6.7 with angles up to 2 pi.
NORMAL_TOLERANCE = 16 * 6.7 * 2.0**-24


def run(stage: Stage) -> None:
    stage.check("Philox: words, uniform and whole numbers to the bit", lambda: to_the_bit(stage.device))
    stage.check("Philox: within a compiled function, to the bit", lambda: compiled_to_the_bit(stage.device), 5.0)
    stage.check("Philox: normal numbers", lambda: normal(stage.device))


def _streams(device: torch.device) -> SampleStreams:
    seeds = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**61 - 1, 7, 7])
    index = torch.tensor([0, 1, 2, 3, 2**40, 2**31, 2**33 - 1])
    return SampleStreams(seeds.to(device), index.to(device), device=device)


def to_the_bit(device: torch.device) -> dict[str, Any]:
    """Several draws in a row of every kind, also of sizes that don't divide by four."""
    here, there, compared = _streams(torch.device("cpu")), _streams(device), 0
    with _warnings() as warned:
        for count in (1, 3, 4, 3 * 32 * 32):
            for ours, theirs in zip(here.words(count), there.words(count), strict=True):
                compared += _same(f"words({count})", ours, theirs)
            compared += _same(f"uniform({count})", here.uniform(count), there.uniform(count))
            compared += _same(f"integers({count})", here.integers(1000, count), there.integers(1000, count))
    if warned:
        raise Wrong(warned[0], numbers=compared)
    return {"numbers": compared}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the project warns of inside: where a draw can't be one kernel it says so."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("guided_mt")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def compiled_to_the_bit(device: torch.device) -> dict[str, Any]:
    """Draws that are part of a graph, as in a compiled training step, where the compiler sees where their counters come from."""

    def drawn(seeds: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        streams = SampleStreams(seeds, index, device=seeds.device)
        return (*streams.words(3 * 32 * 32), streams.uniform(), streams.integers(1000, 5))

    seeds, index = torch.tensor([0, 2**31, 2**61 - 1]), torch.tensor([1, 2**33 - 1, 2**40])
    with backend("inductor" if device.type == "cuda" else "aot_eager"):
        theirs = torch.compile(drawn, dynamic=False)(seeds.to(device), index.to(device))
    return {"numbers": sum(_same("a compiled draw", *pair) for pair in zip(drawn(seeds, index), theirs, strict=True))}


def _same(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> int:
    differ = int((ours != theirs.cpu()).sum())
    if differ:
        raise Wrong(f"{what}: {differ} of {ours.numel()} differ from the CPU's", differ=differ)
    return ours.numel()


def normal(device: torch.device) -> dict[str, Any]:
    """The largest difference from the CPU's."""
    ours, theirs = (_streams(place).normal(3, 64, 64) for place in (torch.device("cpu"), device))
    return within(float((ours - theirs.cpu()).abs().max()), NORMAL_TOLERANCE, std=float(theirs.std()))
