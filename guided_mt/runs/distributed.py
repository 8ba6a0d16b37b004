"""Processes: how they were started, who is who, and the few collectives that training needs.

`processes.launcher` reads how they were started, `processes.meeting` brings them together; torch.distributed does all communication
(NCCL on GPUs, gloo on CPUs). mpi4py is imported only under an MPI launcher, to agree on an address.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ToldElsewhere, UserError, how_to_install, reason
from .processes.claim import Claim
from .processes.launcher import DEFAULT_PORT, Started, first_host, slurm_port, started
from .processes.meeting import meet
from .processes.memory import keep_freed_memory

# torch's later name for it, under which it doesn't warn
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def all_gather(self, values: Tensor) -> Tensor:
        """[n, ...] of every process -> [world_size * n, ...], in rank order, the same on all."""
        if self.world_size == 1:
            return values
        gathered = torch.empty(
            self.world_size * len(values), *values.shape[1:], dtype=values.dtype, device=values.device
        )
        ALL_GATHER(gathered, values.contiguous())
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, the same on all; `values` itself is changed."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, the same on all; `values` itself is changed."""
        return self.sum(values).div_(self.world_size)

    def collect(self, totals: Tensor) -> None:
        """Move what every process has summed up to the main one: there `totals` becomes the sum of all, elsewhere zero."""
        if self.world_size > 1 and totals.numel():  # not every backend reduces an empty tensor
            dist.reduce(totals, dst=0)
            if not self.is_main:
                totals.zero_()

    def any(self, flag: bool) -> bool:
        """True on all processes if true on one (waits for all of them)."""
        return bool(self.largest(int(flag)))

    def agree(self, error: UserError | None) -> None:
        """Raise `error` on the process that has one; then the others end too, in silence (waits for all of them)."""
        if self.any(error is not None):
            raise error or ToldElsewhere("another process has said why the run ends")

    @contextlib.contextmanager
    def sole_writer(self, claim: Claim) -> Iterator[None]:
        """Inside, the main process has `claim`. Raises UserError, and ends all, where it can't have it (waits for all of them)."""
        with contextlib.ExitStack() as stack:
            refused = None
            if self.is_main:
                try:
                    stack.enter_context(claim)
                except UserError as error:
                    refused = error
            self.agree(refused)
            yield

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers, on all of them (waits for all of them)."""
        if self.world_size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value.item())

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            self.any(False)

    def close(self) -> None:
        """Leave the group of processes."""
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()


def setup(device: str = "") -> Processes:
    """Join the other processes, choose the device ("" = the GPU of the local rank, or the CPU) and divide the CPU's threads.

    Raises UserError where launcher and processes don't agree, or there are too few GPUs.
    """
    found = started()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        _check_gpus(found, device)
    if not found.alone:
        found = join(found, chosen.type)
    if chosen.type == "cuda":
        _check_gpus(found, device)  # again: only now every process knows how many are on its machine
        chosen = choose_device(device, found.local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # the shapes stay the same: let cuDNN choose its kernels by trial
    else:
        keep_freed_memory()
        if found.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // found.local_size))
    return Processes(found.rank, found.world_size, found.local_rank, chosen, found.launcher)


def _check_gpus(found: Started, device: str) -> None:
    """UserError for fewer GPUs than processes; one alone may be each process's own, which `meet` finds out."""
    count = torch.cuda.device_count()
    if (count > 1 and found.local_size > count) or (found.local_size > 1 and ":" in device):
        raise UserError(
            f"{found.local_size} processes on this machine need a GPU each, and there are {count}; "
            "start fewer, without --device cuda:N, or use --device cpu"
        )


def join(found: Started, device_type: str) -> Started:
    """Meet the other processes, over NCCL on GPUs and gloo on CPUs; returns `found` with its place on this machine known.

    Raises UserError where the launcher's numbers are not what the processes find, and where others don't come.
    """
    if found.launcher == "mpi":
        rendezvous_over_mpi()
    elif found.launcher == "slurm":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "localhost"
        os.environ.setdefault("MASTER_ADDR", first_host(nodes))
        os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
    os.environ.setdefault("MASTER_PORT", str(DEFAULT_PORT))
    on_gpu = device_type == "cuda"
    return found.placed(meet(found, "nccl" if on_gpu else "gloo", _only_gpu() if on_gpu else ""))


def _only_gpu() -> str:
    """Which GPU it is where one alone is visible: the process's own, as under `srun --gpus-per-task=1`, or everybody's."""
    if torch.cuda.device_count() != 1 or not torch.cuda.is_available():
        return ""
    return str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))


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


def rendezvous_over_mpi() -> None:
    """Tell torch.distributed by MPI where the processes meet. Raises UserError where mpi4py can't be imported."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
        raise UserError(
            f"started by an MPI launcher, but mpi4py can't be imported ({reason(error)}); {how_to_install('mpi4py')}"
        ) from None
    world, found = MPI.COMM_WORLD, started()
    if (world.rank, world.size) != (found.rank, found.world_size):
        raise UserError(
            f"mpiexec started {found.world_size} processes, but mpi4py finds a world of {world.size}: it was built on another MPI "
            f"than this mpiexec is of; start with torchrun, or the mpiexec of mpi4py's MPI ({how_to_install('mpi4py')} brings both)"
        )
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
