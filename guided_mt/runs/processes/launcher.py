"""How this process was started, read from its environment variables: functions of a mapping, without torch.

mpiexec (Open MPI, MPICH, Intel MPI, MVAPICH), torchrun, SLURM's srun and plain python are told apart. One launcher may have
started another, and the outer one's variables are still there: the innermost counts, and numbers of two are never mixed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...errors import UserError

DEFAULT_PORT = 29500  # torch's


class Started(NamedTuple):
    """Who started this process, as which of how many, and which of how many on this machine; local_rank -1: nobody said."""

    launcher: str = "python"  # or torchrun, mpi, slurm
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    def placed(self, hosts: Sequence[str]) -> Started:
        """With the place on this machine, where nobody said it, by the `hosts` of all ranks (none: it is the only one)."""
        if self.local_rank >= 0:
            return self
        mine = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]] or [self.rank]
        return self._replace(local_rank=mine.index(self.rank), local_size=len(mine))


class _Mpi(NamedTuple):
    """The variables of one MPI's mpiexec."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_MPIS = (
    _Mpi("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Mpi("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # hydra: MPICH and Intel MPI
)


def started() -> Started:
    """How this very process was started. Raises UserError for variables that contradict each other or are not whole."""
    return detect(os.environ, os.getpid(), terminal=_has_terminal())


def detect(env: Mapping[str, str], pid: int = 0, *, terminal: bool = False) -> Started:
    """The innermost launcher that `env` speaks of. pid: of this process; terminal: whether it has a controlling one.

    Raises UserError where the variables of two launchers contradict each other, or those of one are not whole.
    """
    torch, mpi = _torch(env), _mpi(env)
    if torch is not None and "TORCHELASTIC_RUN_ID" in env:
        return torch
    if torch is not None and (mpi is None or mpi.alone or (mpi.rank, mpi.world_size) == (torch.rank, torch.world_size)):
        return torch
    if torch is not None and mpi is not None and not torch.alone:
        raise UserError(
            f"RANK and WORLD_SIZE say process {torch.rank} of {torch.world_size}, mpiexec's variables say {mpi.rank} of "
            f"{mpi.world_size}: unset RANK, WORLD_SIZE and MASTER_ADDR to go by mpiexec, or start without it"
        )
    if mpi is not None:
        return Started() if mpi.alone else mpi
    return _slurm(env, pid, terminal) or Started()


def rank_of_launcher() -> int:
    """The rank that the launcher gave this process, before any `setup`. Lightning's own processes know their local rank alone."""
    try:
        return started().rank or int(os.environ.get("LOCAL_RANK", 0))
    except (UserError, ValueError):  # which is about to be told, by every process: none knows better
        return 0


def _torch(env: Mapping[str, str]) -> Started | None:
    """torchrun's variables, or those that pods and scripts set in its manner (which may lack LOCAL_RANK)."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if "MASTER_ADDR" not in env:
        if world > 1:
            raise UserError(
                f"RANK and WORLD_SIZE say process {rank} of {world}, but MASTER_ADDR doesn't say where to meet: set it to the "
                "host of rank 0, or unset the two for a single process"
            )
        return None
    _check(rank, world, "RANK", "WORLD_SIZE")
    local_rank = _number(env, "LOCAL_RANK", -1 if world > 1 else 0)
    return Started("torchrun", rank, world, local_rank, _number(env, "LOCAL_WORLD_SIZE", max(1, local_rank + 1)))


def _mpi(env: Mapping[str, str]) -> Started | None:
    """The variables of an mpiexec. Those that SLURM's srun sets in the same names, as for MPICH's programs, are srun's."""
    for names in _MPIS:
        if names.size in env and names.rank in env:
            rank, world = _number(env, names.rank), _number(env, names.size)
            by_srun = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (str(rank), str(world))
            if names.rank == "PMI_RANK" and by_srun and names.local_rank not in env:
                continue
            _check(rank, world, names.rank, names.size)
            return Started("mpi", rank, world, _number(env, names.local_rank, 0), _number(env, names.local_size, 1))
    return None


def _slurm(env: Mapping[str, str], pid: int, terminal: bool) -> Started | None:
    """A task of srun. A batch script itself also has SLURM_PROCID; only srun's steps have a task count of their own."""
    if _number(env, "SLURM_STEP_NUM_TASKS", 1) <= 1 or "SLURM_PROCID" not in env or _in_shell(env, pid, terminal):
        return None
    rank, world = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    _check(rank, world, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    node = _number(env, "SLURM_NODEID", 0)
    sizes = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return Started("slurm", rank, world, _number(env, "SLURM_LOCALID", 0), sizes[node if node < len(sizes) else 0])


def _in_shell(env: Mapping[str, str], pid: int, terminal: bool) -> bool:
    """Whether this is a program typed into the shell of `srun --pty bash`: the shell is the task, and this no task of its own.

    An srun typed there inherits the shell's variables, but its tasks are what SLURM started, and have no terminal.
    """
    shell = "SLURM_PTY_PORT" in env or env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    task = env.get("SLURM_TASK_PID")
    return shell and (task is None or (task != str(pid) and terminal))


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"the environment variable {name} is '{text}', no whole number; unset it, or correct it"
        ) from None


def _check(rank: int, world: int, rank_name: str, world_name: str) -> None:
    if not 0 <= rank < world:
        raise UserError(
            f"{rank_name} {rank} and {world_name} {world} contradict each other: ranks are 0 to {world - 1}"
        )


# ---------------------------------------------------------------- SLURM's lists


def tasks_per_node(text: str) -> list[int]:
    """SLURM's compressed counts: '4(x2),3' -> [4, 4, 3]. Raises UserError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise UserError(f"SLURM's tasks per node are '{text}', which is no list of counts such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: 'gpu[003-005,9]-ib,cpu1' -> 'gpu003-ib'. Raises UserError where there is none."""
    match = re.match(r"(?:[^,\[\]\s]|\[[^\]]+\])+", nodelist)
    if match is None:
        raise UserError(f"SLURM's list of hosts '{nodelist}' names none; set MASTER_ADDR to the first one")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group())


def slurm_port(env: Mapping[str, str]) -> int:
    """A port that all tasks of a job's step agree on without talking: below those that systems give out themselves."""
    job, step = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_STEP_ID", "0")
    numbers = [int(word) if word.isdecimal() else 0 for word in (job, step)]
    return 20000 + (numbers[0] + 101 * numbers[1]) % 12000
