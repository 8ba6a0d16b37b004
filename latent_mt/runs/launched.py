"""Lightning among the processes that a launcher started: told what guided_mt's own reading of them is, so that both agree.

Lightning would look for SLURM, torchrun and others by itself, each by rules of its own. Under SLURM it also answers SIGUSR1 with a
checkpoint hpc_ckpt_N.ckpt in the working directory, puts the job into the queue again, and begins the next training of any kind
from the newest such file: none of that is wanted where a run folder says what a run goes on from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from typing_extensions import override

from guided_mt.runs import distributed
from guided_mt.runs.distributed import Processes
from guided_mt.runs.processes.launcher import Started, rank_of_launcher, started
from guided_mt.runs.processes.memory import keep_freed_memory


class Launched(ClusterEnvironment):
    """The processes that mpiexec, torchrun or srun started. local_rank: the place of this one's device among those it sees."""

    def __init__(self, found: Started, local_rank: int, local_size: int):
        super().__init__()
        self.found, self.place, self.node = found, local_rank, found.rank // local_size

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    @override
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self.found.world_size

    def set_world_size(self, size: int) -> None:
        """It is what it is."""

    @override
    def global_rank(self) -> int:
        return self.found.rank

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    @override
    def local_rank(self) -> int:
        return self.place

    @override
    def node_rank(self) -> int:
        return self.node


def device_of(options: Mapping[str, Any]) -> torch.device:
    """The kind of device that pl.Trainer takes by these keywords."""
    accelerator = str(options.get("accelerator", "auto"))
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def join(options: Mapping[str, Any]) -> Processes:
    """The processes that a launcher started, met before anything is built. Lightning's own are no group yet: each is alone.

    Raises UserError as `distributed.join` does.
    """
    found, device = started(), device_of(options)
    if device.type == "cpu":
        keep_freed_memory()
    if found.alone:
        return Processes(rank=rank_of_launcher())
    found = distributed.join(found, device.type)
    place = 0 if device.type == "cpu" or torch.cuda.device_count() == 1 else found.local_rank
    on = torch.device("cpu") if device.type == "cpu" else torch.device(device.type, place)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    return Processes(found.rank, found.world_size, found.local_rank, on, found.launcher)


def with_launcher(options: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """pl.Trainer's keywords, with the launcher's processes (see `join`) in the place of those that Lightning would look for.

    What the launcher started is what there is, whatever the file says for plain python; a list still chooses the GPUs.
    """
    options = {**options, "default_root_dir": os.devnull}  # nothing is written or found there
    plugins = list(options.get("plugins") or [])
    if processes.world_size == 1:
        return {**options, "plugins": [*plugins, LightningEnvironment()]}
    found = started()
    local_size, place = found.local_size, processes.local_rank
    if processes.device.type == "cuda" and torch.cuda.device_count() == 1:
        local_size, place = 1, 0  # each process sees its own GPU alone: as if each were a machine
    if not isinstance(options.get("devices"), (list, tuple)):
        options["devices"] = local_size
    options["num_nodes"] = max(1, processes.world_size // local_size)
    options.setdefault("strategy", "ddp")
    return {**options, "plugins": [*plugins, Launched(found, place, local_size)]}
