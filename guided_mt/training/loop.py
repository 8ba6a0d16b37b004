"""What every training run does, whatever it trains: resume, draw, step, average, report, save, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch, ImageSource, ImageStream
from ..data.images import from_uint8
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams, seed_dropout
from ..diffusion.resample import create_named_schedule_sampler
from ..errors import UserError
from ..runs import checkpoint
from ..runs.config import Config
from ..runs.distributed import Processes
from .metrics import QUARTILES, Averages, Reporter
from .optim import Ema, Optimizer, learning_rate

MAX_SKIPPED_IN_ROW = 10
SIGNAL_INTERVAL = 10  # steps between GPU processes' agreeing on a SIGTERM
log = logging.getLogger("guided_mt")


class Loop:
    """One training run in `run`, new or resumed from its newest checkpoint; subclasses say what is trained.

    build: config -> untrained network. names: the values that `losses` records, of which the first is minimised. scalars: more
    0-dim values, fed to `self.averages.add_scalars` in steps that measure them. dropout: the network's, 0 where it draws nothing.
    `timeless`: those of `names` whose mean by timestep says nothing.
    A subclass has to have `losses`, `start_from`, `fixed_settings` and `saved_settings`, and may have what stands after them.
    """

    timeless: Sequence[str] = ()

    def __init__(
        self,
        config: Config,
        processes: Processes,
        source: ImageSource | None,
        run: Path,
        *,
        build: Callable[[Config], nn.Module],
        diffusion: GaussianDiffusion,
        names: Sequence[str],
        scalars: Sequence[str] = (),
        dropout: float = 0.0,
        compiled: bool = False,
    ):
        self.config, self.processes, self.source, self.run = config, processes, source, run
        self.device = processes.device
        self.global_batch, self.local_batch, self.microbatch = batch_sizes(config, processes.world_size)
        self.seed, self.dropout = config.seed, dropout

        torch.manual_seed(config.seed)  # the same initial weights on every process
        self.model = build(config).to(self.device)
        self.model.to_fast_layout()
        self.diffusion = diffusion
        self.schedule_sampler = create_named_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps)
        self.schedule_sampler.to(self.device)
        self.optimizer = Optimizer(
            self.model.parameters(),
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            fp16=any(getattr(part, "precision", "") == "fp16" for part in self.model.modules()),  # head E has its own
            scale_growth=config.fp16_scale_growth,
        )
        self.scalars = tuple(scalars)
        self.averages = Averages(names, diffusion.num_timesteps, self.device, ("grad_norm", *self.scalars))
        self.step = self._restore()  # before the averaged weights, which start as copies of the weights
        reached = self.processes.all_gather(torch.tensor([self.step], device=self.device)).tolist()
        if len(set(reached)) > 1:
            raise UserError(
                f"{run}: the processes see different checkpoints (steps {reached}); is the folder shared by all?"
            )
        self.network = self._wrap(compiled)
        self.stop_requested = False

    # ------------------------------------------------------------ what a subclass trains

    def losses(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        """(mean loss to minimise, 0-dim; record [part, 1 + 2 K]: timestep, the K named values, and 1 where each counts, else 0)."""
        raise NotImplementedError

    def start_from(self, path: str) -> None:
        """Load `--resume_checkpoint` as the start of a new run."""
        raise NotImplementedError

    def fixed_settings(self) -> dict[str, Any]:
        """Settings that must not change within a run, beyond seed, batch and schedule sampler."""
        raise NotImplementedError

    def saved_settings(self, weights: Path) -> dict[str, Any]:
        """The configuration beside a weights file of this run. Raises UserError for keys that no such run has."""
        raise NotImplementedError

    def learn(self, t: Tensor, values: Tensor, kept: Tensor) -> None:
        """More to learn from the records of all processes: t [B]; values, kept [B, K]."""

    def measure(self) -> None:
        """Called after each step and before its report: what is measured now and then."""

    def preview(self) -> None:
        """Called every `sample_interval` steps, where the configuration has one."""

    def extra_state(self) -> dict[str, Any]:
        """More entries of training_state.pt."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `extra_state`: all of training_state.pt. A KeyError says that it is not this run's."""

    def extra_columns(self) -> list[str]:
        """More columns of progress.csv, filled by `extra_row`."""
        return []

    def extra_row(self) -> dict[str, float]:
        """Called at each report; a column without a value is an empty cell."""
        return {}

    # ------------------------------------------------------------ set-up

    def _restore(self) -> int:
        """Load the newest checkpoint of this run, or `--resume_checkpoint` as a start; returns the step reached."""
        found = checkpoint.checkpoints(self.run)
        rates = [rate.strip() for rate in self.config.ema_rate.split(",") if rate.strip()]
        if not found:
            if self.config.resume_checkpoint:
                self.start_from(self.config.resume_checkpoint)
            self.ema = Ema(self.model, rates)
            return 0
        newest = found[-1]
        self._refuse_other_settings(newest)
        checkpoint.load_weights(self.model, newest / "model.safetensors")
        self.ema = Ema(self.model, rates)
        for rate in rates:
            file = newest / f"ema_{rate}.safetensors"
            if not file.exists():
                raise UserError(f"{newest}: has no averaged weights for --ema_rate {rate}; keep the run's ema_rate")
            self.ema.load(rate, checkpoint.read_weights(file))
        state = checkpoint.read_state(newest / "training_state.pt")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
            self.averages.load_state_dict(state["averages"])
            self.load_extra_state(state)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{newest / 'training_state.pt'}: does not fit this run ({str(error).splitlines()[0]})"
            ) from None
        return checkpoint.checkpoint_step(newest)

    def _refuse_other_settings(self, newest: Path) -> None:
        """What the network, the process and the order of the data rest on must not change within a run."""
        fixed = self.fixed_settings()
        fixed |= {"seed": self.config.seed, "schedule_sampler": self.config.schedule_sampler}
        fixed |= {"global_batch_size": self.global_batch}
        different = checkpoint.differing_keys(self.saved_settings(newest / "model.safetensors"), fixed)
        if different:
            raise UserError(
                f"{newest}: was trained with other settings: {', '.join(different)}; repeat them to resume, "
                "or take another --log_dir (with --resume_checkpoint to start from these weights)"
            )

    def _wrap(self, compiled: bool):
        network = self.model
        if compiled:
            network = torch.compile(network)
        if self.processes.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # torch 2.15 warns that broadcast_buffers gets another name; this one works in every version we support.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                network = DistributedDataParallel(
                    network, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        return network

    # ------------------------------------------------------------ the loop

    def stream(self) -> ImageStream:
        """The batches of the steps that are left, for this process."""
        return ImageStream(
            self.source,
            self.config.image_size,
            seed=self.seed,
            global_batch=self.global_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            start_step=self.step,
            total_steps=self.config.total_steps,
            random_crop=self.config.random_crop,
            num_workers=self.config.data_workers,
        )

    def run_loop(self) -> None:
        """Train to `total_steps`, saving, reporting and drawing at their intervals; SIGTERM saves and returns."""
        config, columns, stream = self.config, self._columns(), self.stream()
        sample_interval = config.as_dict().get("sample_interval", 0)
        self.reporter = Reporter(self.run, columns, config.total_steps, self.step) if self.processes.is_main else None
        self.model.train()
        self.clock, self.clock_step = time.monotonic(), self.step
        save_due = False
        previous_handler = signal.signal(signal.SIGTERM, self._request_stop)
        try:
            with stream:
                for batch in stream:
                    self.run_step(batch.to(self.device))
                    self.measure()
                    last = self.step == config.total_steps
                    if self.step % config.log_interval == 0 or last:
                        self.report()
                    if self.step % MAX_SKIPPED_IN_ROW == 0 or last:
                        self.refuse_divergence()
                    if sample_interval and self.step % sample_interval == 0:
                        self.preview()
                    stop = self._agreed_stop()
                    save_due = save_due or self.step % config.save_interval == 0
                    # After a skipped step a save waits for a good one: a diverged run must not push out its good checkpoints.
                    if last or stop or (save_due and not self.optimizer.skipped_in_row.item()):
                        self.save()
                        save_due = False
                    if stop:
                        if self.processes.is_main:
                            log.info("SIGTERM: saved step %d; run the same command to go on", self.step)
                        break
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
            if self.reporter:
                self.reporter.close()

    def run_step(self, batch: Batch) -> None:
        """One optimiser step on this process's part of the global batch."""
        gathered = self.forward_backward(batch)
        norm = self.optimizer.step(self._rate(self.step))
        self.ema.update()
        self.track(gathered, norm)
        self.step += 1

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of the global mean loss; returns what `track` needs, [local batch, 1 + 2 K] (see `losses`)."""
        records = []
        self.seed_dropout()
        count = len(batch.images)
        for start in range(0, count, self.microbatch):
            part = slice(start, min(start + self.microbatch, count))
            last = part.stop == count
            later = contextlib.nullcontext if last or self.processes.world_size == 1 else self.network.no_sync
            with later():
                loss, record = self.losses(batch, part)
                self.optimizer.scale(loss * ((part.stop - start) / count)).backward()
            records.append(record)
        return torch.cat(records)

    def seed_dropout(self) -> None:
        if self.dropout > 0:
            seed_dropout(self.seed, self.step, self.processes.rank)

    def draw(self, batch: Batch, part: slice) -> tuple[SampleStreams, Tensor, Tensor, Tensor]:
        """A part of the batch as trained on: the samples' random numbers, x_start [b, 3, H, W], mirrored by halves where asked for,
        timesteps [b] and their importance weights [b]. The same at every call."""
        streams = SampleStreams(self.seed, batch.positions[part], device=self.device)
        x_start = from_uint8(batch.images[part])
        flip = streams.uniform() < 0.5
        if self.config.random_flip:
            x_start = torch.where(flip.view(-1, 1, 1, 1), x_start.flip(-1), x_start)
        return streams, x_start, *self.schedule_sampler(streams.uniform())

    @torch.no_grad()
    def track(self, record: Tensor, norm: Tensor) -> None:
        """Feed every process's values to the schedule sampler, the subclass and the averages: the same on all."""
        record = self.processes.all_gather(record)
        t, values, kept = record[:, 0].long(), *record[:, 1:].chunk(2, dim=1)
        self.schedule_sampler.update(t, values[:, 0])
        self.learn(t, values, kept)
        self.averages.add(t, values, kept)
        self.averages.add_scalars({"grad_norm": norm})

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.config.lr, self.config.lr_warmup_steps, self.config.lr_anneal_steps)

    # ------------------------------------------------------------ now and then

    def _columns(self) -> list[str]:
        names = self.averages.names
        quartiles = [f"{name}_q{q}" for name in names if name not in self.timeless for q in range(QUARTILES)]
        fp16 = ["log2_loss_scale"] if self.optimizer.fp16 else []
        measured = ["grad_norm", "lr", "skipped_steps", *fp16, *self.scalars, "images_per_second"]
        return ["step", "samples", *names, *measured, *quartiles, *self.extra_columns()]

    def report(self) -> None:
        """Log the interval since the last report."""
        steps = self.step - self.clock_step
        seconds = max(time.monotonic() - self.clock, 1e-9)
        values = self.averages.pop()
        extra = self.extra_row()
        self.clock, self.clock_step = time.monotonic(), self.step
        if self.reporter:
            unseen = [name for name in self.scalars if math.isnan(values[name])]
            row = {"step": self.step, "samples": self.step * self.global_batch, **values}
            row |= {"lr": self._rate(self.step - 1), "skipped_steps": int(self.optimizer.skipped)}
            row |= {"images_per_second": steps * self.global_batch / seconds}
            if self.optimizer.fp16:
                row["log2_loss_scale"] = float(self.optimizer.log2_scale)
            shown = [name for name in self.reporter.columns if name not in unseen]
            row |= extra
            self.reporter.row({name: row[name] for name in shown if name in row})

    def refuse_divergence(self) -> None:
        """Stop a run that has stopped learning."""
        refuse_divergence(self.step, self.optimizer.longest_row, "lower --lr, or use --precision fp32")

    def save(self) -> None:
        """Write a checkpoint on the main process. The others wait, and stop with it when it can't be written."""
        failure = None
        if self.processes.is_main:
            weights = {f"ema_{rate}": self.ema.state_dict(rate, self.model) for rate in self.ema.averages}
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                "averages": self.averages.state_dict(),
                **self.extra_state(),
            }
            try:
                checkpoint.save_checkpoint(
                    self.run,
                    self.step,
                    config_yaml=self.resolved_yaml(),
                    weights={"model": self.model.state_dict(), **weights},
                    training_state=state,
                    classes=self.source.class_names if self.source.labels is not None else None,
                    keep=self.config.keep_checkpoints,
                )
            except UserError as error:
                failure = error
        if self.processes.any(failure is not None):
            raise failure or UserError("the main process could not write the checkpoint")

    def resolved_yaml(self) -> str:
        """The configuration as saved: with the global batch that the run really has, whatever the number of processes."""
        resolved = Config(
            [_with_batch(section, self.global_batch) for section in self.config.sections()], self.config.given
        )
        return resolved.to_yaml()

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _agreed_stop(self) -> bool:
        if self.processes.world_size == 1:
            return self.stop_requested
        often = self.device.type == "cpu"  # on a GPU asking would wait for it
        return (often or self.step % SIGNAL_INTERVAL == 0) and self.processes.any(self.stop_requested)


def refuse_divergence(step: int, in_row: Tensor, advice: str) -> None:
    """UserError where `in_row`, 0-dim, counts too many steps in a row whose gradient was not finite."""
    if (longest := int(in_row)) >= MAX_SKIPPED_IN_ROW:
        raise UserError(
            f"step {step}: the loss or its gradient was not finite {longest} steps in a row, so training stopped; these steps "
            f"changed nothing and the checkpoints are from before: {advice}"
        )


def _with_batch(section: Any, global_batch: int) -> Any:
    return (
        dataclasses.replace(section, global_batch_size=global_batch)
        if hasattr(section, "global_batch_size")
        else section
    )


def batch_sizes(config: Config, world_size: int) -> tuple[int, int, int]:
    """(images per step in all, per process and step, per forward pass). Raises UserError where they don't divide."""
    total, per_process = config.global_batch_size, config.batch_size
    if total < 0:
        total = (per_process if per_process > 0 else 1) * world_size
    if total < 1 or total % world_size:
        raise UserError(
            f"--global_batch_size {total} does not divide by {world_size} processes; "
            f"take {max(1, round(total / world_size)) * world_size}"
        )
    local = total // world_size
    micro = config.microbatch if config.microbatch > 0 else per_process if per_process > 0 else local
    return total, local, min(micro, local)
