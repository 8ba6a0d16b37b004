"""Programs that an experiment starts one after another: they end in order when the experiment is stopped."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from guided_mt.errors import Interrupted

_running: set[subprocess.Popen] = set()
_stopped = threading.Event()


@contextlib.contextmanager
def passing_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is passed on to every program that `run_child` runs, in whatever thread, and once they have saved it ends
    this program with exit code 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(*_: object) -> None:
        _stopped.set()
        for program in list(_running):
            program.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if _stopped.is_set():
            _stopped.clear()
            sys.exit(128 + signal.SIGTERM)


def run_child(words: Sequence[str], **options: Any) -> int:
    """Run a program to its end; returns its exit code. options: of subprocess.Popen.

    Ctrl-C reaches the program too, from the terminal: it saves, ends and says so, and then this raises Interrupted; a second one
    kills it. SIGTERM is passed on, and ends this program once that one has saved; threads do this inside `passing_on_sigterm`.
    """
    with passing_on_sigterm(), subprocess.Popen(words, **options) as program:
        _running.add(program)
        if _stopped.is_set():  # while this one was started
            program.terminate()
        try:
            code = program.wait()
        except KeyboardInterrupt:
            try:
                program.wait()
            except KeyboardInterrupt:
                program.kill()
                program.wait()
                raise
            raise Interrupted from None
        finally:
            _running.discard(program)
        if _stopped.is_set():
            raise Interrupted  # what stands after it in its thread is not begun
        return code
