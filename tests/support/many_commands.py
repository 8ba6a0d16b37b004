"""Commands one after another in one process, or group of processes: starting each by itself takes far longer than a tiny run.

    [mpiexec -n 2] python tests/many_commands.py FILE

FILE: a JSON list of {"command": one of COMMANDS, "argv": [...], "dies_at": null or a step}. With `dies_at`, training runs in a
process of its own that kills itself (-9) where that step would begin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from guided_mt.commands import sample, train
from guided_mt.runs import distributed
from guided_mt.runs.writer import CheckpointWriter
from guided_mt.training.train_loop import TrainLoop
from latent_mt.commands import latent_sample, latent_train
from latent_mt.training.latent_diffusion import LatentTraining

COMMANDS: dict[str, Any] = {
    "train": train,
    "sample": sample,
    "latent_train": latent_train,
    "latent_sample": latent_sample,
}
# What each training command calls for a step, and where it counts the steps that are done.
STEPS: dict[str, tuple[Any, str, str]] = {
    "train": (TrainLoop, "run_step", "step"),
    "latent_train": (LatentTraining, "training_step", "steps_done"),
}
OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def run_and_die(command: str, argv: list[str], step: int) -> None:
    """Returns when the process that trains by `argv` is dead."""
    pid = os.fork()
    if pid == 0:
        kind, name, counter = STEPS[command]
        run_step = getattr(kind, name)

        def mortal(self: Any, *args: Any) -> Any:
            if getattr(self, counter) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return run_step(self, *args)

        begin = CheckpointWriter.begin

        def begin_and_wait(self: CheckpointWriter, *args: Any, **values: Any) -> None:
            begin(self, *args, **values)
            assert self.failure(wait=True) is None

        setattr(kind, name, mortal)
        CheckpointWriter.begin = begin_and_wait  # else it is chance whether a checkpoint is whole when the process dies
        try:
            COMMANDS[command].main(argv)
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


def leave_group() -> None:
    """Lightning stays in the group of processes of a run, and leaves its ranks in the environment, where a launcher's would be."""
    distributed.Processes().close()
    for name in OF_A_GROUP:
        os.environ.pop(name, None)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    distributed.rendezvous_over_mpi = meet_once(distributed.rendezvous_over_mpi)
    for row in json.loads(file.read_text()):
        if row["dies_at"] is None:
            COMMANDS[row["command"]].main(row["argv"])
            leave_group()
        else:
            run_and_die(row["command"], row["argv"], row["dies_at"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
