"""Lightning's strategy `fsdp` as this project has it: a process keeps a part of each trained weight, its gradient and moments.

It is torch's FSDP2 (`fully_shard`) in the place of DistributedDataParallel; all else is Lightning's `ddp`. Lightning's own
FSDPStrategy wraps by FSDP1, under other parameter names, and its ModelParallelStrategy wants GPUs and checkpoints of its own.
"""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy
from typing_extensions import override

SHARDED = ("fsdp", "fsdp2")  # its names in a YAML file


class Sharded(DDPStrategy):
    """Trains a TrainedModule whose weights are spread over all processes.

    Gradients are summed up over processes in every pass, also of those that are accumulated: whole ones are in memory for one
    block at a time.
    """

    @override
    def configure_ddp(self) -> None:
        self.lightning_module.shard(self.root_device.type)  # type: ignore[union-attr, operator]  # a TrainedModule

    @override
    def teardown(self) -> None:
        # Lightning would move everything to the CPU, parts of weights among it, of which their process group knows nothing.
        self.cluster_environment.teardown()  # type: ignore[union-attr]
        self.precision_plugin.teardown()
        self.accelerator.teardown()  # type: ignore[union-attr]
        self.checkpoint_io.teardown()
