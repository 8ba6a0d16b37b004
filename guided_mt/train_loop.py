"""Training: one step is draw, forward and backward, optimise, average, report. Everything random belongs to a sample."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .config import Config, SampleConfig, TrainConfig
from .data import Batch, ImageSource, ImageStream, load_images
from .distributed import Processes
from .errors import UserError
from .generate import Generator
from .images import from_uint8, make_grid, save_png, to_nhwc
from .metrics import QUARTILES, Averages, Reporter
from .objective import multi_task_losses
from .optim import Ema, Optimizer, learning_rate
from .random import SampleStreams
from .resample import create_named_schedule_sampler
from .tasks import build_diffusion, build_modalities, build_model, model_sections, saved_config

MAX_SKIPPED_IN_ROW = 10
SIGNAL_INTERVAL = 10  # steps between GPU processes' agreeing on a SIGTERM
PREVIEW_COUNT = 16
log = logging.getLogger("guided_mt")


class TrainLoop:
    """One training run in `run`, new or resumed from its newest checkpoint."""

    def __init__(self, config: Config, processes: Processes, source: ImageSource | None, run: Path):
        self.config, self.processes, self.source, self.run = config, processes, source, run
        self.device = processes.device
        self.global_batch, self.local_batch, self.microbatch = batch_sizes(config, processes.world_size)
        self.seed = config.seed

        torch.manual_seed(config.seed)  # the same initial weights on every process
        self.model = build_model(config).to(self.device)
        self.model.to_fast_layout()
        self.modalities = build_modalities(config)
        self.diffusion = build_diffusion(config)
        self.schedule_sampler = create_named_schedule_sampler(config.schedule_sampler, self.diffusion.num_timesteps)
        self.schedule_sampler.to(self.device)
        self.optimizer = Optimizer(
            self.model.parameters(),
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
            fp16=self.model.precision == "fp16",
            scale_growth=config.fp16_scale_growth,
        )
        terms = ["mse", *(["vb"] if config.learn_sigma else [])] if not config.use_kl else []
        self.terms = [*terms, *self.modalities]
        self.averages = Averages(["loss", *self.terms], self.diffusion.num_timesteps, self.device)
        self.step = self._restore()  # before the averaged weights, which start as copies of the weights
        reached = self.processes.all_gather(torch.tensor([self.step], device=self.device)).tolist()
        if len(set(reached)) > 1:
            raise UserError(
                f"{run}: the processes see different checkpoints (steps {reached}); is the folder shared by all?"
            )
        self.network = self._wrap()
        self.stop_requested = False

    # ------------------------------------------------------------ set-up

    def _restore(self) -> int:
        """Load the newest checkpoint of this run, or `--resume_checkpoint` as a start; returns the step reached."""
        found = checkpoint.checkpoints(self.run)
        rates = [rate.strip() for rate in self.config.ema_rate.split(",") if rate.strip()]
        if not found:
            if self.config.resume_checkpoint:
                file = checkpoint.find_weights(self.config.resume_checkpoint, "none")
                new = checkpoint.load_weights(self.model, file, allow_new=True, settings=self.config.as_dict())
                if self.processes.is_main:
                    log.info(
                        "started from %s; %s", file, f"new: {len(new)} entries" if new else "every entry was found"
                    )
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
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{newest / 'training_state.pt'}: does not fit this run ({str(error).splitlines()[0]})"
            ) from None
        return checkpoint.checkpoint_step(newest)

    def _refuse_other_settings(self, newest: Path) -> None:
        """What the network, the process and the order of the data rest on must not change within a run."""
        saved = saved_config(newest / "model.safetensors")
        free = ("compile", "timestep_respacing", "use_checkpoint", "precision", "use_fp16")
        fixed = {k: v for k, v in self.config.as_dict(*model_sections()).items() if k not in free}
        fixed |= {"seed": self.config.seed, "schedule_sampler": self.config.schedule_sampler}
        fixed |= {"global_batch_size": self.global_batch}
        different = checkpoint.differing_keys(saved, fixed)
        if different:
            raise UserError(
                f"{newest}: was trained with other settings: {', '.join(different)}; repeat them to resume, "
                "or take another --log_dir (with --resume_checkpoint to start from these weights)"
            )

    def _wrap(self):
        network = self.model
        if self.config.compile:
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

    def run_loop(self) -> None:
        """Train to `total_steps`, saving, reporting and drawing at their intervals; SIGTERM saves and returns."""
        config, columns = self.config, self._columns()
        stream = ImageStream(
            self.source,
            config.image_size,
            seed=self.seed,
            global_batch=self.global_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            start_step=self.step,
            total_steps=config.total_steps,
            random_crop=config.random_crop,
            num_workers=config.data_workers,
        )
        self.reporter = Reporter(self.run, columns, config.total_steps, self.step) if self.processes.is_main else None
        self.model.train()
        self.clock, self.clock_step = time.monotonic(), self.step
        save_due = False
        previous_handler = signal.signal(signal.SIGTERM, self._request_stop)
        try:
            with stream:
                for batch in stream:
                    self.run_step(batch.to(self.device))
                    last = self.step == config.total_steps
                    if self.step % config.log_interval == 0 or last:
                        self.report()
                    if self.step % MAX_SKIPPED_IN_ROW == 0 or last:
                        self.refuse_divergence()
                    if config.sample_interval and self.step % config.sample_interval == 0:
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
        rate = learning_rate(self.step, self.config.lr, self.config.lr_warmup_steps, self.config.lr_anneal_steps)
        norm = self.optimizer.step(rate)
        self.ema.update()
        self.track(gathered, norm)
        self.step += 1

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of the global mean loss; returns what `track` needs, [local batch, 2 + 2 K] (see `_losses`)."""
        records = []
        if self.config.dropout > 0:  # the only draw that is torch's own: tied to the step, so that resuming repeats it
            torch.manual_seed((self.seed * 1_000_003 + self.step) * 4096 + self.processes.rank)
        count = len(batch.images)
        for start in range(0, count, self.microbatch):
            part = slice(start, min(start + self.microbatch, count))
            last = part.stop == count
            later = contextlib.nullcontext if last or self.processes.world_size == 1 else self.network.no_sync
            with later():
                loss, record = self._losses(batch, part)
                self.optimizer.scale(loss * ((part.stop - start) / count)).backward()
            records.append(record)
        return torch.cat(records)

    def _losses(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        streams = SampleStreams(self.seed, batch.positions[part], device=self.device)
        x_start = from_uint8(batch.images[part])
        flip = streams.uniform() < 0.5
        if self.config.random_flip:
            x_start = torch.where(flip.view(-1, 1, 1, 1), x_start.flip(-1), x_start)
        t, weights = self.schedule_sampler(streams.uniform())
        noise = streams.normal(*x_start.shape[1:])
        labels = batch.labels[part] if batch.labels is not None else None
        losses = multi_task_losses(
            self.network,
            self.diffusion,
            self.modalities,
            x_start,
            labels,
            t,
            noise,
            streams,
            variant=self.model.variant,
            loss_weight=self.config.mt_loss_weight,
            drop_prob=self.config.mt_drop_prob,
            model_kwargs={"y": labels} if self.config.class_cond else None,
        )
        ones = torch.ones_like(losses.kept)
        values = [losses.loss, *(losses.terms[name] for name in self.terms)]
        kept = [losses.kept if name in self.modalities else ones for name in ("loss", *self.terms)]
        record = torch.stack([t.to(values[0].dtype), *(v.detach() for v in values), *kept], dim=1)
        return (losses.loss * weights).mean(), record

    @torch.no_grad()
    def track(self, record: Tensor, norm: Tensor) -> None:
        """Feed every process's losses to the schedule sampler, the heads' variances and the averages: the same on all."""
        record = self.processes.all_gather(record)
        t, values, kept = record[:, 0].long(), *record[:, 1:].chunk(2, dim=1)
        self.schedule_sampler.update(t, values[:, 0])
        for name in self.modalities:
            column = 1 + self.terms.index(name)
            self.model.head_variance[name].update(t, values[:, column], kept[:, column])
        self.averages.add(t, values, kept)
        self.averages.add_norm(norm)

    # ------------------------------------------------------------ now and then

    def _columns(self) -> list[str]:
        names = self.averages.names
        quartiles = [f"{name}_q{q}" for name in names for q in range(QUARTILES)]
        extra = ["log2_loss_scale"] if self.optimizer.fp16 else []
        return ["step", "samples", *names, "grad_norm", "lr", "skipped_steps", *extra, "images_per_second", *quartiles]

    def report(self) -> None:
        """Log the interval since the last report."""
        steps = self.step - self.clock_step
        seconds = max(time.monotonic() - self.clock, 1e-9)
        values = self.averages.pop()
        self.clock, self.clock_step = time.monotonic(), self.step
        if self.reporter:
            rate = learning_rate(
                self.step - 1, self.config.lr, self.config.lr_warmup_steps, self.config.lr_anneal_steps
            )
            row = {"step": self.step, "samples": self.step * self.global_batch, **values}
            row |= {"lr": rate, "skipped_steps": int(self.optimizer.skipped)}
            row |= {"images_per_second": steps * self.global_batch / seconds}
            if self.optimizer.fp16:
                row["log2_loss_scale"] = float(self.optimizer.log2_scale)
            self.reporter.row(row)

    def refuse_divergence(self) -> None:
        """Stop a run that has stopped learning."""
        longest = int(self.optimizer.longest_row)
        if longest >= MAX_SKIPPED_IN_ROW:
            raise UserError(
                f"step {self.step}: the loss or its gradient was not finite {longest} steps in a row, so training stopped; "
                "these steps changed nothing and the checkpoints are from before: lower --lr, or use --precision fp32"
            )

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

    def preview(self) -> None:
        """A PNG grid from the averaged weights: samples, and the training set's first images masked and restored."""
        if self.processes.is_main:
            rate = max(self.ema.averages, key=float)
            self.ema.swap(rate)
            self.model.eval()
            try:
                grid = self._preview_grid()
            finally:
                self.ema.swap(rate)
                self.model.train()
            save_png(grid, self.run / "grids" / f"step_{self.step:08d}.png")
            self.reporter.image("preview", torch.from_numpy(grid).permute(2, 0, 1), self.step)
        self.processes.barrier()

    def _preview_grid(self):
        names = self.source.class_names if self.source.labels is not None else None
        generator = Generator(self.config, self.model, build_modalities(self.config, self.model), names)
        settings = SampleConfig(steps=25)
        loaded = load_images(self.source, self.config.image_size, limit=PREVIEW_COUNT)
        x_start = from_uint8(loaded.images.to(self.device))
        labels = None if loaded.labels is None else loaded.labels.to(self.device)
        y = labels if self.config.class_cond else None
        seeds = range(len(x_start))
        rows = [generator.draw(seeds, settings, labels=y).x_start]
        for name, modality in self.modalities.items():
            x = modality.from_batch(x_start, labels, SampleStreams(torch.tensor(seeds), index=1, device=self.device))
            picture = modality.picture(x)
            rows += [x_start, *([] if picture is None else [picture])]
            rows += [generator.draw(seeds, settings, {name: x}, labels=y).x_start]
        return make_grid(to_nhwc(torch.cat(rows)), columns=len(x_start))

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def _agreed_stop(self) -> bool:
        if self.processes.world_size == 1:
            return self.stop_requested
        often = self.device.type == "cpu"  # on a GPU asking would wait for it
        return (often or self.step % SIGNAL_INTERVAL == 0) and self.processes.any(self.stop_requested)


def _with_batch(section, global_batch: int):
    if not isinstance(section, TrainConfig):
        return section
    return TrainConfig(**{**vars(section), "global_batch_size": global_batch})


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
