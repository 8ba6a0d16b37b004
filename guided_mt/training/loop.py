"""What every training run does, whatever it trains: resume, draw, step, average. Reports, saves and stops are runs.policy's."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Batch, ImageSource, ImageStream
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import seed_dropout
from ..diffusion.resample import create_named_schedule_sampler
from ..errors import UserError
from ..networks.layers import FastLayout
from ..runs import checkpoint, resume
from ..runs.compiling import CUDA_GRAPHS, compiled
from ..runs.config import Config
from ..runs.distributed import Processes
from ..runs.loop_config import LoopConfig
from ..runs.policy import RunPolicy
from ..runs.skipped import SkippedSteps
from .adm_run import ADMRun, go_on, named_as_adms
from .averages import QUARTILES, Averages
from .ema import Ema
from .optim import Optimizer, learning_rate
from .record import Record

log = logging.getLogger("guided_mt")


class Loop:
    """One training run in `folder`, new or resumed from its newest checkpoint; subclasses say what is trained.

    build: config -> untrained network. names: the values that `losses` records, of which the first is minimised. scalars: more
    0-dim values, fed to `self.averages.add_scalars` in steps that measure them. dropout: the network's, 0 where it draws nothing.
    `timeless`: those of `names` whose mean by timestep says nothing. `preview_interval`: steps between pictures, 0 for none.
    `annealing_lag`: see `optim.learning_rate`.
    A subclass has to have `losses`, `start_from`, `fixed_settings` and `saved_settings`, and may have what stands after them.
    """

    timeless: Sequence[str] = ()
    preview_interval = 0
    sharded = False
    annealing_lag = 0

    def __init__(
        self,
        config: Config,
        processes: Processes,
        source: ImageSource,
        folder: Path,
        *,
        build: Callable[[Config], FastLayout],
        diffusion: GaussianDiffusion,
        names: Sequence[str],
        scalars: Sequence[str] = (),
        dropout: float = 0.0,
        compiling: str = "False",
    ):
        self.config, self.processes, self.source, self.folder = config, processes, source, folder
        self.device = processes.device
        self.global_batch, self.local_batch, self.microbatch = batch_sizes(config, processes.world_size)
        self.seed, self.dropout = config.seed, dropout

        torch.manual_seed(config.seed)  # the same initial weights on every process
        self.model: FastLayout = build(config).to(self.device)
        self.model.to_fast_layout()
        self.diffusion = diffusion
        self.schedule_sampler = create_named_schedule_sampler(
            config.schedule_sampler, diffusion.num_timesteps, self.interval_of()
        )
        self.schedule_sampler.to(self.device)
        self.optimizer = Optimizer(
            self.model.parameters(),
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            fp16=any(getattr(part, "precision", "") == "fp16" for part in self.model.modules()),  # head E has its own
            scale_growth=config.fp16_scale_growth,
            beside=self.parameters_beside(),
        )
        self.scalars = tuple(scalars)
        self.averages = Averages(names, diffusion.num_timesteps, processes, ("grad_norm", *self.scalars))
        self.step = self._restore()  # before the averaged weights, which start as copies of the weights
        resume.agree_on_step(folder, self.step, processes)
        self.cuda_graphs = compiling == CUDA_GRAPHS
        if self.cuda_graphs and self.microbatch < self.local_batch:
            raise UserError(
                f"--compile {compiling}: gradients of parts of a batch can't be summed; leave out --microbatch, or take "
                "--compile True"
            )
        self.network = self._wrap(compiling)

    # ------------------------------------------------------------ what a subclass trains

    def losses(self, batch: Batch, part: slice) -> tuple[Tensor, Record]:
        """(mean loss to minimise, 0-dim; record of the part's samples, with a value for each of `names`)."""
        raise NotImplementedError

    def start_from(self, path: str) -> Path | None:
        """Load `--resume_checkpoint` as the start of a new run; the weights file, or None where some entries are new."""
        raise NotImplementedError

    def fixed_settings(self) -> dict[str, Any]:
        """Settings that must not change within a run, beyond seed, batch and schedule sampler."""
        raise NotImplementedError

    def saved_settings(self, weights: Path) -> dict[str, Any]:
        """The configuration beside a weights file of this run. Raises UserError for keys that no such run has."""
        raise NotImplementedError

    def trained(self) -> nn.Module:
        """What each step calls, and `--compile` compiles, with `model` inside."""
        return self.model

    def parameters_beside(self) -> list[dict[str, Any]]:
        """What is trained with the model and is no part of it, as groups of `Optimizer`; in no average and no weights file."""
        return []

    def interval_of(self) -> Tensor | None:
        """The interval of each timestep, int64 [T], for a stratified schedule sampler; None: its own."""
        return None

    def learn(self, record: Record) -> None:
        """More to learn from the record of this process's samples, on all processes alike."""

    def measure(self) -> None:
        """Called after each step and before its report: what is measured now and then."""

    def preview(self) -> np.ndarray | None:
        """A picture uint8 [H, W, 3], drawn on the main process every `preview_interval` steps."""
        return None

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
        newest = resume.newest_checkpoint(self.folder)
        rates = [rate.strip() for rate in self.config.ema_rate.split(",") if rate.strip()]
        if newest is None:
            path = self.config.resume_checkpoint
            file = self.start_from(path) if path else None
            self.ema = Ema(self.model, rates, self.config.ema_device, self.config.ema_dtype)
            return self._go_on_with_adms(file) if file else 0
        self._refuse_other_settings(newest)
        checkpoint.load_weights(self.model, newest / "model.safetensors")
        self.ema = Ema(self.model, rates, self.config.ema_device, self.config.ema_dtype)
        for rate in rates:
            self.ema.load(rate, resume.read_average(newest, rate, "--ema_rate"))
        state = checkpoint.read_state(newest / "training_state.pt")
        with resume.fitting(newest):
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
            self.averages.load_state_dict(state["averages"])
            self.load_extra_state(state)
        return checkpoint.checkpoint_step(newest)

    def _go_on_with_adms(self, file: Path) -> int:
        """Where `--resume_checkpoint` is a file of ADM's own run: its averages, optimiser and step. Else step 0."""
        run = ADMRun.of(file)
        if run is None:
            if named_as_adms(file) and self.processes.is_main:
                log.info("no averages and no optimiser of guided-diffusion lie beside it: a new run begins, at step 0")
            return 0
        total = self.config.total_steps
        if total <= run.step:
            raise UserError(
                f"{file}: this run of guided-diffusion has done {run.step} steps, so --total_steps {total} leaves nothing to do; "
                "raise it, or copy the file under another name to begin a new run with its weights"
            )
        found = go_on(run, self.model, self.optimizer, self.ema)
        if self.processes.is_main:
            log.info("going on from %s", found)
        return run.step

    def _refuse_other_settings(self, newest: Path) -> None:
        """What the network, the process and the order of the data rest on must not change within a run."""
        fixed = self.fixed_settings()
        fixed |= {"seed": self.config.seed, "schedule_sampler": self.config.schedule_sampler}
        fixed |= {"global_batch_size": self.global_batch}
        resume.refuse_other_settings(
            newest,
            self.saved_settings(newest / "model.safetensors"),
            fixed,
            "take another --log_dir (with --resume_checkpoint to start from these weights)",
        )

    def _wrap(self, compiling: str) -> Any:
        """`trained` as `network`: compiled, and the compiled one in DistributedDataParallel; see `step.Step`."""
        network: Any = self.trained()
        if compiling != "False":
            self.diffusion.prepare(self.device)
            network = compiled(network, compiling)
        if self.processes.world_size > 1:
            if getattr(self.config, "use_checkpoint", False):
                # Where activations are recomputed, Dynamo can't cut a graph at DDP's buckets.
                torch._dynamo.config.optimize_ddp = False
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
        """Train to `total_steps`, saving, reporting and drawing at their intervals; SIGTERM saves and returns.

        Raises Interrupted where Ctrl-C ended it, likewise saved.
        """
        self.model.train()
        with self.policy() as policy, self.stream() as stream:
            for batch in stream:
                self.run_step(batch.to(self.device))
                self.measure()
                if policy.after_step(self.step):
                    break
        policy.raise_if_interrupted()

    def policy(self) -> RunPolicy:
        """What decides after each step; see runs.policy."""
        return RunPolicy(
            self,
            self.config[LoopConfig],
            self.processes,
            self.folder,
            step=self.step,
            columns=self._columns(),
            images_per_step=self.global_batch,
            config_yaml=self.resolved_yaml(),
            classes=self.source.class_names if self.source.labels is not None else None,
            preview_interval=self.preview_interval,
            advice="lower --lr, or use --precision fp32",
        )

    def run_step(self, batch: Batch) -> None:
        """One optimiser step on this process's part of the global batch."""
        record = self.forward_backward(batch)
        norm = self.optimizer.step(self._rate(self.step))
        self.ema.update(step=self.step)
        self.track(record, norm)
        self.step += 1

    def forward_backward(self, batch: Batch) -> Record:
        """Gradients of the global mean loss; returns the record of this process's samples."""
        records = []
        self.seed_dropout()
        if self.cuda_graphs:  # what the last step's graphs returned is used up
            torch.compiler.cudagraph_mark_step_begin()
        count = len(batch.images)
        for start in range(0, count, self.microbatch):
            part = slice(start, min(start + self.microbatch, count))
            last = part.stop == count
            later = contextlib.nullcontext if last or self.processes.world_size == 1 else self.network.no_sync
            with later():
                loss, record = self.losses(batch, part)
                self.optimizer.scale(loss * ((part.stop - start) / count)).backward()
            records.append(record)
        return Record.joined(records)

    def seed_dropout(self) -> None:
        """Seed dropout for the coming step, the one kind of randomness that belongs to a process; nothing without dropout."""
        if self.dropout > 0:
            seed_dropout(self.seed, self.step, self.processes.rank)

    @torch.no_grad()
    def track(self, record: Record, norm: Tensor) -> None:
        """Feed the samples' values to the schedule sampler, the subclass and the averages.

        What training rests on is the same on all processes; the averages come together when they are read.
        """
        if self.schedule_sampler.learns:
            self.schedule_sampler.update(*record.gathered(self.averages.names[0], self.processes))
        self.learn(record)
        self.averages.add(record)
        self.averages.add_scalars({"grad_norm": norm})

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, config.lr, config.lr_warmup_steps, config.lr_anneal_steps, lag=self.annealing_lag)

    # ------------------------------------------------------------ what the policy asks (see runs.policy.Trained)

    @property
    def skipped(self) -> SkippedSteps:
        """The steps whose gradients were not finite, which changed nothing."""
        return self.optimizer.skipped

    def _columns(self) -> list[str]:
        names = self.averages.names
        quartiles = [f"{name}_q{q}" for name in names if name not in self.timeless for q in range(QUARTILES)]
        fp16 = ["log2_loss_scale"] if self.optimizer.fp16 else []
        measured = ["grad_norm", "lr", "skipped_steps", *fp16, *self.scalars, "images_per_second"]
        return ["step", "samples", *names, *measured, *quartiles, *self.extra_columns()]

    def report_row(self) -> dict[str, float]:
        """A row of progress.csv {column: value} of the steps since the last one; what was not seen in them is left out."""
        values = self.averages.pop()
        unseen = [name for name in self.scalars if math.isnan(values[name])]
        row = {name: value for name, value in values.items() if name not in unseen}
        row["lr"] = self._rate(self.step - 1)
        if self.optimizer.fp16:
            row["log2_loss_scale"] = float(self.optimizer.log2_scale)
        return {**row, **self.extra_row()}

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """State dicts by the name of their file: `model`, and `ema_RATE` for each average."""
        averages = {f"ema_{rate}": self.ema.state_dict(rate, self.model) for rate in self.ema.averages}
        return {"model": self.model.state_dict(), **averages}

    def training_state(self) -> dict[str, Any]:
        """What a resumed run has to find again beyond the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "averages": self.averages.state_dict(),
            **self.extra_state(),
        }

    def resolved_yaml(self) -> str:
        """The configuration as saved: with the global batch that the run really has, whatever the number of processes."""
        resolved = Config(
            [_with_batch(section, self.global_batch) for section in self.config.sections()], self.config.typed
        )
        return resolved.to_yaml()


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
