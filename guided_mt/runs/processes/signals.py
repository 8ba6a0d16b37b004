"""What a training run is asked from outside while it works: to end (SIGTERM, Ctrl-C), or to save and go on (SIGUSR1).

Schedulers announce their end so: SLURM sends SIGTERM before it kills, or what `--signal` says, as --signal=SIGUSR1@90.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import IntEnum
from types import FrameType
from typing import Any


class Request(IntEnum):
    """What is asked; of several requests, or several processes with one each, the largest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2  # SIGTERM
    INTERRUPT = 3  # Ctrl-C


_OF = {"SIGUSR1": Request.SAVE, "SIGTERM": Request.STOP, "SIGINT": Request.INTERRUPT}


class Requests:
    """A context in which the signals are taken as requests; afterwards they mean what they meant before.

    The first Ctrl-C asks the run to save and end. A second one is the system's: it ends the process at once, whatever it does.
    speaks: whether this process says so.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.asked, self.speaks = Request.NOTHING, speaks
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody listen
            for name in _OF:
                number = getattr(signal, name, None)  # Windows has fewer
                if number is not None:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        request = _OF[signal.Signals(number).name]
        self.asked = max(self.asked, request)
        if request is Request.INTERRUPT:
            signal.signal(number, signal.SIG_DFL)
            if self.speaks:
                os.write(2, b"\nCtrl-C: saving after this step; once more ends at once, without\n")

    def take(self) -> Request:
        """What is asked. A request to save is then met, one to end stays."""
        asked = self.asked
        if asked is Request.SAVE:
            self.asked = Request.NOTHING
        return asked

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
