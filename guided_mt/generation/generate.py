"""From a trained model to samples: which modalities are known, how each variant is conditioned, which timesteps are kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.network import ModelOutput
from ..diffusion.random import SampleStreams, Stream
from ..diffusion.sampling import Sample
from ..errors import UserError
from ..modalities import Modality
from ..modalities.registry import weights_names
from ..networks.model import MTModel
from ..runs.checkpoint import Weights, find_weights, load_weights
from ..runs.config import Config, SamplingOptions
from .build import bind, build_diffusion, build_modalities, build_model, needs_labels, sees_plain_noise
from .drawing import draw, start_warning, visited

log = logging.getLogger("guided_mt")


@dataclass
class Generator:
    """A trained model with everything that drawing from it needs."""

    config: Config
    model: MTModel
    modalities: dict[str, Modality]
    classes: list[str] | None
    warned: bool = False

    def __post_init__(self) -> None:
        self.process = build_diffusion(self.config)
        for modality in self.modalities.values():
            if self.classes:
                modality.use_classes(self.classes)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> Generator:
        """The model of `config.model_path`, ready to sample on `device`."""
        weights = Weights.find(config.model_path, config.ema)
        modalities = build_modalities(config)
        model = build_model(config, modalities)
        load_weights(model, weights.file, allow_new=weights.settings is None)
        model = model.to(device).to_fast_layout().eval().requires_grad_(False)
        bind(modalities, config, model)
        return cls(config, model, modalities, weights.classes)

    @property
    def known_classes(self) -> list[str] | None:
        """The class names that data must have: those of training where the model knows of classes, any where not."""
        return self.classes if needs_labels(self.config) else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.config.image_size, self.config.image_size)

    @property
    def gives(self) -> bool:
        """Whether a known modality is given to the network (forms X and any) or stands in the frame (U)."""
        return self.model.variant != "U"

    def draw(
        self,
        seeds: Sequence[int],
        settings: SamplingOptions,
        known: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        progress: bool = False,
    ) -> Sample:
        """One sample per seed; known {name: x}, labels [B] for a class-conditional model. In form X a modality that is not known
        takes its default (a label at random) or none (the complete mask), and the sample doesn't tell it.

        Raises UserError for what this model was not trained for.
        """
        known = dict(known or {})
        modalities = self.modalities
        if self.model.variant == "X":
            streams = SampleStreams(torch.as_tensor(seeds), index=Stream.DEFAULTS, device=self.device)
            defaults = {name: modality.default(streams) for name, modality in modalities.items() if name not in known}
            known |= {name: x for name, x in defaults.items() if x is not None}
            drawn = [name for name, x in defaults.items() if x is not None]
            if drawn and known.keys() - set(drawn) and not self.warned:
                self.warned = True
                log.warning("not given, so drawn at random for each sample: %s (form X is given all)", ", ".join(drawn))
            not_given = [name for name in modalities if name not in known and name in self.model.context_in]
            if not_given and self.config.mt_drop_prob == 0 and not self.warned:
                self.warned = True
                log.warning(
                    "this form-X model was always given %s in training (no --mt_drop_prob)", ", ".join(not_given)
                )
            modalities = {name: modality for name, modality in modalities.items() if name in known}
        for name in known:
            if not self.gives and settings.mt_condition == "own-head" and not self.modalities[name].has_log_prob:
                raise UserError(
                    f"this model's '{name}' head was never trained, so own-head conditioning has nothing to go by; "
                    "train it with this --mt_task, or use --mt_condition algorithm1"
                )
        if settings.guidance_scale != 1:
            self._check_guidance(known)
        in_frame = [name for name in modalities if not (self.gives and name in known)]
        far = start_warning(self.process, settings, [name for name in modalities if name not in known])
        if far and not self.warned:
            self.warned = True
            log.warning("%s", far)
        return draw(
            _with_classes(self.model, labels),
            visited(self.process, settings, self.config.timestep_respacing, in_frame),
            modalities,
            self.shape,
            seeds,
            settings,
            known=known,
            gives=self.gives,
            device=self.device,
            progress=progress,
        )

    def draw_unconditional(
        self,
        seeds: Sequence[int],
        settings: SamplingOptions,
        labels: Tensor | None = None,
        *,
        noised: tuple[Tensor, float] | None = None,
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """z_0 [B, C, H, W] from the model as it is without any modality.

        noised: (images [B, C, H, W], how far to noise them, 0..1) begins there instead of with noise (SDEdit). cond_fn: as in
        `sampling.sample`. Raises UserError for a model that never saw plain noisy images.
        """
        network, start = self.unconditional(labels), None
        process = visited(self.process, settings, self.config.timestep_respacing)
        if settings.guidance_scale != 1:
            raise UserError("--guidance_scale has no condition to strengthen here; leave it out")
        if noised is not None:
            images, strength = noised
            reached = round(strength * process.original_num_steps) - 1
            first = max(0, int(np.searchsorted(process.timestep_map, reached, side="right")) - 1)
            streams = SampleStreams(torch.as_tensor(seeds), index=Stream.NOISED_START, device=self.device)
            t = torch.full((len(images),), first, device=self.device)
            start = process.q_sample(images, t, streams.normal(*images.shape[1:])), first
        return draw(
            network, process, {}, self.shape, seeds, settings, device=self.device, start=start, cond_fn=cond_fn
        ).x_start

    def _check_guidance(self, known: Mapping[str, Tensor]) -> None:
        """UserError where --guidance_scale has nothing to scale, or no model of the unconditional half."""
        if not known and not self.config.class_cond:
            raise UserError(
                "--guidance_scale needs a condition to strengthen: a class-conditional model, or --given with a trained modality"
            )
        plain = self.model.variant == "X" and sees_plain_noise(self.config) and not self.config.class_cond
        if self.config.mt_drop_prob > 0 or plain:
            return
        if not self.config.class_cond or self.modalities:
            raise UserError(
                "--guidance_scale needs a model that also learned without its condition: train with --mt_drop_prob 0.1"
            )
        log.warning(
            "this model was never trained without classes (--mt_drop_prob), so guidance is away from an untrained mode"
        )

    def unconditional(self, labels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """The model as a plain eps-network (x, t) -> output [B, C or 2C, H, W], for methods that know of no modality.

        Raises UserError for one that never saw plain noisy images: its input always holds the frame or a condition.
        """
        config, model = self.config, self.model
        if not self.modalities:
            return lambda x, t: model(x, t, y=labels).output
        if config.mt_drop_prob > 0:
            return lambda x, t: model(x, t, y=labels, unconditional=True).output
        nothing_given = model.variant == "X" and sees_plain_noise(config)
        without_frame = model.variant == "U" and all(name == "none" for name in weights_names(config).values())
        if nothing_given or without_frame:
            return lambda x, t: model(x, t, y=labels).output
        raise UserError(
            f"this form-{model.variant} model never saw plain noisy images; use one trained with --mt_task none, or with "
            "--mt_drop_prob"
        )


def _with_classes(model: MTModel, labels: Tensor | None) -> Callable:
    """The model with its classes; guidance doubles the batch, and the classes with it."""

    def network(z_t: Tensor, t: Tensor, modalities: Mapping[str, Tensor], **options: Any) -> ModelOutput:
        y = labels if labels is None else labels.repeat(len(z_t) // len(labels))
        return model(z_t, t, modalities, y=y, **options)

    return network


def parse_seeds(text: str, count: int) -> list[int]:
    """'' -> 0..count-1; '0-9,20' -> those. Raises UserError for anything else, or for fewer than `count`."""
    seeds: list[int] = []
    for part in (text or f"0-{count - 1}").split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds '{text}': write '0-99' or '3,5,10-20'")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)[:count]
    if len(seeds) < count:
        raise UserError(f"--seeds '{text}' names {len(seeds)} seeds for {count} samples")
    return seeds[:count]


def output_path(config: Config, default_name: str) -> Path:
    """`--out`, or a file of `default_name` in the run folder that the weights came from."""
    if config.out:
        return Path(config.out)
    return samples_folder(find_weights(config.model_path, config.ema)) / default_name


def samples_folder(weights: Path) -> Path:
    """Where files made with a weights file go: in its run, or beside it."""
    run = weights.parent.parent.parent if weights.parent.parent.name == "checkpoints" else weights.parent
    return run / "samples"
