"""What happens after each step of a run, whatever is trained and whoever drives the loop: log, look, picture, save, stop.

with RunPolicy(trained, config, ...) as policy:
    for batch in batches:
        ...  # one optimiser step
        if policy.after_step(step):
            break
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.images import save_png
from ..errors import Interrupted, UserError
from .distributed import Processes
from .loop_config import LoopConfig
from .processes.signals import Request, Requests
from .reporter import Reporter
from .skipped import MAX_SKIPPED_IN_ROW, SkippedSteps
from .writer import CheckpointWriter

SIGNAL_INTERVAL = 10  # steps between GPU processes' agreeing on what signals asked of one of them
NO_FIGURES: Mapping[str, float] = {}
_WORDS = {Request.SAVE: "SIGUSR1", Request.STOP: "SIGTERM", Request.INTERRUPT: "Ctrl-C"}
log = logging.getLogger("guided_mt")


class Trained(Protocol):
    """What a policy asks of what is trained.

    `report_row` and `training_state` are called on all processes, and what the main one answers is used; `preview` and `weights`
    on the main one alone, unless the weights are `sharded`.
    """

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over the processes, so that whatever uses them is done by all together."""

    @property
    def skipped(self) -> SkippedSteps:
        """The steps whose gradient was not finite."""

    def report_row(self) -> Mapping[str, float]:
        """{column: value} since the last report; a column without a value is an empty cell. May wait for the device."""

    def preview(self) -> np.ndarray | None:
        """A picture uint8 [H, W, 3] of how far the model is, where there is one."""

    def weights(self) -> Mapping[str, Mapping[str, Tensor]]:
        """{file stem: state dict} of a checkpoint: `model`, and `ema_RATE` per averaged copy."""

    def training_state(self) -> Mapping[str, Any]:
        """What a resumed run has to find again beyond weights and step: the rest of training_state.pt."""


class RunPolicy:
    """Decides after each step what is due, and does it; a context in which SIGTERM and Ctrl-C ask the run to save and end, and
    SIGUSR1 asks it to save and go on.

    step: how many steps the run has done. columns: those of progress.csv; the policy itself knows `step`, `samples`,
    `skipped_steps` and `images_per_second`. images_per_step: over all processes. classes: names of the data's classes by id.
    preview_interval: steps between pictures, 0 for none. advice: what the user can do against divergence.
    """

    def __init__(
        self,
        trained: Trained,
        config: LoopConfig,
        processes: Processes,
        folder: Path,
        *,
        step: int,
        columns: Sequence[str],
        images_per_step: int,
        config_yaml: str,
        classes: Sequence[str] | None = None,
        preview_interval: int = 0,
        advice: str,
    ):
        self.trained, self.config, self.processes, self.folder = trained, config, processes, folder
        self.step, self.columns, self.images_per_step = step, list(columns), images_per_step
        self.config_yaml, self.classes = config_yaml, classes
        self.preview_interval, self.advice = preview_interval, advice
        self.save_due = False
        self.requests, self.ended_by = Requests(processes.is_main), Request.NOTHING
        self.reporter: Reporter | None = None
        self.writer = CheckpointWriter()

    def __enter__(self) -> RunPolicy:
        if self.processes.is_main:
            self.reporter = Reporter(self.folder, self.columns, self.config.total_steps, self.step)
        self.clock, self.clock_step = time.monotonic(), self.step
        self.requests.__enter__()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            failure = self.writer.close()
        finally:
            self.requests.__exit__()
            if self.reporter:
                self.reporter.close()
        if failure is not None and error is None:
            raise failure
        if failure is not None:
            log.error("%s", failure)  # beside why the run ends

    def raise_if_interrupted(self) -> None:
        """For after the run: Interrupted where Ctrl-C ended it. All is said and saved by then.

        The main process alone ends by it: launchers take the others down with one that fails. Under torchrun it doesn't either,
        which would start all of them anew.
        """
        by_torchrun = self.processes.launcher == "torchrun" and self.processes.world_size > 1
        if self.ended_by is Request.INTERRUPT and self.processes.is_main and not by_torchrun:
            raise Interrupted

    def after_step(self, step: int, figures: Mapping[str, float] = NO_FIGURES) -> bool:
        """Do what is due after `step` steps; returns whether the run is to end here, on every process alike.

        figures: {column: value} measured after this step on all processes; where there are some, the step is reported.
        Raises UserError for a run that diverges, and, at the next look, for a checkpoint that can't be written.
        """
        self.step, last = step, step == self.config.total_steps
        if figures or last or step % self.config.log_interval == 0:
            self._report(figures)
        if last or step % MAX_SKIPPED_IN_ROW == 0:
            self.trained.skipped.refuse_divergence(step, self.advice)
        if self.preview_interval and step % self.preview_interval == 0:
            self._preview()
        asked = self._agreed_request()
        stop = asked >= Request.STOP
        self.save_due = self.save_due or asked is Request.SAVE or step % self.config.save_interval == 0
        # After a skipped step a save waits for a good one: a diverged run must not push out its good checkpoints.
        if last or stop or (self.save_due and not self.trained.skipped.in_row.item()):
            self._save(whole=last or asked is not Request.NOTHING)
            self.save_due = False
            if asked and self.processes.is_main:
                log.info(
                    "%s: saved step %d; %s",
                    _WORDS[asked],
                    step,
                    "run the same command to go on" if stop else "going on",
                )
        if stop:
            self.ended_by = asked
        return stop

    def _report(self, figures: Mapping[str, float]) -> None:
        """A row for the interval since the last report."""
        steps, seconds = self.step - self.clock_step, max(time.monotonic() - self.clock, 1e-9)
        values = {**self.trained.report_row(), **figures}
        self.clock, self.clock_step = time.monotonic(), self.step
        if self.reporter:
            values |= {"step": self.step, "samples": self.step * self.images_per_step}
            values |= {"skipped_steps": int(self.trained.skipped.total)}
            values |= {"images_per_second": steps * self.images_per_step / seconds}
            self.reporter.row({name: values[name] for name in self.columns if name in values})
        self._look(wait=False)

    def _preview(self) -> None:
        if self.reporter or self.trained.sharded:
            try:
                picture = self.trained.preview()
            except UserError as error:  # what can't be shown now is no reason to end the run
                log.warning("no picture after step %d: %s", self.step, error)
                picture = None
            if picture is not None and self.reporter:
                save_png(picture, self.folder / "grids" / f"step_{self.step:08d}.png")
                self.reporter.image("preview", torch.from_numpy(picture).permute(2, 0, 1), self.step)
        self.processes.barrier()

    def _agreed_request(self) -> Request:
        """What signals asked of any process since it was last looked."""
        often = (
            self.processes.world_size == 1 or self.processes.device.type == "cpu"
        )  # on a GPU asking would wait for it
        if not often and self.step % SIGNAL_INTERVAL:
            return Request.NOTHING
        return Request(self.processes.largest(self.requests.take()))

    def _save(self, whole: bool) -> None:
        """Begin to write a checkpoint on the main process, once the one before is written. whole: wait until this one is, too."""
        self._look(wait=True)
        state = {"step": self.step, **self.trained.training_state()}
        weights = self.trained.weights() if self.processes.is_main or self.trained.sharded else {}
        if self.processes.is_main:
            self.writer.begin(
                self.folder,
                self.step,
                config_yaml=self.config_yaml,
                weights=weights,
                training_state=state,
                classes=self.classes,
                keep=self.config.keep_checkpoints,
            )
        if whole:
            self._look(wait=True)

    def _look(self, wait: bool) -> None:
        """Stop all processes where the main one could not write the last checkpoint; wait: until it is written."""
        self.processes.agree(self.writer.failure(wait))
