"""How a process finds out who started it and who it is, from environments alone. The launchers themselves run in test_train."""

from __future__ import annotations

import pytest

from guided_mt.errors import UserError
from guided_mt.runs.processes.launcher import (
    Started,
    detect,
    first_host,
    rank_of_launcher,
    slurm_port,
    tasks_per_node,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
POD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}  # as Kubeflow sets them
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
# What a batch script of `sbatch --nodes 2 --ntasks-per-node 4` sees before any srun.
BATCH = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "gpu[003-004]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
STEP = {
    **BATCH,
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
# mpirun starts its helpers on the other machines by srun, a task per machine, and the ranks inherit what that one was told.
HELPER = {**BATCH, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
SHELL = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_PTY_PORT": "40000"}

ROWS = {
    "python": ({}, Started()),
    "left-over variables": ({"PATH": "/bin", "MASTER_ADDR": "left over"}, Started()),
    "left-over rank": ({"RANK": "0", "WORLD_SIZE": "1"}, Started()),
    "torchrun": (TORCHRUN, Started("torchrun", 5, 8, 1, 4)),
    "torchrun of one": ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, Started("torchrun", 0, 1, 1, 4)),
    "a pod per process": (POD, Started("torchrun", 1, 4, -1, 1)),
    "Open MPI": (OPEN_MPI, Started("mpi", 3, 6, 1, 2)),
    "mpiexec -n 1": ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Started()),
    "MPICH": (HYDRA, Started("mpi", 2, 4, 0, 2)),
    "srun": (STEP, Started("slurm", 6, 8, 2, 4)),
    "srun, nodes unlike": (
        {**STEP, "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3"},
        Started("slurm", 6, 7, 2, 3),
    ),
    "srun --mpi=pmi2": ({**STEP, "PMI_RANK": "6", "PMI_SIZE": "8"}, Started("slurm", 6, 8, 2, 4)),
    "srun of one": ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, Started()),
    # A batch script has the job's variables but is one process.
    "sbatch script": (BATCH, Started()),
    # A launcher inside a batch script, or inside srun, is the one that counts, and none of its numbers is the outer one's.
    "torchrun in sbatch": ({**BATCH, **TORCHRUN}, Started("torchrun", 5, 8, 1, 4)),
    "torchrun in srun": ({**STEP, **TORCHRUN}, Started("torchrun", 5, 8, 1, 4)),
    "torchrun in mpiexec": ({**OPEN_MPI, **TORCHRUN}, Started("torchrun", 5, 8, 1, 4)),
    "mpiexec in sbatch": ({**BATCH, **OPEN_MPI}, Started("mpi", 3, 6, 1, 2)),
    "mpiexec with helpers by srun": ({**HELPER, **OPEN_MPI}, Started("mpi", 3, 6, 1, 2)),
    "hydra with helpers by srun": ({**HELPER, **HYDRA}, Started("mpi", 2, 4, 0, 2)),
    "hydra, as many ranks as helpers": (
        {**HELPER, **HYDRA, "PMI_RANK": "1", "PMI_SIZE": "2"},
        Started("mpi", 1, 2, 0, 2),
    ),
    "mpiexec -n 1 in srun": ({**STEP, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, Started()),
    "mpiexec in a pod of one": ({**POD, "RANK": "0", "WORLD_SIZE": "1", **OPEN_MPI}, Started("mpi", 3, 6, 1, 2)),
    "a script that hands mpiexec's numbers on": (
        {**OPEN_MPI, "RANK": "3", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "MASTER_ADDR": "a"},
        Started("torchrun", 3, 6, 1, 2),
    ),
    # The shell of `srun --pty bash` is the task; what is typed there is one process, which has the shell's terminal.
    "typed into srun's shell": (SHELL, Started()),
    "typed into srun's shell, the task known": ({**SHELL, "SLURM_TASK_PID": "50", "terminal": "1"}, Started()),
    "typed into a job named bash": ({**STEP, "SLURM_JOB_NAME": "bash"}, Started()),
    "srun typed into srun's shell": ({**SHELL, "SLURM_TASK_PID": "77"}, Started("slurm", 0, 8, 0, 4)),
    "srun of a script typed there": ({**SHELL, "SLURM_TASK_PID": "70"}, Started("slurm", 0, 8, 0, 4)),
    "mpiexec typed into srun's shell": ({**SHELL, **OPEN_MPI}, Started("mpi", 3, 6, 1, 2)),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_innermost_launcher_counts(row):
    environment, expected = ROWS[row]
    assert detect(environment, pid=77, terminal="terminal" in environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8"}, "process 3 of 8, but MASTER_ADDR doesn't say where to meet"),
        ({**POD, **OPEN_MPI}, "process 1 of 4, mpiexec's variables say 3 of 6"),
        ({**TORCHRUN, "RANK": "8"}, "RANK 8 and WORLD_SIZE 8 contradict each other: ranks are 0 to 7"),
        ({**TORCHRUN, "RANK": "five"}, "RANK is 'five', no whole number"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "many"}, "tasks per node are 'many'"),
    ],
)
def test_numbers_that_contradict_each_other(environment, message):
    with pytest.raises(UserError, match=message):
        detect(environment)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),  # a process that Lightning started
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, 3),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 0),  # an error, which each process is to tell
    ],
)
def test_who_prints_an_error(monkeypatch, environment, rank):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_of_launcher() == rank


def test_a_place_that_nobody_said_is_found_by_the_hosts():
    found = Started("torchrun", 3, 5, -1, 1)
    assert found.placed(["a", "b", "a", "b", "b"]) == Started("torchrun", 3, 5, 1, 3)
    assert found.placed([]) == Started("torchrun", 3, 5, 0, 1)
    told = Started("torchrun", 3, 5, 0, 1)
    assert told.placed(["a"] * 5) == told


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu003", "gpu003"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[7,9-12]", "gpu7"),
        ("cpu1,gpu[003-005]", "cpu1"),
        ("node-a[01-02]", "node-a01"),
        ("node[01-03]-ib", "node01-ib"),
        ("node[01-03]-ib,node9-ib", "node01-ib"),
        ("rack[1-2]node[04-09].cluster.org", "rack1node04.cluster.org"),
        ("ip-10-0-0-12,ip-10-0-0-13", "ip-10-0-0-12"),
        ("login.cluster.org", "login.cluster.org"),
    ],
)
def test_first_host_of_slurms_list(nodelist, host):
    assert first_host(nodelist) == host


def test_lists_of_slurm_that_are_none():
    with pytest.raises(UserError, match="names none; set MASTER_ADDR"):
        first_host("")
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


def test_steps_of_a_job_meet_at_ports_of_their_own():
    ports = {slurm_port({"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": str(step)}) for step in range(4)}
    assert len(ports) == 4 and all(20000 <= port < 32000 for port in ports)
    assert slurm_port({"SLURM_JOB_ID": "1_[3]"}) == 20000
