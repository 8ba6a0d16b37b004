"""Processes: how they were started, who is who, and the few collectives that training needs.

Plain python, mpiexec, torchrun and SLURM's srun are told apart by their environment variables; torch.distributed does all
communication (NCCL on GPUs, gloo on CPUs). mpi4py is imported only under an MPI launcher, to agree on an address.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among all: rank in 0..world_size-1, its device, and what started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launcher: str = "python"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, values: Tensor) -> Tensor:
        """[n, ...] of every process -> [world_size * n, ...], in rank order, the same on all."""
        if self.world_size == 1:
            return values
        gathered = torch.empty(
            self.world_size * len(values), *values.shape[1:], dtype=values.dtype, device=values.device
        )
        dist.all_gather_into_tensor(gathered, values.contiguous())
        return gathered

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, the same on all."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, flag: bool) -> bool:
        """True on all processes if true on one (waits for all of them)."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        if self.world_size > 1:
            self.any(False)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def setup(device: str = "") -> Processes:
    """Join the other processes, choose the device ("" = the GPU of the local rank, or the CPU) and divide the CPU's threads."""
    launcher, rank, world_size, local_rank, local_size = detect(os.environ)
    if launcher == "mpi":
        rendezvous_over_mpi()
    elif launcher == "slurm":
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        if local_size > torch.cuda.device_count() or (local_size > 1 and ":" in device):
            raise UserError(
                f"{local_size} processes on this machine need a GPU each, and there are {torch.cuda.device_count()}; "
                "start fewer, without --device cuda:N, or use --device cpu"
            )
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # the shapes stay the same: let cuDNN choose its kernels by trial
    elif local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if world_size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size)
    return Processes(rank, world_size, local_rank, chosen, launcher)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """'cpu', 'cuda', 'cuda:1'; '' and 'cuda' take the GPU of the local rank, '' the CPU where there is none."""
    count = torch.cuda.device_count()
    if name == "cpu" or (not name and not count):
        return torch.device("cpu")
    if name not in ("", "cuda") and not re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"--device '{name}': write cpu, cuda or cuda:1")
    if not count:
        raise UserError(f"--device {name}: no CUDA device was found; leave the flag out to run on the CPU")
    index = int(name[5:] or 0) if ":" in name else local_rank % count
    if index >= count:
        raise UserError(f"--device {name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def detect(env: Mapping[str, str]) -> tuple[str, int, int, int, int]:
    """(launcher, rank, world size, local rank, processes on this machine)."""
    if "RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env:
        world = int(env["WORLD_SIZE"])
        return (
            "torchrun",
            int(env["RANK"]),
            world,
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", world)),
        )
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        local = int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)), int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
        return "mpi", int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"]), *local
    # A batch script itself also has SLURM_PROCID; only srun's steps have a task count of their own.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        local_size = int(re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", "1"), maxsplit=1)[0])
        return (
            "slurm",
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
            local_size,
        )
    if int(env.get("PMI_SIZE", 1)) > 1:
        local = int(env.get("MPI_LOCALRANKID", 0)), int(env.get("MPI_LOCALNRANKS", 1))
        return "mpi", int(env["PMI_RANK"]), int(env["PMI_SIZE"]), *local
    return "python", 0, 1, 0, 1


def rank_of_launcher() -> int:
    """The rank that the launcher gave this process, before any `setup`. Lightning's own processes know their local rank alone."""
    return detect(os.environ)[1] or int(os.environ.get("LOCAL_RANK", 0))


def rendezvous_over_mpi() -> None:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"started by an MPI launcher, but mpi4py can't be imported ({error}); pip install '.[mpi]'"
        ) from None
    world = MPI.COMM_WORLD
    one_machine = world.Split_type(MPI.COMM_TYPE_SHARED).size == world.size
    address = None
    if world.rank == 0:
        host = "127.0.0.1" if one_machine else socket.getfqdn()
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = (host, str(probe.getsockname()[1]))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = world.bcast(address)
    # MPI has done its part. Finalised now, a process that fails later exits at once instead of waiting for the others.
    MPI.Finalize()


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: 'gpu[003-005,9],cpu1' -> 'gpu003'. Raises UserError where there is none."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
    if match is None:
        raise UserError(f"SLURM's list of hosts '{nodelist}' names none; set MASTER_ADDR to the first one")
    return match.group(1) + (match.group(2) or "")
