"""How a process finds out who started it and who it is. The launchers themselves run in test_train and test_commands."""

from __future__ import annotations

import pytest
import torch

from guided_mt.errors import UserError
from guided_mt.runs import distributed
from guided_mt.runs.distributed import Processes, choose_device, detect, first_host, rank_of_launcher

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
# What a batch script of `sbatch --nodes 2 --ntasks-per-node 4` sees before any srun.
SLURM_BATCH = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "gpu[003-004]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SLURM_STEP = {
    **SLURM_BATCH,
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("python", 0, 1, 0, 1)),
        ({"PATH": "/bin", "MASTER_ADDR": "left over"}, ("python", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, ("torchrun", 0, 1, 1, 4)),
        (OPEN_MPI, ("mpi", 3, 6, 1, 2)),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ("python", 0, 1, 0, 1)),
        (MPICH, ("mpi", 2, 4, 0, 2)),
        (SLURM_STEP, ("slurm", 6, 8, 2, 4)),
        # A batch script has the job's variables but is one process; so is an interactive shell.
        (SLURM_BATCH, ("python", 0, 1, 0, 1)),
        ({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"}, ("python", 0, 1, 0, 1)),
        # A launcher inside a batch script, or inside srun, is the one that counts.
        ({**SLURM_BATCH, **TORCHRUN}, ("torchrun", 5, 8, 1, 4)),
        ({**SLURM_STEP, **TORCHRUN}, ("torchrun", 5, 8, 1, 4)),
        ({**SLURM_BATCH, **OPEN_MPI}, ("mpi", 3, 6, 1, 2)),
    ],
    ids=[
        "python",
        "left-over variables",
        "torchrun",
        "torchrun of one",
        "Open MPI",
        "mpiexec -n 1",
        "MPICH",
        "srun",
        "sbatch script",
        "srun of one",
        "torchrun in sbatch",
        "torchrun in srun",
        "mpiexec in sbatch",
    ],
)
def test_launchers_are_told_apart(environment, expected):
    assert detect(environment) == expected


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),  # a process that Lightning started
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, 3),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, 0),
    ],
)
def test_who_prints_an_error(monkeypatch, environment, rank):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_of_launcher() == rank


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu003", "gpu003"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[7,9-12]", "gpu7"),
        ("cpu1,gpu[003-005]", "cpu1"),
        ("node-a[01-02]", "node-a01"),
        ("ip-10-0-0-12,ip-10-0-0-13", "ip-10-0-0-12"),
        ("login.cluster.org", "login.cluster.org"),
    ],
)
def test_first_host_of_slurms_list(nodelist, host):
    assert first_host(nodelist) == host


def test_slurm_agrees_on_an_address(monkeypatch):
    """Every task of a step finds the same host and port without talking; an address set by the user stays."""
    joined = {}
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **kwargs: joined.update(kwargs))
    for name, value in SLURM_STEP.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # setdefault writes to the environment: register both names so that monkeypatch takes them out again
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.delenv("MASTER_PORT")
    processes = distributed.setup("cpu")
    assert (processes.launcher, processes.rank, processes.world_size) == ("slurm", 6, 8)
    assert (joined["rank"], joined["world_size"], joined["init_method"]) == (6, 8, "env://")
    assert distributed.os.environ["MASTER_ADDR"] == "gpu003"
    assert 20000 <= int(distributed.os.environ["MASTER_PORT"]) < 40000
    monkeypatch.setenv("MASTER_ADDR", "chosen")
    distributed.setup("cpu")
    assert distributed.os.environ["MASTER_ADDR"] == "chosen"


@pytest.mark.parametrize(
    ("name", "gpus", "local_rank", "expected"),
    [
        ("", 0, 0, "cpu"),
        ("cpu", 4, 1, "cpu"),
        ("", 4, 3, "cuda:3"),
        ("cuda", 4, 2, "cuda:2"),
        ("", 2, 5, "cuda:1"),
        ("cuda:1", 2, 0, "cuda:1"),
    ],
)
def test_devices(name, gpus, local_rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(name, local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, "no CUDA device was found"),
        ("cuda:0", 0, "no CUDA device was found"),
        ("cuda:2", 2, "there are 2 CUDA devices, cuda:0 to cuda:1"),
        ("tpu", 2, "write cpu, cuda or cuda:1"),
        ("cuda:", 2, "write cpu, cuda or cuda:1"),
    ],
)
def test_devices_that_are_not_there(name, gpus, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        choose_device(name)


def test_one_process_needs_no_collectives():
    alone = Processes()
    values = torch.arange(3)
    assert alone.is_main and alone.all_gather(values) is values
    assert alone.any(True) is True and alone.any(False) is False
    alone.barrier()
    alone.close()
    assert not torch.distributed.is_initialized()
