"""From a trained model to samples: which modalities are known, how each variant is conditioned, which timesteps are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import find_weights, load_weights, read_classes, read_config
from .config import Config, SampleConfig
from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion
from .modalities import Modality
from .model import MTModel
from .samplers import Sample, sample
from .tasks import build_diffusion, build_modalities, build_model


@dataclass
class Generator:
    """A trained model with everything that drawing from it needs."""

    config: Config
    model: MTModel
    modalities: dict[str, Modality]
    classes: list[str] | None

    @classmethod
    def load(cls, config: Config, device: torch.device) -> Generator:
        """The model of `config.model_path`, ready to sample on `device`."""
        weights = find_weights(config.model_path, config.ema)
        model = build_model(config)
        load_weights(model, weights, allow_new=read_config(weights) is None)
        model = model.to(device).to_fast_layout().eval().requires_grad_(False)
        return cls(config, model, build_modalities(config, model), read_classes(weights.parent))

    @property
    def known_classes(self) -> list[str] | None:
        """The class names that data must have: those of training for a class-conditional model, any for others."""
        return self.classes if self.config.class_cond else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.config.image_size, self.config.image_size)

    def diffusion(self, settings: SampleConfig, unknown: bool) -> GaussianDiffusion:
        """The process on the timesteps to visit: even, or for a deterministic sampler and an `unknown` modality denser where its
        frame moves (see `respacing.frame_timesteps`)."""
        respacing = self.config.timestep_respacing
        if not respacing:
            steps = min(settings.steps, self.config.diffusion_steps)
            respacing = f"frame{steps}" if unknown and settings.rule != "ddpm" and steps > 1 else str(steps)
        return build_diffusion(self.config, respacing)

    def draw(
        self,
        seeds: Sequence[int],
        settings: SampleConfig,
        known: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        progress: bool = False,
    ) -> Sample:
        """One sample per seed. In form X a modality that is not known is given as uninformative: the complete mask."""
        known = dict(known or {})
        form_x = self.model.variant == "X"
        for name in known:
            if not form_x and settings.mt_condition == "own-head" and self.modalities[name].variance is None:
                raise UserError(
                    f"this model's '{name}' head was never trained, so own-head conditioning has no variance for it; "
                    "train it with this --mt_task, or use --mt_condition algorithm1"
                )
        if form_x:
            for name, modality in self.modalities.items():
                known.setdefault(name, modality.uninformative(self.shape, len(seeds), self.device))
        unknown = any(name not in known for name in self.modalities)
        return sample(
            partial(self.model, y=labels),
            self.diffusion(settings, unknown),
            self.modalities,
            (len(seeds), *self.shape),
            known=known,
            sampler=settings.rule,
            conditioning="network" if form_x else settings.mt_condition,
            conditioning_scale=settings.mt_condition_scale,
            seeds=seeds,
            clip_denoised=settings.clip_denoised,
            device=self.device,
            progress=progress,
            eta=settings.eta,
        )

    def unconditional(self, labels: Tensor | None = None):
        """The model as a plain eps-network (x, t) -> output [B, C or 2C, H, W], for methods that know of no modality.

        Raises UserError for form U trained without pure generation: its input always holds the frame.
        """
        if (
            self.modalities
            and self.model.variant == "U"
            and self.config.mt_drop_prob == 0
            and self.config.mt_weights != "none"
        ):
            raise UserError(
                "this form-U model never saw plain noisy images; "
                "use one trained with --mt_task none, --mt_variant X or --mt_drop_prob"
            )

        def plain(x: Tensor, t: Tensor) -> Tensor:
            names = self.model.condition_names
            given = {name: self.modalities[name].uninformative(self.shape, len(x), x.device) for name in names}
            return self.model(x, t, given, y=labels).output

        return plain


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
    weights = find_weights(config.model_path, config.ema)
    run = weights.parent.parent.parent if weights.parent.parent.name == "checkpoints" else weights.parent
    return run / "samples" / default_name
