"""The commands of this project as words that start a process of their own, from a clone and from an installed wheel alike."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

MODULE = "mt_diffusion"


def command(name: str, *options: object, processes: int = 1) -> list[str]:
    """The words that run `mt-diffusion NAME OPTIONS...`, for `subprocess`.

    processes: how many, started by mpiexec; where there is no mpiexec (see `launcher`) it is one process. Start several
    with `environment()`.
    """
    words = [sys.executable, "-m", MODULE, *name.split(), *map(str, options)]
    found = launcher() if processes > 1 else None
    return [found, "-n", str(processes), "--oversubscribe", "--bind-to", "none", *words] if found else words


def launcher() -> str | None:
    """The mpiexec to use: the one beside this Python, where `pip install '.[mpi]'` puts it, else that of the PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def environment() -> dict[str, str]:
    """This process's environment; for root also what Open MPI asks it to say."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **(root if os.geteuid() == 0 else {})}


def shown(words: Sequence[str]) -> str:
    """The words of `command` as a user would type them, to be pasted into a shell."""
    start = words.index(MODULE) - 2  # python -m mt_diffusion
    launched = [Path(words[0]).name, *words[1:start]] if start else []
    return shlex.join([*launched, "mt-diffusion", *words[start + 3 :]])
