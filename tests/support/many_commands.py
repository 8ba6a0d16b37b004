"""Commands one after another in one process, or group of processes: starting each by itself takes far longer than a tiny run.

    [mpiexec -n 2] python tests/many_commands.py FILE

FILE: a JSON list of {"command": train or sample, "argv": [...], "dies_at": null or a step}. With `dies_at`, training runs in a
process of its own that kills itself (-9) where that step would begin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from guided_mt.commands import sample, train
from guided_mt.runs import distributed
from guided_mt.training.train_loop import TrainLoop


def run_and_die(argv: list[str], step: int) -> None:
    """Returns when the process that trains by `argv` is dead."""
    pid = os.fork()
    if pid == 0:
        run_step = TrainLoop.run_step

        def mortal(self: TrainLoop, batch) -> None:
            if self.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            run_step(self, batch)

        TrainLoop.run_step = mortal
        try:
            train.main(argv)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, argv


def meet_once(true_rendezvous: Callable[[], None]) -> Callable[[], None]:
    """MPI can't be started again in a process: later groups meet at the first one's address, each at a port of its own."""

    def rendezvous() -> None:
        if "MASTER_PORT" not in os.environ:
            true_rendezvous()
        else:
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) - 1)

    return rendezvous


def main(file: Path) -> None:
    torch.set_num_threads(1)
    distributed.rendezvous_over_mpi = meet_once(distributed.rendezvous_over_mpi)
    for row in json.loads(file.read_text()):
        if row["dies_at"] is None:
            {"train": train, "sample": sample}[row["command"]].main(row["argv"])
        else:
            run_and_die(row["argv"], row["dies_at"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
