"""A training run under Lightning: the run folder of guided_mt, filled and resumed by one callback that asks its run policy.

Lightning brings devices, processes, precision and gradient accumulation. Its own checkpoints, loggers and loop state are not
used: to resume is to start the loop anew at a later step, so nothing of the past hides in the trainer.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from guided_mt.data import Batch
from guided_mt.data.loader import BatchStream
from guided_mt.errors import UserError, reason
from guided_mt.runs import checkpoint, resume
from guided_mt.runs.distributed import Processes
from guided_mt.runs.policy import RunPolicy
from guided_mt.runs.resume import newest_checkpoint

from .launched import with_launcher
from .program import as_typed
from .run_config import RunConfig
from .sharded import SHARDED, Sharded
from .trained_module import TrainedModule

REPLICAS = ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class _Stream:
    """The stream of batches, which ends early when the run is to stop."""

    def __init__(self, stream: BatchStream, folder: RunFolder):
        self.stream, self.folder = stream, folder

    def __iter__(self) -> Iterator[Batch]:
        with self.stream:
            for batch in self.stream:
                if self.folder.stopped:
                    return
                yield batch


class RunFolder(pl.Callback):
    """Brings guided_mt's run policy to Lightning's loop: it is asked after every optimiser step, and here the loop is stopped."""

    def __init__(self, folder: Path, config: RunConfig, config_yaml: str):
        self.folder, self.config, self.config_yaml = folder, config, config_yaml
        self.data: Any = None
        self.launcher = "python"
        self.policy: RunPolicy | None = None
        self.newest: Path | None = None  # the checkpoint to go on from
        self.stopped = self.interrupted = False
        self.running = contextlib.ExitStack()

    @override
    def on_train_start(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        processes = Processes(
            trainer.global_rank, trainer.world_size, trainer.local_rank, trainer.strategy.root_device, self.launcher
        )
        module.processes = processes
        module.prepare(self.data, self.newest is not None)
        if self.newest is not None:
            state = checkpoint.read_state(self.newest / "training_state.pt")
            with resume.fitting(self.newest):
                module.load_training_state(state)
        resume.agree_on_step(self.folder, module.steps_done, processes)
        self.last_step = module.steps_done
        policy = RunPolicy(
            module,
            self.config,
            processes,
            self.folder,
            step=self.last_step,
            columns=["step", "samples", *module.columns(), "images_per_second"],
            images_per_step=self.config.images_per_step,
            config_yaml=self.config_yaml,
            classes=None if self.data.source.labels is None else self.data.source.class_names,
            preview_interval=self.config.sample_interval,
            advice="lower the learning rate, or use precision 32",
        )
        self.policy = self.running.enter_context(policy)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: TrainedModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.steps_done == self.last_step:
            return  # gradients are still being accumulated
        self.last_step = step = module.steps_done
        module.after_step()
        interval, last = self.config.val_interval, step == self.config.total_steps
        figures = module.evaluate() if interval and (step % interval == 0 or last) else {}
        assert self.policy is not None
        if self.policy.after_step(step, figures):
            self.stopped = trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        self.running.close()

    @override
    def on_exception(self, trainer: pl.Trainer, module: TrainedModule, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)
        self.running.__exit__(type(exception), exception, exception.__traceback__)


# ---------------------------------------------------------------- the run


def refuse_other_settings(newest: Path, wanted: Mapping[str, Any]) -> None:
    """UserError where the run in `newest` was trained with other values of these {dotted key: value}."""
    saved = flatten(checkpoint.read_config(newest / "model.safetensors") or {})
    resume.refuse_other_settings(newest, {key: saved.get(key) for key in wanted}, wanted, "take another run.log_dir")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inside = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return flat


def make_trainer(folder: RunFolder, options: Mapping[str, Any], processes: Processes | None = None) -> pl.Trainer:
    """A Trainer with these keywords of pl.Trainer, for `fit`. Raises UserError where they don't suit this machine.

    processes: those of `launched.join`; None: this one alone.
    """
    folder.launcher = (processes or Processes()).launcher
    options = with_launcher(options, processes or Processes())
    strategy = str(options.get("strategy", "auto"))
    if strategy not in ("auto", *REPLICAS, *SHARDED):
        raise UserError(
            f"lightning.trainer.strategy '{strategy}': choose from auto, {', '.join([*REPLICAS, *SHARDED])}"
        )
    if strategy in SHARDED:
        if str(options.get("precision")) in ("16", "16-mixed"):
            raise UserError("lightning.trainer.strategy fsdp: not with precision 16-mixed; take bf16-mixed, or ddp")
        options["strategy"] = Sharded()
    try:
        with _quiet():
            trainer = pl.Trainer(
                **options,
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                callbacks=[folder],
            )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"lightning.trainer: {reason(error)}") from None
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"lightning.trainer.precision {options['precision']}: weights and latents stay in float32 here; take one of "
            f"{', '.join(PRECISIONS)}"
        )
    return trainer


def fit(trainer: pl.Trainer, folder: RunFolder, module: TrainedModule, data: Any) -> None:
    """Train `module` on `data` to `total_steps`, or on from the newest checkpoint of the folder.

    data: has `batch_size` (per process and pass), `source`, `amount` and `stream(...)` as `latent_mt.data.PairData`.
    Raises UserError, and Interrupted where Ctrl-C ended it, saved.
    """
    if isinstance(trainer.strategy, Sharded) and not module.shardable:
        raise UserError(
            "lightning.trainer.strategy fsdp: a first stage is small and is trained in whole replicas; use ddp"
        )
    folder.newest = newest = newest_checkpoint(folder.folder)
    folder.data, module.run = data, folder.config
    if newest is not None:
        module.load_weights_of(newest)
        module.steps_done = checkpoint.checkpoint_step(newest)
    if trainer.is_global_zero:
        try:
            folder.folder.mkdir(parents=True, exist_ok=True)
            (folder.folder / "config.yaml").write_text(folder.config_yaml)
        except OSError as error:
            raise UserError(f"run.log_dir {folder.folder}: can't be written ({error.strerror}); name another") from None
        reached = f"resuming after step {module.steps_done}" if newest else "starting"
        print(f"# {data.amount}, {reached}; {trainer.world_size} process(es)", flush=True)
    if module.steps_done >= folder.config.total_steps:
        return
    stream = data.stream(
        seed=folder.config.seed,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        start_step=module.steps_done,
        total_steps=folder.config.total_steps,
        accumulate=trainer.accumulate_grad_batches,
    )
    if trainer.strategy.root_device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    try:
        with _quiet(), as_typed():  # Lightning starts further processes by the words of sys.argv
            trainer.fit(module, train_dataloaders=_Stream(stream, folder))
    except SystemExit:
        if folder.interrupted:  # before the first step: Lightning makes an exit of it
            raise KeyboardInterrupt from None
        raise
    if folder.policy is not None:
        folder.policy.raise_if_interrupted()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's banners, and its advice on loaders and loggers that are not its own."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    for other in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(other).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning.*")
            warnings.filterwarnings("ignore", module="lightning_fabric.*")
            yield
    finally:
        logger.setLevel(level)
