"""A training run under Lightning: the run folder of guided_mt (DESIGN 5), filled and resumed by one callback.

Lightning brings devices, processes, precision and gradient accumulation. Its own checkpoints, loggers and loop state are not
used: to resume is to start the loop anew at a later step, so nothing of the past hides in the trainer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from guided_mt.data import Batch, ImageStream
from guided_mt.data.images import save_png
from guided_mt.diffusion.random import seed_dropout
from guided_mt.errors import UserError, reason
from guided_mt.runs import checkpoint, distributed
from guided_mt.runs.config import option
from guided_mt.runs.distributed import Processes
from guided_mt.training.loop import MAX_SKIPPED_IN_ROW, SIGNAL_INTERVAL, refuse_divergence
from guided_mt.training.metrics import Reporter
from guided_mt.training.optim import Ema, learning_rate, load_optimizer

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
log = logging.getLogger("latent_mt")


@dataclass
class RunConfig:
    """Training: the `run` section of a YAML file"""

    log_dir: str = option(
        "", "folder of this run; the same command again resumes it. Empty: runs/NAME of the YAML file"
    )
    total_steps: int = option(100_000, "optimiser steps of the whole run", least=1)
    log_interval: int = option(50, "steps between log lines", least=1)
    save_interval: int = option(5_000, "steps between checkpoints", least=1)
    keep_checkpoints: int = option(0, "how many checkpoints to keep; 0: all", least=0)
    sample_interval: int = option(0, "steps between PNG grids; 0: none", least=0)
    val_interval: int = option(0, "steps between evaluations on the validation split; 0: none", least=0)
    ema_rate: str = option("0.9999", "rate of the averaged weights; empty: none")
    lr_warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", least=0)
    grad_clip: float = option(0.0, "largest norm of the gradient; 0: no clipping", least=0)
    seed: int = option(0, "seed of initialisation, data order and noise", least=0, most=2**32 - 1)
    images_per_step: int = option(
        -1,
        "images per step over all processes; -1: data.params.batch_size * processes * accumulate_grad_batches",
        least=1,
    )


class TrainedModule(pl.LightningModule):
    """What `fit` trains: counters, averages and rates that every training has. Subclasses say what is trained.

    averaged: the part of it whose weights are averaged; prefix: how that part's entries begin in the checkpoint's files.
    """

    prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.processes = RunConfig(), Processes()  # set by `fit`
        self.base_rate, self.steps_done = 0.0, 0  # optimiser steps of the run so far
        self.schedule: Callable[[int], float] | None = None  # factor of the rate at a step
        self.data: Any = None
        self.random_flip = False
        self.ema: Ema | None = None
        self.skipped = self.skipped_in_row = torch.zeros(())  # steps whose gradient was not finite

    @property
    def averaged(self) -> nn.Module:
        raise NotImplementedError

    @property
    def ema_rates(self) -> list[str]:
        return [self.run.ema_rate] if self.run.ema_rate else []

    def rate(self, step: int) -> float:
        """The learning rate of 0-based `step`."""
        factor = 1.0 if self.schedule is None else self.schedule(step)
        return factor * learning_rate(step, self.base_rate, self.run.lr_warmup_steps, 0)

    def seed_dropout(self) -> None:
        seed_dropout(self.run.seed, self.steps_done, self.processes.rank)

    def count(self, bad: torch.Tensor) -> None:
        """bad: 1 where this step's gradient was not finite, else 0."""
        self.skipped = self.skipped + bad
        self.skipped_in_row = (self.skipped_in_row + 1) * bad

    def prepare(self, data: Any, resumed: bool) -> None:
        """Called once on the training device before the first step, after a resumed run's weights were loaded."""
        self.data, self.random_flip = data, data.random_flip
        self.skipped = self.skipped_in_row = torch.zeros((), device=self.device)
        if self.ema is None:
            self.ema = Ema(self.averaged, self.ema_rates)
        self.ema.follow()

    def after_step(self) -> None:
        """Called after each optimiser step."""
        self.ema.update()

    @contextlib.contextmanager
    def with_averages(self) -> Iterator[None]:
        """Inside, `averaged` has its slowest averaged weights (where there are any) and is in eval mode."""
        rate = max(self.ema.averages, key=float, default=None) if self.ema is not None else None
        training = self.averaged.training
        self.averaged.eval()
        if rate is not None:
            self.ema.swap(rate)
        try:
            yield
        finally:
            if rate is not None:
                self.ema.swap(rate)
            self.averaged.train(training)

    def load_averages(self, folder: Path) -> None:
        """The averages of a checkpoint. Raises UserError where it has none of this rate."""
        self.ema = Ema(self.averaged, self.ema_rates)
        for rate in self.ema_rates:
            file = folder / f"ema_{rate}.safetensors"
            if not file.exists():
                raise UserError(f"{folder}: has no averaged weights for run.ema_rate {rate}; keep the run's ema_rate")
            state = checkpoint.read_weights(file)
            own = {k.removeprefix(self.prefix): v for k, v in state.items() if k.startswith(self.prefix)}
            self.ema.load(rate, own)

    # ------------------------------------------------------------ what a subclass says

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """{file stem: state dict}: `model`, and `ema_RATE` where there are averages."""
        raise NotImplementedError

    def load_weights_of(self, folder: Path) -> None:
        """The counterpart of `weights`."""
        raise NotImplementedError

    def run_state(self) -> dict[str, Any]:
        """What a resumed run has to find again beyond weights and optimisers."""
        raise NotImplementedError

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `run_state`, called on the training device."""
        raise NotImplementedError

    def columns(self) -> list[str]:
        """The columns of progress.csv that `report_row` fills."""
        raise NotImplementedError

    def report_row(self) -> dict[str, float]:
        """Values since the last report; the only wait for the device."""
        raise NotImplementedError

    def preview(self) -> np.ndarray | None:
        """A picture uint8 [H, W, 3] of how far the model is."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Figures on the validation split."""
        raise NotImplementedError


class _Stream:
    """The stream of batches, which ends early when the run is to stop."""

    def __init__(self, stream: ImageStream, folder: RunFolder):
        self.stream, self.folder = stream, folder

    def __iter__(self) -> Iterator[Batch]:
        with self.stream:
            for batch in self.stream:
                if self.folder.stopped:
                    return
                yield batch


class RunFolder(pl.Callback):
    """Writes progress.csv, TensorBoard events, checkpoints and grids at their intervals; SIGTERM saves and ends the run."""

    def __init__(self, folder: Path, run: RunConfig, config_yaml: str):
        self.folder, self.config, self.config_yaml = folder, run, config_yaml
        self.data: Any = None
        self.resumed: dict[str, Any] | None = None
        self.stopped = self.stop_requested = self.save_due = False
        self.reporter: Reporter | None = None

    # ------------------------------------------------------------ start and end

    def on_train_start(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        processes = Processes(
            trainer.global_rank, trainer.world_size, trainer.local_rank, trainer.strategy.root_device, "lightning"
        )
        module.processes = processes
        module.prepare(self.data, self.resumed is not None)
        if self.resumed is not None:
            self._restore(trainer, module)
        reached = processes.all_gather(torch.tensor([module.steps_done], device=processes.device)).tolist()
        if len(set(reached)) > 1:
            raise UserError(
                f"{self.folder}: the processes see different checkpoints (steps {reached}); is it shared by all?"
            )
        self.last_step = module.steps_done
        if processes.is_main:
            columns = ["step", "samples", *module.columns(), "images_per_second"]
            self.reporter = Reporter(self.folder, columns, self.config.total_steps, self.last_step)
        self.clock, self.clock_step = time.monotonic(), self.last_step
        self.previous_handler = signal.signal(signal.SIGTERM, self._request_stop)

    def on_train_end(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: TrainedModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if hasattr(self, "previous_handler"):
            signal.signal(signal.SIGTERM, self.previous_handler)
        if self.reporter:
            self.reporter.close()
            self.reporter = None

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    # ------------------------------------------------------------ every step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: TrainedModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.steps_done == self.last_step:
            return  # gradients are still being accumulated
        self.last_step = step = module.steps_done
        module.after_step()
        config, last = self.config, step == self.config.total_steps
        figures = {}
        if config.val_interval and (step % config.val_interval == 0 or last):
            figures = module.evaluate()
        if step % config.log_interval == 0 or last or figures:
            self._report(trainer, module, figures)
        if step % MAX_SKIPPED_IN_ROW == 0 or last:
            refuse_divergence(step, module.skipped_in_row, "lower the learning rate, or use precision 32")
        if config.sample_interval and step % config.sample_interval == 0:
            self._preview(module)
        stop = self._agreed_stop(trainer)
        self.save_due = self.save_due or step % config.save_interval == 0
        if last or stop or (self.save_due and not module.skipped_in_row.item()):
            self._save(trainer, module)
            self.save_due = False
        if stop:
            self.stopped = trainer.should_stop = True
            if trainer.is_global_zero:
                log.info("SIGTERM: saved step %d; run the same command to go on", step)

    def _report(self, trainer: pl.Trainer, module: TrainedModule, figures: Mapping[str, float]) -> None:
        steps, seconds = self.last_step - self.clock_step, max(time.monotonic() - self.clock, 1e-9)
        values = {**module.report_row(), **figures}
        self.clock, self.clock_step = time.monotonic(), self.last_step
        if self.reporter:
            per_step = self.config.images_per_step
            row = {"step": self.last_step, "samples": self.last_step * per_step}
            row |= {name: values[name] for name in self.reporter.columns if name in values}
            row["images_per_second"] = steps * per_step / seconds
            self.reporter.row(row)

    def _preview(self, module: TrainedModule) -> None:
        if module.processes.is_main:
            picture = module.preview()
            if picture is not None:
                save_png(picture, self.folder / "grids" / f"step_{self.last_step:08d}.png")
                self.reporter.image("preview", torch.from_numpy(picture).permute(2, 0, 1), self.last_step)
        module.processes.barrier()

    def _agreed_stop(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self.stop_requested
        often = trainer.strategy.root_device.type == "cpu"  # on a GPU asking would wait for it
        ask = often or self.last_step % SIGNAL_INTERVAL == 0
        return ask and trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)

    # ------------------------------------------------------------ checkpoints

    def _save(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        failure = None
        if trainer.is_global_zero:
            state = {
                "step": self.last_step,
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "precision": trainer.precision_plugin.state_dict(),
                "run": module.run_state(),
            }
            try:
                checkpoint.save_checkpoint(
                    self.folder,
                    self.last_step,
                    config_yaml=self.config_yaml,
                    weights=module.weights(),
                    training_state=state,
                    classes=None,
                    keep=self.config.keep_checkpoints,
                )
            except UserError as error:
                failure = error
        if module.processes.any(failure is not None):
            raise failure or UserError("the main process could not write the checkpoint")

    def _restore(self, trainer: pl.Trainer, module: TrainedModule) -> None:
        state = self.resumed
        try:
            for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            trainer.precision_plugin.load_state_dict(state["precision"])
            module.load_run_state(state["run"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{self.folder}: the newest checkpoint's training_state.pt does not fit this run ({str(error).splitlines()[0]})"
            ) from None


# ---------------------------------------------------------------- the run


def newest_checkpoint(folder: Path) -> Path | None:
    found = checkpoint.checkpoints(folder)
    return found[-1] if found else None


def refuse_other_settings(newest: Path, wanted: Mapping[str, Any]) -> None:
    """UserError where the run in `newest` was trained with other values of these {dotted key: value}."""
    saved = flatten(checkpoint.read_config(newest / "model.safetensors") or {})
    different = checkpoint.differing_keys({key: saved.get(key) for key in wanted}, wanted)
    if different:
        raise UserError(
            f"{newest}: was trained with other settings: {', '.join(different)}; repeat them to resume, or take another run.log_dir"
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inside = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return flat


def make_trainer(folder: RunFolder, options: Mapping[str, Any]) -> pl.Trainer:
    """A Trainer with these keywords of pl.Trainer, for `fit`. Raises UserError where they don't suit this machine."""
    options = _with_launcher(options)
    strategy = str(options.get("strategy", "auto"))
    if strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"):
        raise UserError(
            f"lightning.trainer.strategy '{strategy}': checkpoints are written from whole replicas; use ddp"
        )
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

    data: has `batch_size` (per process and pass), `source` and `stream(...)` as `latent_mt.data.PairData`. Raises UserError.
    """
    newest = newest_checkpoint(folder.folder)
    folder.data, module.run = data, folder.config
    if newest is not None:
        folder.resumed = checkpoint.read_state(newest / "training_state.pt")
        module.load_weights_of(newest)
        module.steps_done = checkpoint.checkpoint_step(newest)
    if trainer.is_global_zero:
        try:
            folder.folder.mkdir(parents=True, exist_ok=True)
            (folder.folder / "config.yaml").write_text(folder.config_yaml)
        except OSError as error:
            raise UserError(f"run.log_dir {folder.folder}: can't be written ({error.strerror}); name another") from None
        reached = f"resuming after step {module.steps_done}" if newest else "starting"
        print(f"# {len(data.source)} items, {reached}; {trainer.world_size} process(es)", flush=True)
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
    with _quiet():
        trainer.fit(module, train_dataloaders=_Stream(stream, folder))


def _with_launcher(options: Mapping[str, Any]) -> dict[str, Any]:
    """pl.Trainer's keywords, with the processes of mpiexec, which Lightning doesn't know, in the place of its own."""
    options = dict(options)
    launcher, rank, world_size, local_rank, local_size = distributed.detect(os.environ)
    if launcher == "mpi":
        distributed.rendezvous_over_mpi()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(local_size), "TORCHELASTIC_RUN_ID": "mpi"}
    if launcher in ("mpi", "torchrun") and world_size > 1:
        # What the launcher started is what there is, whatever the file says for plain python; a list still chooses the GPUs.
        if not isinstance(options.get("devices"), (list, tuple)):
            options["devices"] = local_size
        options["num_nodes"] = world_size // local_size
        options.setdefault("strategy", "ddp")
        options["plugins"] = [TorchElasticEnvironment()]
    return options


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
