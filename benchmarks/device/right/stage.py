"""The stage `right`: all its checks, in the order in which an error is best found."""

from __future__ import annotations

import torch

from ..runner import Stage
from . import attention, compiled, draws, losses, networks, optimizer, processes, resume, samplers


def run(stage: Stage) -> None:
    """Without cudnn's search for the fastest kernel of each shape, which takes longer than these checks."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, False
    try:
        _run(stage)
    finally:
        cudnn.benchmark = before


def _run(stage: Stage) -> None:
    with processes.started_early(stage) as early:
        for part in (draws, attention, networks, losses, optimizer, samplers, resume):
            part.run(stage)
        processes.run(stage, early)
        compiled.run(stage)
