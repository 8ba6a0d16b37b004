"""Which device a process takes, and where processes meet. The launchers themselves run in test_train and test_commands."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from test_launcher import POD, STEP

from guided_mt.errors import UserError
from guided_mt.runs import distributed
from guided_mt.runs.distributed import Processes, choose_device


def test_slurm_agrees_on_an_address(monkeypatch):
    """Every task of a step finds the same host and port without talking; an address set by the user stays."""
    joined = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **kwargs: joined.update(kwargs))
    for name, value in STEP.items():
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
    assert (joined["rank"], joined["world_size"]) == (6, 8)
    assert distributed.os.environ["MASTER_ADDR"] == "gpu003"
    assert 20000 <= int(distributed.os.environ["MASTER_PORT"]) < 40000
    monkeypatch.setenv("MASTER_ADDR", "chosen")
    distributed.setup("cpu")
    assert distributed.os.environ["MASTER_ADDR"] == "chosen"


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({**STEP, "CUDA_VISIBLE_DEVICES": "3"}, 1, "cuda:0"),  # srun --gpus-per-task=1: each its own
        (STEP, 4, "cuda:2"),
        (POD, 1, "cuda:0"),
        (STEP, 3, "4 processes on this machine need a GPU each, and there are 3"),
    ],
)
def test_one_visible_gpu_is_the_process_own(environment, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **kwargs: None)
    monkeypatch.setattr(distributed.os, "environ", dict(environment))
    if expected.startswith("cuda"):
        assert str(distributed.setup().device) == expected
    else:
        with pytest.raises(UserError, match=expected):
            distributed.setup()


def test_mpi4py_of_another_mpi_is_noticed(monkeypatch):
    """Each process is alone in the world that it finds, while mpiexec said two."""
    world = types.SimpleNamespace(rank=0, size=1)
    package = types.ModuleType("mpi4py")
    package.MPI = types.SimpleNamespace(COMM_WORLD=world)
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setattr(distributed.os, "environ", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(
        UserError, match="started 2 processes, but mpi4py finds a world of 1: it was built on another MPI"
    ):
        distributed.setup("cpu")


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
