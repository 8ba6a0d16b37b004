"""A command's `main`, run in this process as a program is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from guided_mt.commands.console import run


def exit_code(main: Callable[[Sequence[str]], object], argv: Sequence[str] = ()) -> int:
    """What a program that is this command ends with."""
    usr1 = signal.getsignal(signal.SIGUSR1)
    try:
        run(main, argv)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        signal.signal(signal.SIGUSR1, usr1)
    return 0
