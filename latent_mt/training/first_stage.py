"""Training of LDM's first stages: autoencoder against discriminator, each with its own Adam (LDM's `training_step`s).

One step updates the autoencoder, then the discriminator on the same reconstructions; LDM encodes and decodes the batch a second
time for that. Before `disc_start` the discriminator is not run at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from typing_extensions import override

from guided_mt.data import Batch, ImageSource, load_images
from guided_mt.data.images import from_uint8, make_grid, to_nhwc, to_uint8
from guided_mt.data.subset import Subset, spread
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.runs import checkpoint
from guided_mt.training.averages import Averages
from guided_mt.training.optim import guard_step

from ..data.ordered import ordered_batches
from ..first_stage.first_stages import ConvolutionalAutoencoder
from ..first_stage.losses import AdversarialLoss
from ..first_stage.reconstruction import figure_names, measure
from ..first_stage.weights import load_entries, read_state_dict
from ..runs.targets import instantiate
from ..runs.trained_module import TrainedModule

PREVIEW = 8  # items of a grid
LOSS_PREFIX = "loss."


class AutoencoderTraining(TrainedModule):
    """Trains `autoencoder` with the loss that its `lossconfig` describes; see trained_module.TrainedModule for how it is driven.

    Items with several images of `in_channels` channels, such as pairs, are trained on as that many images, mirrored alike.
    microbatches: into how many parts of equal size a batch is divided, one pass each. Raises UserError for a lossconfig that
    names no loss, or the loss of another kind of first stage.
    """

    def __init__(self, autoencoder: ConvolutionalAutoencoder, microbatches: int = 1):
        super().__init__()
        self.automatic_optimization = False
        self.autoencoder, self.microbatches = autoencoder, microbatches
        self.loss = self._build_loss()
        scheduler = autoencoder.scheduler_config
        self.schedule = None if scheduler is None else instantiate(scheduler, "model.params.scheduler_config")
        self.resize_range = self._resize_range()
        if autoencoder.ckpt_path:
            self._load_loss(read_state_dict(autoencoder.ckpt_path), autoencoder.ckpt_path, autoencoder.ignore_keys)

    @property
    def averaged(self) -> nn.Module:
        """The module whose weights are averaged: the autoencoder, without the loss and its discriminator."""
        return self.autoencoder

    def _build_loss(self) -> AdversarialLoss:
        where, kind = "model.params.lossconfig", self.autoencoder.loss_class
        if self.autoencoder.lossconfig is None:
            raise UserError(
                f"{where} is missing: training needs target ldm.modules.losses.{kind.__name__}, or its like"
            )
        loss = instantiate(self.autoencoder.lossconfig, where)
        if not isinstance(loss, kind):
            name = type(self.autoencoder).__name__
            raise UserError(f"{where}: {name} is trained with {kind.__name__}, not {type(loss).__name__}")
        if loss.discriminator is not None and _channels_seen(loss.discriminator) != self.autoencoder.ddconfig.out_ch:
            raise UserError(
                f"{where}.params.disc_in_channels must be ddconfig.out_ch {self.autoencoder.ddconfig.out_ch}"
            )
        return loss

    def _resize_range(self) -> tuple[int, int] | None:
        """LDM's batch_resize_range: sizes in pixels between which each batch is resized."""
        values = self.autoencoder.batch_resize_range
        if values is None:
            return None
        if len(values) != 2 or not 0 < values[0] <= values[1] or any(v % self.autoencoder.downsampling for v in values):
            step = self.autoencoder.downsampling
            raise UserError(f"model.params.batch_resize_range {list(values)}: write [least, most], multiples of {step}")
        return int(values[0]), int(values[1])

    # ------------------------------------------------------------ a step

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self.autoencoder.ddconfig.dropout > 0:
            self.seed_dropout()
        x, noise = self.draw(batch)
        for optimizer in self._optimizers():
            self._set_rate(optimizer.optimizer)
        reconstructions = self._train_autoencoder(x, noise)
        if self.loss.adversarial(self.steps_done):
            self._train_discriminator(x, reconstructions)
        self.steps_done += 1

    @torch.no_grad()
    def draw(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Images [b * sides, C, H, W] of the batch's items, and the noise that the first stage takes for them (None: none).

        A function of the run's seed and the items' positions: the same at every call, on any number of processes.
        """
        streams = SampleStreams(self.run.seed, batch.positions, device=batch.images.device)
        images = from_uint8(batch.images)
        flip = (streams.uniform() < 0.5) & self.random_flip
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        sides = images.shape[1] // self.autoencoder.in_channels
        x = self._resized(images.reshape(-1, self.autoencoder.in_channels, *images.shape[2:]))
        return x, self.autoencoder.noise(streams, sides, *x.shape[2:])

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize_range is None:
            return x
        least, most = self.resize_range
        sizes = torch.arange(least, most + 16, 16)  # LDM's steps; its first batches have the largest size, for memory
        step = self.steps_done
        # Positions count from 0: a negative number gives a stream that belongs to the step and to no sample.
        drawn = int(SampleStreams(self.run.seed, -1 - step).integers(len(sizes)))
        size = most if step <= 4 else min(int(sizes[drawn]), most)
        size -= size % self.autoencoder.downsampling
        return x if size == x.shape[2] else F.interpolate(x, size=(size, size), mode="bicubic")

    def _train_autoencoder(self, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        """One update; returns the reconstructions, part by part."""
        loss_state: dict[str, Tensor] = {}
        optimizer, found = self._optimizers()[0], []
        self._discriminator_learns(False)
        parts = x.chunk(self.microbatches)
        noises = [None] * len(parts) if noise is None else noise.chunk(self.microbatches)
        for index, (part, part_noise) in enumerate(zip(parts, noises, strict=True)):
            with self._sync(index == len(parts) - 1):
                made = self.autoencoder.reconstruct(part, part_noise)
                loss, record = self.loss.generator(part, made, self.steps_done, self.autoencoder.last_layer)
                share = len(part) / len(x)
                self.manual_backward(loss * share)
            _add(loss_state, record, share)
            self.figures += made.figures
            found.append(made.image.detach())
        norm, bad = guard_step(optimizer.optimizer, _grads(self._generator_parameters()), self.run.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._discriminator_learns(True)
        self.count(bad)
        self._track({**loss_state, "grad_norm": norm})
        return found

    def _train_discriminator(self, x: Tensor, reconstructions: list[Tensor]) -> None:
        loss_state: dict[str, Tensor] = {}
        optimizer = self._optimizers()[1]
        parts = x.chunk(self.microbatches)
        for index, (part, reconstruction) in enumerate(zip(parts, reconstructions, strict=True)):
            with self._sync(index == len(parts) - 1):
                loss, record = self.loss.discriminate(part, reconstruction)
                share = len(part) / len(x)
                self.manual_backward(loss * share)
            _add(loss_state, record, share)
        guard_step(optimizer.optimizer, _grads(self.loss.discriminator.parameters()), self.run.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._track(loss_state)

    def _discriminator_learns(self, learns: bool) -> None:
        if self.loss.discriminator is not None:
            self.loss.discriminator.requires_grad_(learns)

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients in the last part's backward pass only."""
        alone = last or self.processes.world_size == 1
        return contextlib.nullcontext() if alone else self.trainer.strategy.model.no_sync()

    def _track(self, values: Mapping[str, Tensor]) -> None:
        self.averages.add_scalars({name: value for name, value in values.items() if name in self.averages.scalars})

    # ------------------------------------------------------------ optimisers

    def setup(self, stage: str) -> None:
        """Each backward pass of a step reaches the parameters of one optimiser only, which DistributedDataParallel must be told."""
        if isinstance(self.trainer.strategy, DDPStrategy) and self.loss.discriminator is not None:
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True

    @override
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, second = self.autoencoder.adam_betas
        betas = (first, second)  # the rates are set at every step
        adams: list[torch.optim.Optimizer] = [torch.optim.Adam(self._generator_parameters(), betas=betas, fused=True)]
        if self.loss.discriminator is not None:
            adams.append(torch.optim.Adam(self.loss.discriminator.parameters(), betas=betas, fused=True))
        return adams

    def _generator_parameters(self) -> list[nn.Parameter]:
        return [*self.autoencoder.parameters(), *self.loss.generator_parameters()]

    def _optimizers(self) -> list[Any]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _set_rate(self, adam: torch.optim.Optimizer) -> None:
        """`rate`; the autoencoder's is `lr_g_factor` times that."""
        is_first = adam is self._optimizers()[0].optimizer
        factor = self.autoencoder.lr_g_factor if is_first else 1.0
        for group in adam.param_groups:
            group["lr"] = factor * self.rate(self.steps_done)

    # ------------------------------------------------------------ the run (see trained_module.TrainedModule)

    @override
    def prepare(self, data: Any, resumed: bool) -> None:
        size, least = min(self.resize_range or (data.image_size,)), _least_size(self.loss.discriminator)
        if size < least:
            raise UserError(
                f"images of {size} pixels are too small for this discriminator, which needs {least}; lower "
                "model.params.lossconfig.params.disc_num_layers, or set disc_factor to 0"
            )
        self.autoencoder.to_fast_layout()
        super().prepare(data, resumed)
        self.averages = Averages([], 1, self.processes, (*self.loss.names(), "grad_norm"))
        self.figures = torch.zeros(self.autoencoder.figure_count, dtype=torch.int64, device=self.device)

    @override
    def columns(self) -> list[str]:
        figures = (
            figure_names(self.data.val_source) if self.run.val_interval and self.data.val_source is not None else []
        )
        return [*self.loss.names(), *self.autoencoder.own_columns, *figures, "grad_norm", "lr", "skipped_steps"]

    @override
    def report_row(self) -> dict[str, float]:
        row = {name: value for name, value in self.averages.pop().items() if value == value}  # nan: never seen
        if self.figures.numel():
            self.processes.collect(self.figures)
            row |= self.autoencoder.report(self.figures)
            self.figures.zero_()
        return {**row, "lr": self.rate(self.steps_done - 1)}

    # ------------------------------------------------------------ what it can do

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures of the averaged weights on the validation split, from the posterior's mean; each process takes a part of it."""
        source = self.data.val_source
        if source is None:
            return {}
        names = figure_names(source)
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        with self.with_averages():
            for batch in self._my_part(source):
                images = batch.images.to(self.device)
                made = [to_uint8(self.reconstruct(from_uint8(side))) for side in self._sides(images)]
                sums += measure(images, torch.cat(made, dim=1), source)
        sums = self.processes.all_gather(sums[None]).sum(dim=0)
        return dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))

    def _sides(self, items: Tensor) -> tuple[Tensor, ...]:
        """Items [B, sides * C, H, W] as images [B, C, H, W]."""
        return items.split(self.autoencoder.in_channels, dim=1)

    def _my_part(self, source: ImageSource) -> Iterator[Batch]:
        """Batches of this process's items of a source."""
        mine = Subset(source, np.arange(self.processes.rank, len(source), self.processes.world_size))
        size = max(1, self.data.batch_size // self.microbatches)
        return ordered_batches(mine, self.data.image_size, size, self.data.num_workers)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> images, by way of the latent's mean."""
        return self.autoencoder.reconstruct(x).image

    @torch.no_grad()
    def preview(self) -> np.ndarray:
        """Rows of PREVIEW images from all over the split, and under each its reconstruction by the averaged weights."""
        source = spread(self.data.val_source or self.data.source, PREVIEW)
        images = load_images(source, self.data.image_size).images.to(self.device)
        rows = []
        with self.with_averages():
            for side in self._sides(images):
                x = from_uint8(side)
                rows += [x, self.reconstruct(x)]
        return make_grid(np.concatenate([to_nhwc(self._visible(row)) for row in rows]), columns=len(images))

    def _visible(self, x: Tensor) -> Tensor:
        """Three channels of images [B, C, H, W]: by `colorize` where there are others (LDM's to_rgb), or the first."""
        if x.shape[1] == 3:
            return x
        if hasattr(self.autoencoder, "colorize"):
            x = F.conv2d(x, self.autoencoder.colorize)  # type: ignore[arg-type]
            return 2 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1
        return x[:, :1].expand(-1, 3, -1, -1)

    # ------------------------------------------------------------ checkpoints

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """`model`: LDM's layout, encoder.* ... loss.*; `ema_RATE`: the averaged autoencoder alone."""
        loss = {f"{LOSS_PREFIX}{key}": value for key, value in self.loss.trained_state().items()}
        averages = {f"ema_{rate}": self.ema.state_dict(rate, self.autoencoder) for rate in self.ema.averages}
        return {"model": {**self.autoencoder.state_dict(), **loss}, **averages}

    @override
    def load_weights_of(self, folder: Path) -> None:
        state = checkpoint.read_weights(folder / "model.safetensors")
        own = {key: value for key, value in state.items() if not key.startswith(LOSS_PREFIX)}
        load_entries(self.autoencoder, own, folder)
        self._load_loss(state, str(folder))
        self.load_averages(folder)

    def _load_loss(self, state: Mapping[str, Tensor], where: str, ignore_keys: tuple[str, ...] = ()) -> None:
        """The discriminator and logvar of a checkpoint, where it has them."""
        kept = {key: value for key, value in state.items() if not key.startswith(ignore_keys)}
        own = {key.removeprefix(LOSS_PREFIX): v for key, v in kept.items() if key.startswith(LOSS_PREFIX)}
        if own:
            self.loss.load_trained_state(own, where)

    @override
    def run_state(self) -> dict[str, Any]:
        self.processes.collect(self.figures)
        return {"averages": self.averages.state_dict(), "counts": self.figures}

    @override
    def load_run_state(self, state: Mapping[str, Any]) -> None:
        self.averages.load_state_dict(state["averages"])
        if self.processes.is_main:  # they are the counts of all processes
            self.figures.copy_(state["counts"])


def _add(total: dict[str, Tensor], record: Mapping[str, Tensor], share: float) -> None:
    for name, value in record.items():
        total[name] = total.get(name, 0.0) + share * value


def _grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _channels_seen(network: nn.Module) -> int:
    return next(layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d))


def _least_size(network: nn.Module | None) -> int:
    """The smallest images, in pixels, of which a PatchGAN has a logit: it halves them, then takes off two pixels. None: 0."""
    if network is None:
        return 0
    return 3 * 2 ** sum(layer.stride[0] == 2 for layer in network.modules() if isinstance(layer, nn.Conv2d))
