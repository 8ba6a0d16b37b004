"""The forward pass of a training step as one module, from bytes to the loss: what `--compile` makes one graph of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch
from ..data.images import from_uint8
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..diffusion.resample import UniformSampler
from ..generation.batches import split_sides
from ..modalities import Images, Modality
from ..modalities.settings import loss_weights, roles_of
from ..modalities.weighting.settings import Weighting
from ..networks.multi_task import MultiTask
from ..runs.config import Config
from .objective import Losses, figures_of, multi_task_losses
from .record import Record, table_of
from .terms.alignment import Alignment


class Part(NamedTuple):
    """b samples of a batch on the device, as `Batch` has them."""

    images: Tensor  # uint8 [b, 3 sides, H, W]
    positions: Tensor  # int64 [b]
    labels: Tensor | None  # int64 [b]
    loaded: dict[str, Tensor]  # [b, ...] each
    present: dict[str, Tensor]  # bool [b] each

    @classmethod
    def of(cls, batch: Batch, rows: slice) -> Part:
        """These rows of a batch, as views of it."""
        return cls(
            batch.images[rows],
            batch.positions[rows],
            None if batch.labels is None else batch.labels[rows],
            {name: x[rows] for name, x in batch.loaded.items()},
            {name: mask[rows] for name, mask in batch.present.items()},
        )


class Outcome(NamedTuple):
    """What a step's forward pass comes to. The names of the table are the step's."""

    loss: Tensor  # 0-dim: the mean to minimise
    timesteps: Tensor  # int64 [b]
    table: Tensor  # float32 [2, b, names], see `Record.table`


def draw(
    seed: int, images: Tensor, positions: Tensor, schedule_sampler: UniformSampler, random_flip: bool
) -> tuple[SampleStreams, Tensor, Tensor, Tensor]:
    """Samples as trained on: their random numbers, x_start [b, C, H, W], mirrored by halves where asked for, timesteps [b] and
    their importance weights [b]. images: uint8 [b, C, H, W]; positions: int64 [b], of the samples in the run. The same at every
    call."""
    streams = SampleStreams(seed, positions, device=images.device)
    x_start = from_uint8(images)
    flip = streams.uniform() < 0.5
    if random_flip:
        x_start = torch.where(flip.view(-1, 1, 1, 1), x_start.flip(-1), x_start)
    return streams, x_start, *schedule_sampler(streams.uniform(), positions)


class Step(nn.Module):
    """Algorithm 2 on a part of a batch: draws, mirroring, frame, network, terms of the modalities, loss and record.

    It is a module with the network inside, since two wrappers may stand around it. `torch.compile` makes one graph of its forward
    pass and one of its backward pass. DistributedDataParallel stands around the compiled module. Its own Python, which Dynamo can't
    trace, stays outside. Its hooks are on the same parameters, so the gradients that it averages are those of this very loss. And
    Dynamo, which sees it at work, cuts the graphs at its buckets, so that sending and computing overlap.

    terms: the names of the loss's parts to record. sizes: `rms_NAME` of the modalities whose encodings' sizes are recorded.
    side_names: of the sides that each item of the images holds. weighting: of the terms. It stands inside, as does the alignment,
    so that what they learn is compiled and averaged over processes with the network.
    """

    def __init__(
        self,
        model: MultiTask,
        config: Config,
        diffusion: GaussianDiffusion,
        modalities: Mapping[str, Modality],
        schedule_sampler: UniformSampler,
        *,
        terms: Sequence[str],
        sizes: Sequence[str],
        side_names: tuple[str, ...] = (),
        weighting: Weighting | None = None,
        alignment: Alignment | None = None,
    ):
        super().__init__()
        self.model, self.schedule_sampler = model, schedule_sampler
        self.weighting, self.alignment = weighting, alignment
        self.diffusion, self.modalities = diffusion, dict(modalities)
        self.seed, self.random_flip, self.class_cond = config.seed, config.random_flip, config.class_cond
        self.drop_prob, self.given_prob = config.mt_drop_prob, config.mt_given_prob
        self.loss_weight, self.roles = loss_weights(config), roles_of(config)
        self.terms, self.sizes, self.side_names = terms, sizes, side_names
        self.figures = tuple(figures_of(self.modalities))
        self.names = ("loss", *terms, *sizes, *self.figures, *(["role"] if self.roles.told else []))

    def forward(self, part: Part) -> Outcome:
        """The loss of these samples, and what is noted of each of them (see `record`)."""
        losses, t, weights = self.losses(part)
        rows = [losses.loss, *(losses.terms[name] for name in self.terms)]
        rows += [losses.encoding_rms[name.removeprefix("rms_")] for name in self.sizes]
        rows += [losses.figures[name] for name in self.figures]
        rows += [losses.role.float()] if self.roles.told else []
        table = table_of(dict(zip(self.names, rows, strict=True)), losses.predicted)
        return Outcome((losses.loss * weights).mean(), t, table)

    def losses(self, part: Part) -> tuple[Losses, Tensor, Tensor]:
        """(losses, timesteps [b], importance weights [b]): the same draws at every call."""
        streams, pixels, t, weights = draw(
            self.seed, part.images, part.positions, self.schedule_sampler, self.random_flip
        )
        x_start, sides = split_sides(pixels, self.side_names)
        noise = streams.normal(*x_start.shape[1:])
        losses = multi_task_losses(
            self.model,
            self.diffusion,
            self.modalities,
            Images(x_start, part.labels, part.loaded, sides, part.present),
            t,
            noise,
            streams,
            variant=self.model.variant,
            loss_weight=self.loss_weight,
            drop_prob=self.drop_prob,
            given_prob=self.given_prob,
            model_kwargs={"y": part.labels} if self.class_cond else None,
            roles=self.roles,
            role=self.roles.draw(streams) if self.roles.slots else None,
            weighting=self.weighting,
            alignment=self.alignment,
        )
        return losses, t, weights

    def record(self, outcome: Outcome) -> Record:
        """The samples' record."""
        return Record(outcome.timesteps, self.names, outcome.table)
