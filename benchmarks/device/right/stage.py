"""The stage `right`: all its checks, in the order in which an error is best found."""

from __future__ import annotations

from ..runner import Stage
from . import attention, compiled, draws, losses, networks, optimizer, processes, resume, samplers


def run(stage: Stage) -> None:
    with processes.started_early(stage) as early:
        for part in (draws, attention, networks, losses, optimizer, samplers, resume):
            part.run(stage)
        processes.run(stage, early)
        compiled.run(stage)
