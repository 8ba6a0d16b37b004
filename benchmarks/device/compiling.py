"""torch.compile from outside: with which backend a run's `--compile True` compiles, and how often."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, whoever calls torch.compile gets this backend. "inductor": what was asked for.

    "aot_eager" traces, specialises and recompiles alike, but makes no kernels, which takes the most of the time.
    """
    torch._dynamo.reset()
    counters.clear()
    compile_ = torch.compile

    def chosen(*args: Any, **options: Any) -> Any:
        return compile_(*args, **{k: v for k, v in options.items() if k not in ("mode", "options")}, backend=name)

    with mock.patch.object(torch, "compile", chosen) if name != "inductor" else contextlib.nullcontext():
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled since `backend` was entered."""
    return int(counters["stats"]["unique_graphs"])


def breaks() -> int:
    """How often a graph had to end where the code went on."""
    return sum(counters["graph_break"].values())
