"""Programs that an experiment starts one after another: they end in order when the experiment is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from guided_mt.errors import Interrupted


def run_child(words: Sequence[str], **options: Any) -> int:
    """Run a program to its end; returns its exit code. options: of subprocess.Popen.

    Ctrl-C reaches the program too, from the terminal: it saves, ends and says so, and then this raises Interrupted; a second one
    kills it. SIGTERM is passed on, and ends this program once that one has saved.
    """
    program = subprocess.Popen(words, **options)
    stopped = threading.Event()

    def pass_on(*_: object) -> None:
        stopped.set()
        program.terminate()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, pass_on) if main else None
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
        if main:
            signal.signal(signal.SIGTERM, before)
    if stopped.is_set():
        sys.exit(128 + signal.SIGTERM)
    return code
