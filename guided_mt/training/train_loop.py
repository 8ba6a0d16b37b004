"""Training of MT-Diffusion: Algorithm 2 on every batch, the heads' variances, and pictures now and then.

The run around it is `loop.Loop`. Everything random belongs to a sample.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..data import Batch, ImageSource, ImageStream, load_images
from ..data.images import make_grid, to_nhwc
from ..diffusion.random import SampleStreams, Stream
from ..errors import UserError
from ..generation.batches import load_beside, split_sides, take_images
from ..generation.build import (
    bind,
    build_modalities,
    build_model,
    model_sections,
    needs_labels,
    saved_config,
    trained_process,
)
from ..generation.generate import Generator
from ..modalities import Images, Modality
from ..modalities.registry import TASKS
from ..modalities.settings import MTConfig, absent_names, roles_of, variant_of
from ..modalities.weighting.on_gradients import gramian_of, outputs_of
from ..modalities.weighting.settings import Weighting, intervals_of
from ..networks.alignment import ALIGNMENTS
from ..networks.multi_task import MultiTask
from ..runs import checkpoint
from ..runs.config import Config, SampleConfig
from ..runs.distributed import Processes
from ..runs.loop_config import AlignmentConfig
from .adm_run import ADMRun
from .loop import Loop
from .loop import batch_sizes as batch_sizes
from .objective import figures_of
from .record import Record
from .step import Outcome, Part, Step, draw
from .terms.alignment import ALIGN, Alignment
from .terms.conflict import conflict_names, task_conflict
from .units import batches_to_measure, measure_units
from .variances import learn_variances

PREVIEW_COUNT = 16
log = logging.getLogger("guided_mt")


class TrainLoop(Loop):
    """A run of MT-Diffusion, or of one of the single-task models it is compared with."""

    model: MultiTask
    annealing_lag = 1

    def __init__(self, config: Config, processes: Processes, source: ImageSource, folder: Path):
        self.modalities = build_modalities(config)
        for modality in self.modalities.values():
            modality.prepare(source)
        find_absent(config, self.modalities, processes)
        self.roles = roles_of(config)
        self.shown: dict[str, Modality] = {}  # the previews' modalities
        diffusion = trained_process(config)
        self.weighting = Weighting(config, diffusion).to(processes.device)
        terms = ["mse", *(["vb"] if config.learn_sigma else [])] if not config.use_kl else []
        self.terms = [*terms, *self.modalities, *([ALIGN] if ALIGNMENTS[config.align] is not None else [])]
        self.timeless = [f"rms_{name}" for name in self.modalities if variant_of(config) != "X"]
        tasks = ["denoising", *self.modalities]
        self.spread = [name for name, m in self.modalities.items() if self.timeless and m.has_spread]
        super().__init__(
            config,
            processes,
            source,
            folder,
            build=self.make_model,
            diffusion=diffusion,
            names=["loss", *self.terms, *self.timeless, *figures_of(self.modalities)],
            scalars=[
                *(f"spread_{name}" for name in self.spread),
                *(conflict_names(tasks) if config.mt_conflict_interval else ()),
                *self.weighting.columns(),
            ],
            dropout=config.dropout,
            compiling=config.compile,
        )
        self._measure_units()

    # ------------------------------------------------------------ set-up

    def make_model(self, config: Config) -> MultiTask:
        """The network, by which the modalities encode from now on."""
        model = build_model(config, self.modalities)
        bind(self.modalities, config, model)
        self.alignment = Alignment.of(config, model)
        if self.alignment is not None:
            self.alignment.on(self.device)
        return model

    @override
    def trained(self) -> Step:
        self.forward_step = Step(
            self.model,
            self.config,
            self.diffusion,
            self.modalities,
            self.schedule_sampler,
            terms=self.terms,
            sizes=self.timeless,
            side_names=tuple(self.source.side_names),
            weighting=self.weighting,
            alignment=self.alignment,
        )
        return self.forward_step

    @override
    def parameters_beside(self) -> list[dict[str, Any]]:
        aligned = [] if self.alignment is None else self.alignment.parameter_groups()
        return [*self.weighting.parameter_groups(), *aligned]

    @override
    def interval_of(self) -> Tensor:
        return intervals_of(self.config, self.diffusion)

    def _measure_units(self) -> None:
        """On the first images of the run, which each process sees all of, where nothing was loaded that knows them."""
        if not any(modality.unmeasured for modality in self.modalities.values()):
            return
        config, names = self.config, tuple(self.source.side_names)
        stream = ImageStream(
            self.source,
            config.image_size,
            seed=self.seed,
            global_batch=self.global_batch,
            total_steps=batches_to_measure(self.global_batch),
            random_crop=config.random_crop,
            num_workers=config.data_workers,
        )

        def seen(batch: Batch) -> Images:
            _, pixels, *_ = draw(self.seed, batch.images, batch.positions, self.schedule_sampler, config.random_flip)
            return Images(split_sides(pixels, names)[0])

        with stream:
            measure_units(self.modalities, (seen(batch.to(self.device)) for batch in stream))

    @override
    def start_from(self, path: str) -> Path | None:
        file = checkpoint.find_weights(path, "none")
        new = checkpoint.load_weights(self.model, file, allow_new=True, settings=self.config.as_dict(), averaged=False)
        if self.processes.is_main:
            log.info("started from %s; %s", file, f"new: {len(new)} entries" if new else "every entry was found")
            theirs, ours = checkpoint.read_classes(file.parent), self.source.class_names
            if theirs and needs_labels(self.config) and theirs != ours:
                text = "%s knew other classes, %d of them and not %d: id 0 was '%s' and is now '%s', and so on"
                log.warning(text, file, len(theirs), len(ours), theirs[0], ours[0])
        if new and ADMRun.of(file) is not None and self.processes.is_main:
            log.info("a new run begins, and what lies beside the file stays unread: this network has more than ADM's")
        return None if new else file

    @override
    def fixed_settings(self) -> dict[str, Any]:
        free: tuple[str, ...] = ("compile", "timestep_respacing", "use_checkpoint", "precision", "use_fp16")
        # What is only measured may change, and a file may have moved, as the images may.
        free += (
            "mt_conflict_interval",
            "mt_task_weighting_interval",
            *(flag for task in TASKS.values() for flag in task.file_options),
        )
        free += ("align_encoder",)  # so may an encoder's; its weights are compared
        return {k: v for k, v in self.config.as_dict(*model_sections(), AlignmentConfig).items() if k not in free}

    @override
    def saved_settings(self, weights: Path) -> dict[str, Any]:
        return saved_config(weights)

    # ------------------------------------------------------------ one step

    @override
    def run_step(self, batch: Batch) -> None:
        for modality in self.modalities.values():
            modality.before_step(self.step, self.processes)
        for name, beside in load_beside(self.modalities, batch.indices.numpy(), batch.captions).items():
            batch.loaded[name] = beside.to(self.device, non_blocking=True)
        interval = self.config.mt_conflict_interval
        if interval and self.step % interval == 0:
            self.measure_conflict(batch)
        if self.step % self.config.mt_task_weighting_interval == 0:
            self.measure_tasks(batch)
        super().run_step(batch)

    @override
    def losses(self, batch: Batch, part: slice) -> tuple[Tensor, Record]:
        outcome = self.network(Part.of(batch, part))
        if self.cuda_graphs:  # the record outlives the graphs' next call
            outcome = Outcome(outcome.loss, outcome.timesteps.clone(), outcome.table.clone())
        return outcome.loss, self.forward_step.record(outcome)

    def measure(self) -> None:
        """How much the encodings tell: an E(x) that is the same for every x has a fine RMS and says nothing."""
        if self.spread and self.step % self.config.log_interval == 0:
            measured = {f"spread_{name}": self.modalities[name].encoding_spread(self.device) for name in self.spread}
            self.averages.add_scalars(measured)
        factors = self.weighting.over_tasks.factors()
        if factors is not None and self.step % self.config.log_interval == 0:
            self.averages.add_scalars(dict(zip(self.weighting.columns(), factors, strict=True)))

    def measure_conflict(self, batch: Batch) -> None:
        """Norms of the tasks' gradients on the shared backbone and the cosines between them, on this step's first images."""
        self.seed_dropout()
        # The step itself, not its wrapper: nothing is to be accumulated or sent along the way.
        losses, _, weights = self.forward_step.losses(Part.of(batch, slice(0, self.microbatch)))
        objectives = {task: (values * weights).mean() for task, values in losses.objectives.items()}
        shared = [p for name, p in self.model.named_parameters() if not checkpoint.is_own(name)]
        self.averages.add_scalars(task_conflict(objectives, shared, self.processes, self.optimizer.scale))

    def measure_tasks(self, batch: Batch) -> None:
        """The tasks' weights of the coming steps where they rest on gradients, those of the batch on the middle features."""
        weighting = self.weighting.on_gradients
        if weighting is None:
            return
        self.seed_dropout()
        count = len(batch.images)
        gramian = torch.zeros(len(weighting.tasks), len(weighting.tasks), device=self.device)
        for start in range(0, count, self.microbatch):
            part = slice(start, min(start + self.microbatch, count))
            with outputs_of(self.model.trunk) as features:
                losses, _, weights = self.forward_step.losses(Part.of(batch, part))
            objectives = {task: (losses.objectives[task] * weights).sum() / count for task in weighting.tasks}
            gramian += gramian_of(objectives, features[-1], self.optimizer.scale)
        weighting.measure(self.processes.mean(gramian), seed=self.seed + self.step)

    @override
    def learn(self, record: Record) -> None:
        if self.model.head_variance:
            on_all = dataclasses.replace(record, timesteps=self.diffusion.network_timesteps(record.timesteps))
            learn_variances(self.model, on_all, self.modalities, self.processes)

    @override
    def extra_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"modalities": {name: m.state_dict() for name, m in self.modalities.items()}}
        learned = self.weighting.state_dict()
        if learned:
            state["weighting"] = learned
        if self.alignment is not None:
            state["alignment"] = self.alignment.saved()
        return state

    @override
    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        saved = state["modalities"] if "modalities" in state else {name: {} for name in self.modalities}  # version 0.1
        for name, modality in self.modalities.items():
            modality.load_state_dict({key: x.to(self.device) for key, x in saved[name].items()})
        self.weighting.load_state_dict(state.get("weighting", {}))
        if self.alignment is not None:
            self.alignment.load_saved(state["alignment"])

    # ------------------------------------------------------------ now and then

    @property
    @override
    def preview_interval(self) -> int:  # type: ignore[override]
        return self.config.sample_interval

    def preview(self) -> np.ndarray:
        """From the averaged weights: samples, and the training set's first images with each modality given."""
        with self.ema.slowest_in(self.model):
            return self._preview_grid()

    def _preview_grid(self) -> np.ndarray:
        names = self.source.class_names if self.source.labels is not None else None
        # Of its own: training may keep encodings (`--mt_encoder_refresh`) that are not the averaged weights'.
        self.shown = self.shown or build_modalities(self.config)
        bind(self.shown, self.config, self.model)
        generator = Generator(self.config, self.model, self.shown, names)
        settings = SampleConfig(steps=25)
        loaded = load_images(self.source, self.config.image_size, limit=PREVIEW_COUNT)
        images = take_images(loaded, slice(None), self.modalities, self.device, self.source.side_names)
        y = images.labels if self.config.class_cond else None
        seeds = range(len(images.x_start))
        whole = {name: _all_have(modality.present(images)) for name, modality in self.modalities.items()}
        given = images.sides if self.model.variant == "X" else {}  # which form X always is
        if given and not all(whole[name] for name in self.roles.slots):
            return make_grid(to_nhwc(torch.cat([images.x_start, *given.values()])), columns=len(seeds))
        rows = [generator.draw(seeds, settings, given, labels=y).x_start]
        trained = {name: m for name, m in self.modalities.items() if whole[name] and self.config.mt_drop_prob < 1}
        for name, modality in trained.items():
            streams = SampleStreams(torch.tensor(seeds), index=Stream.PREVIEW, device=self.device)
            x = modality.from_batch(images, streams)
            picture = modality.picture(x)
            rows += [images.x_start, *([] if picture is None else [picture])]
            rows += [generator.draw(seeds, settings, {**given, name: x}, labels=y).x_start]
        return make_grid(to_nhwc(torch.cat(rows)), columns=len(seeds))


def _all_have(present: Tensor | None) -> bool:
    return present is None or bool(present.all())


def find_absent(config: Config, modalities: Mapping[str, Modality], processes: Processes) -> None:
    """Where --mt_absent was not given, it names the modalities that some of the images lack, as `prepare` found them."""
    partly = [name for name, modality in modalities.items() if modality.partly]
    undeclared = [name for name in partly if name not in absent_names(config)]
    if not undeclared:
        return
    if "mt_absent" in config.typed:
        raise UserError(
            f"--mt_absent {config.mt_absent}: some of the images have no {undeclared[0]} either; name it too"
        )
    config[MTConfig].mt_absent = ",".join(partly)
    if processes.is_main:
        print(f"# mt_absent {config.mt_absent}: some of the images have none", flush=True)
