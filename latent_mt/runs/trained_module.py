"""What every training under Lightning has, whatever is trained: rates, averages, counts, and what the run's policy asks for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from guided_mt.diffusion.random import seed_dropout
from guided_mt.runs import resume
from guided_mt.runs.distributed import Processes
from guided_mt.runs.processes.shards import gathered, is_shard
from guided_mt.runs.skipped import SkippedSteps
from guided_mt.training.ema import Ema
from guided_mt.training.optim import learning_rate, load_optimizer

from .run_config import RunConfig

logger = logging.getLogger("latent_mt")


class TrainedModule(pl.LightningModule):
    """What `run.fit` trains; a runs.policy.Trained of guided_mt. Subclasses say what is trained.

    averaged: the part of it whose weights are averaged; prefix: how that part's entries begin in the checkpoint's files. shardable:
    whether it has `shard`.
    """

    prefix = ""
    shardable = False

    def __init__(self) -> None:
        super().__init__()
        self.run, self.processes = RunConfig(), Processes()  # set by `fit`
        self.base_rate, self.steps_done = 0.0, 0  # optimiser steps of the run so far
        self.schedule: Callable[[int], float] | None = None  # factor of the rate at a step
        self.data: Any = None
        self.random_flip = False
        self.ema: Any = None  # an Ema, from `prepare` on
        self.skipped = SkippedSteps()

    @property
    def averaged(self) -> nn.Module:
        """The module whose weights are averaged."""
        raise NotImplementedError

    @property
    def ema_rates(self) -> list[str]:
        """Rates of the averages as text; none where the run keeps no averages."""
        return [self.run.ema_rate] if self.run.ema_rate else []

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the weights alone."""
        return is_shard(next(self.averaged.parameters()))

    def shard(self, device_type: str) -> None:
        """Spread the weights that are trained over the processes. Called once they are on their device, before `prepare`."""
        raise NotImplementedError

    def rate(self, step: int) -> float:
        """The learning rate of 0-based `step`."""
        factor = 1.0 if self.schedule is None else self.schedule(step)
        return factor * learning_rate(step, self.base_rate, self.run.lr_warmup_steps, 0)

    def seed_dropout(self) -> None:
        """Seed dropout for the coming step, the one kind of randomness that belongs to a process."""
        seed_dropout(self.run.seed, self.steps_done, self.processes.rank)

    def count(self, bad: Tensor) -> None:
        """bad: 0-dim, 1 where this step's gradient was not finite, else 0. Called before the scaler of 16-mixed moves on."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # A 1 scaled is the loss's scale, on the device; `get_scale` would wait for it.
        self.skipped.count(bad, None if scaler is None else scaler.scale(torch.ones_like(bad)))

    def prepare(self, data: Any, resumed: bool) -> None:
        """Called once on the training device before the first step, after a resumed run's weights were loaded."""
        self.data, self.random_flip = data, data.random_flip
        self.skipped = SkippedSteps(self.device)
        if self.ema is None:
            self.ema = Ema(self.averaged, self.ema_rates, self.run.ema_device, self.run.ema_dtype)
        else:
            self.ema.follow()

    def after_step(self) -> None:
        """Called after each optimiser step."""
        self.ema.update(self.steps_done if self.run.ema_warmup else None, self.steps_done)

    @contextlib.contextmanager
    def with_averages(self) -> Iterator[None]:
        """Inside, `averaged` has its slowest averaged weights (where there are any) and is in eval mode."""
        with self.ema.slowest_in(self.averaged):
            yield

    def load_averages(self, folder: Path) -> None:
        """The averages of a checkpoint. Raises UserError where it has none of this rate."""
        self.ema = Ema(self.averaged, self.ema_rates, self.run.ema_device, self.run.ema_dtype)
        for rate in self.ema_rates:
            state = resume.read_average(folder, rate, "run.ema_rate")
            own = {k.removeprefix(self.prefix): v for k, v in state.items() if k.startswith(self.prefix)}
            self.ema.load(rate, own)

    def training_state(self) -> dict[str, Any]:
        """training_state.pt but for the step."""
        fingerprint = getattr(self.data, "fingerprint", "")
        return {
            **({"data": fingerprint} if fingerprint else {}),
            "optimizers": [gathered(optimizer.state_dict()) for optimizer in self.trainer.optimizers],
            "precision": self.trainer.precision_plugin.state_dict(),
            "run": {**self.run_state(), "skipped": self.skipped.total},
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `training_state`, called on the training device."""
        if state.get("data", "") not in ("", getattr(self.data, "fingerprint", "")) and self.processes.rank == 0:
            logger.warning(
                "%s: the data, their filters or their order are others than at step %d: from here on the order is a new one, "
                "so that samples of the epoch under way may come twice, or not at all",
                *(self.data.source.path, self.steps_done),
            )
        for optimizer, saved in zip(self.trainer.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        self.trainer.precision_plugin.load_state_dict(state["precision"])
        self.skipped.load_total(state["run"]["skipped"])
        self.load_run_state(state["run"])

    # ------------------------------------------------------------ what a subclass says

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """{file stem: state dict}: `model`, and `ema_RATE` where there are averages."""
        raise NotImplementedError

    def load_weights_of(self, folder: Path) -> None:
        """The counterpart of `weights`."""
        raise NotImplementedError

    def run_state(self) -> dict[str, Any]:
        """What a resumed run has to find again beyond weights, optimisers and the count of skipped steps."""
        raise NotImplementedError

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `run_state`."""
        raise NotImplementedError

    def columns(self) -> list[str]:
        """The columns of progress.csv that `report_row` fills, with `skipped_steps` in its place among them."""
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
