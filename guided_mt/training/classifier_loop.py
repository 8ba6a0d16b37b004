"""Training of ADM's noisy classifier: cross-entropy on noised images, top-1 and top-5, the same on validation images.

The run around it is `loop.Loop`. Everything random belongs to a sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ..data import Batch, ImageSource, ImageStream
from ..data.images import from_uint8
from ..diffusion.random import SampleStreams
from ..diffusion.resample import UniformSampler
from ..generation.noisy_classifier import build_classifier, build_process, classifier_sections, shape_settings
from ..runs import checkpoint
from ..runs.config import Config, DataConfig, check_keys, option, redefined
from ..runs.distributed import Processes
from ..runs.loop_config import FlagLoopConfig
from .averages import QUARTILES, Averages
from .loop import Loop
from .record import Record
from .step import draw

SCORES = ("loss", "acc@1", "acc@5")  # ADM's names
VALIDATION = 1 << 32  # added to the seed, which is smaller: random numbers that no training sample has
log = logging.getLogger("guided_mt")


@dataclass
class ClassifierLoopConfig(FlagLoopConfig):
    """Training of a classifier (ADM's flags, and those of all training here)"""

    log_dir: str = redefined(
        FlagLoopConfig,
        "log_dir",
        help="folder of this run; the same command again resumes it. Empty: $OPENAI_LOGDIR or runs/classifier-SIZE",
    )
    total_steps: int = redefined(
        FlagLoopConfig,
        "total_steps",
        150_000,
        help="optimiser steps of the whole run (also --iterations, ADM's name)",
    )
    lr: float = redefined(FlagLoopConfig, "lr", 3e-4)
    ema_rate: str = redefined(
        FlagLoopConfig, "ema_rate", "", help="comma-separated rates of averaged weights; empty: none, as in ADM"
    )
    resume_checkpoint: str = redefined(
        FlagLoopConfig,
        "resume_checkpoint",
        help="weights to start from: an ADM classifier's .pt, a classifier's run, or a run with --mt_label_head E",
    )
    val_data_dir: str = option("", "images to validate on, as data_dir; empty: none")
    noised: bool = option(True, "train on noised images; False: on clean ones, with timestep 0")
    anneal_lr: bool = option(False, "let the learning rate fall linearly to 0 over the whole run")
    eval_interval: int = option(5, "steps between validation batches", least=1)


@dataclass
class ClassifierDataConfig(DataConfig):
    """Data"""

    random_crop: bool = redefined(
        DataConfig,
        "random_crop",
        True,
        help="random instead of centre crops, as in ADM's; validation is cropped in the centre",
    )


def classifier_run_sections() -> tuple[type, ...]:
    """What a classifier run's config.yaml holds."""
    return (*classifier_sections(), ClassifierDataConfig, ClassifierLoopConfig)


class ClassifierLoop(Loop):
    """A run of the noisy classifier; val_source: images with the same class ids, or None."""

    def __init__(
        self,
        config: Config,
        processes: Processes,
        source: ImageSource,
        folder: Path,
        val_source: ImageSource | None = None,
    ):
        diffusion = build_process(config)
        self.val_source = val_source
        self.validation: Iterator[Batch] | None = None
        self.val_timesteps = UniformSampler(diffusion.num_timesteps)
        names = [f"val_{name}" for name in SCORES] if val_source else []
        self.val_averages = Averages(names, diffusion.num_timesteps, processes, scalars=())
        super().__init__(config, processes, source, folder, build=build_classifier, diffusion=diffusion, names=SCORES)

    # ------------------------------------------------------------ set-up

    @override
    def start_from(self, path: str) -> Path:
        file = checkpoint.find_weights(path, "none", "--resume_checkpoint")
        checkpoint.load_classifier_weights(self.model, file, shape_settings(self.config), averaged=False)
        if self.processes.is_main:
            log.info("started from %s; every entry was found", file)
        return file

    @override
    def fixed_settings(self) -> dict[str, Any]:
        settings = self.config.as_dict(*classifier_sections()) | {"noised": self.config.noised}
        return {k: v for k, v in settings.items() if k not in ("timestep_respacing", "classifier_use_fp16")}

    @override
    def saved_settings(self, weights: Path) -> dict[str, Any]:
        known = {field.name for section in classifier_run_sections() for field in dataclasses.fields(section)}
        saved = check_keys(checkpoint.read_config(weights) or {}, known, weights.parent / "config.yaml")
        return {"trained_timesteps": "", **saved} if saved else {}

    @override
    def extra_state(self) -> dict[str, Any]:
        return {"val_averages": self.val_averages.state_dict()} if self.val_source else {}

    @override
    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        if self.val_source and "val_averages" in state:  # else validation is new to this run
            self.val_averages.load_state_dict(state["val_averages"])

    # ------------------------------------------------------------ one step

    @override
    def losses(self, batch: Batch, part: slice) -> tuple[Tensor, Record]:
        flip = self.config.random_flip
        streams, x_start, t, weights = draw(
            self.seed, batch.images[part], batch.positions[part], self.schedule_sampler, flip
        )
        if not self.config.noised:
            t, weights = torch.zeros_like(t), torch.ones_like(weights)
        scores = self._scores(self.network, x_start, classes_of(batch, part), t, streams)
        return (scores[:, 0] * weights).mean(), Record.of(t, dict(zip(SCORES, scores.unbind(1), strict=True)))

    def _scores(self, network: nn.Module, x_start: Tensor, labels: Tensor, t: Tensor, streams: SampleStreams) -> Tensor:
        """[B, 3]: cross-entropy in nats, and whether the class is the first, and among the first five."""
        x_t = self.diffusion.q_sample(x_start, t, streams.normal(*x_start.shape[1:])) if self.config.noised else x_start
        logits = network(x_t, self.diffusion.model_timesteps(t))
        first = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([cross_entropy, first[:, 0].float(), first.any(dim=1).float()], dim=1)

    # ------------------------------------------------------------ validation

    @override
    def run_loop(self) -> None:
        with self._validation_stream() as stream:
            self.validation = stream
            super().run_loop()

    @contextlib.contextmanager
    def _validation_stream(self) -> Iterator[Iterator[Batch] | None]:
        """Batch k is that of the k-th validation, a function of k alone: whatever the number of processes, and when resumed."""
        if not self.val_source:
            yield None
            return
        stream = ImageStream(
            self.val_source,
            self.config.image_size,
            seed=self.seed,
            global_batch=self.global_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            start_step=self.step // self.config.eval_interval,
            num_workers=min(1, self.config.data_workers),
        )
        with stream:
            yield iter(stream)

    @torch.no_grad()
    def measure(self) -> None:
        """Every `eval_interval` steps, one validation batch: not flipped, timesteps uniform."""
        if self.validation is None or self.step % self.config.eval_interval:
            return
        batch = next(self.validation).to(self.device)
        records = []
        self.model.eval()
        for start in range(0, len(batch.images), self.microbatch):
            part = slice(start, start + self.microbatch)
            streams = SampleStreams(self.seed + VALIDATION, batch.positions[part], device=self.device)
            t, _ = self.val_timesteps(streams.uniform())
            t = t if self.config.noised else torch.zeros_like(t)
            x_start = from_uint8(batch.images[part])
            scores = self._scores(self.model, x_start, classes_of(batch, part), t, streams)
            records.append(Record.of(t, dict(zip(self.val_averages.names, scores.unbind(1), strict=True))))
        self.model.train()
        self.val_averages.add(Record.joined(records))

    @override
    def extra_columns(self) -> list[str]:
        names = self.val_averages.names
        return [*names, *(f"{name}_q{q}" for name in names for q in range(QUARTILES))]

    @override
    def extra_row(self) -> dict[str, float]:
        return {name: value for name, value in self.val_averages.pop().items() if not math.isnan(value)}


def classes_of(batch: Batch, part: slice) -> Tensor:
    """Class ids [b]. Raises ValueError for images that have none."""
    if batch.labels is None:
        raise ValueError("a classifier is trained on images with classes")
    return batch.labels[part]
