"""The stage `right`: all its checks, in the order in which an error is best found."""

from __future__ import annotations

from ..runner import Stage
from . import attention, compiled, draws, losses, networks, optimizer, processes, resume, samplers


def run(stage: Stage) -> None:
    for part in (draws, attention, networks, losses, optimizer, samplers, resume, processes, compiled):
        part.run(stage)
