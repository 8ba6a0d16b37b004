"""From a trained latent model to images: translation by generation, translation by reading the head, and pairs from nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_mt.data.images import make_grid, to_nhwc
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError, nearest
from guided_mt.generation.classification import head_estimates, read_timesteps
from guided_mt.generation.drawing import draw, visited
from guided_mt.runs.config import SampleConfig, SamplingOptions, option

from ..data.validation import val_sides
from .latent_diffusion import LatentMTDiffusion
from .modalities import PAIRED

ROUTES = ("generate", "read")
PREVIEW_COUNT, PREVIEW_STEPS = 8, 20


@dataclass
class LatentSampleConfig(SampleConfig):
    """Sampling"""

    out: str = option("", "the folder to write to; empty: samples in the run's folder")
    clip_denoised: bool = option(False, "clip the predicted z_0 to [-1, 1]; for a first stage whose latents lie there")


@dataclass
class LatentGenerator:
    """Draws from a model. In role 0 the first side is z_0 and the second the modality; in role 1 it is the other way round."""

    model: LatentMTDiffusion

    @property
    def device(self) -> torch.device:
        return self.model.scale_factor.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a latent, (C, h, w)."""
        return (self.model.channels, self.model.image_size, self.model.image_size)

    @property
    def roles(self) -> tuple[int, ...]:
        """Those that the model was trained in."""
        if self.model.both_roles:
            return (0, 1)
        return (1,) if self.model.swap_prob == 1 else (0,)

    def side(self, name: str) -> int:
        """0 or 1. Raises UserError for a name that is no side of this model."""
        sides = self.model.sides
        if not sides:
            raise UserError(f"'{name}' can't be given: this model knows of single images only (no mt_sides)")
        if name not in sides:
            raise UserError(f"'{name}' is no side of this model{nearest(name, sides)}; it has {' and '.join(sides)}")
        return sides.index(name)

    def generates(self, source: int) -> bool:
        """Whether the model was trained to generate the other side from side `source`."""
        return 1 - source in self.roles

    def reads(self, source: int) -> bool:
        """Whether the model has a head that was trained to read the other side off side `source`."""
        return source in self.roles and self.model.network.variant != "X" and self._head_trained

    @property
    def _head_trained(self) -> bool:
        always_given = self.model.network.variant == "any" and self.model.given_prob == 1
        return self.model.loss_weight > 0 and not always_given

    def check(self, route: str, source: int) -> None:
        """Raises UserError where the model wasn't trained to make the other side of `source` by this one of ROUTES."""
        generates, reads = self.generates(source), self.reads(source)
        if {"generate": generates, "read": reads}[route]:
            return
        swap = f"(mt_swap_prob {self.model.swap_prob:g})"
        if route == "generate":
            made, given = self.model.sides[1 - source], self.model.sides[source]
            instead = "read its head instead (--route read), or " if reads else ""
            raise UserError(
                f"this model was not trained to generate {made} from {given} {swap}; {instead}train with mt_swap_prob 0.5"
            )
        why = f"z_0 was never {self.model.sides[source]} in this model's training {swap}"
        if self.model.network.variant == "X":
            why = "the head of a form-X model was always given what it is to predict"
        elif not self._head_trained:
            settings = f"mt_loss_weight {self.model.loss_weight:g}, mt_given_prob {self.model.given_prob:g}"
            why = f"this model's head was never trained ({settings})"
        raise UserError(f"{why}; {'use --route generate' if generates else 'give the other side'}")

    def network(self, role: int, conditions: Mapping[str, Any] | None = None) -> Callable:
        """(z_t, t, modalities, ...) -> ModelOutput with z_0 in this role."""
        model, both, conditions = self.model.model, self.model.both_roles, dict(conditions or {})
        classes = conditions.pop("y", None)

        def run(z_t: Tensor, t: Tensor, modalities: Mapping[str, Tensor], **options: Any) -> ModelOutput:
            if both:
                options["y"] = torch.full((len(z_t),), role, device=z_t.device)
            elif classes is not None:
                options["y"] = classes.repeat(len(z_t) // len(classes))  # guidance doubles the batch
            return model(z_t, t, modalities, **options, **conditions)

        return run

    def translate(
        self, source: int, latents: Tensor, seeds: Sequence[int], settings: SamplingOptions, respacing: str = ""
    ) -> Tensor:
        """The other side's latents [B, C, h, w], generated with those of side `source` given; one seed per sample.

        Raises UserError where the model was not trained to generate that side.
        """
        self.check("generate", source)
        return self._sample(1 - source, {PAIRED: latents}, seeds, settings, respacing)[0]

    def pairs(
        self,
        seeds: Sequence[int],
        settings: SamplingOptions,
        respacing: str = "",
        conditions: Mapping[str, Any] | None = None,
    ) -> list[Tensor]:
        """Latents drawn from nothing: of both sides, or of the single image of a plain LDM under its `conditions`.

        Raises UserError for form X, which is always given a side.
        """
        if self.model.sides and self.model.network.variant == "X":
            raise UserError(
                "this form-X model was always given one side; name it with --given, or train mt_variant any or U"
            )
        role = self.roles[0]
        z, other = self._sample(role, {}, seeds, settings, respacing, conditions)
        if other is None:
            return [z]
        return [z, other] if role == 0 else [other, z]

    def _sample(
        self,
        role: int,
        known: Mapping[str, Tensor],
        seeds: Sequence[int],
        settings: SamplingOptions,
        respacing: str,
        conditions: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        modalities = self.model.modalities(role)
        variant = self.model.network.variant
        own_head = variant == "U" and settings.mt_condition == "own-head"
        if known and own_head and not modalities[PAIRED].has_log_prob:
            raise UserError("this model's head was never trained, so own-head conditioning has nothing to go by")
        if settings.guidance_scale != 1 and self.model.drop_prob == 0:
            raise UserError(
                "--guidance_scale needs a model that also learned without its condition: train with mt_drop_prob 0.1"
            )
        in_frame = [name for name in modalities if variant == "U" or name not in known]
        process = self.model.respaced(respacing) if respacing else visited(self.model.diffusion, settings, "", in_frame)
        drawn = draw(
            self.network(role, conditions),
            process,
            modalities,
            self.shape,
            seeds,
            settings,
            known=known,
            gives=variant != "U",
            device=self.device,
        )
        return drawn.x_start, drawn.modalities.get(PAIRED)

    def read(self, source: int, latents: Tensor, seeds: Sequence[int], timesteps: str = "", draws: int = 1) -> Tensor:
        """The other side's latents [B, C, h, w] as the head reads them off the latents of side `source`, which are z_0 at little
        noise, averaged over `timesteps` (see `classification.read_timesteps`) and noise `draws`.

        Raises UserError for a head that was always told or never trained, and where z_0 was never that side.
        """
        self.check("read", source)
        diffusion = self.model.respaced()
        chosen = read_timesteps(timesteps, diffusion.num_timesteps, diffusion.aggregation)
        streams = SampleStreams(torch.as_tensor(seeds), index=Stream.INPUT, device=self.device)
        return head_estimates(
            self.network(source), diffusion, self.model.modalities(), latents, chosen, draws, streams, name=PAIRED
        )


def preview_grid(model: LatentMTDiffusion, data: Any) -> np.ndarray | None:
    """uint8 [H, W, 3], one column per validation image: the sides, what is generated of each from the other, then pairs from
    nothing; of a plain LDM samples alone."""
    generator, settings, seeds = LatentGenerator(model), LatentSampleConfig(steps=PREVIEW_STEPS), range(PREVIEW_COUNT)
    rows: list[Tensor] = []
    if model.sides:
        images = [side.to(generator.device) for side in val_sides(data, PREVIEW_COUNT)]
        seeds = range(len(images[0]))
        rows += images
        for role in reversed(generator.roles):
            source = 1 - role
            z = generator.translate(source, model.encode_images(images[source]), seeds, settings)
            rows.append(model.decode_latents(z))
    if model.conditioning_key is None and not (model.sides and model.network.variant == "X"):
        rows += [model.decode_latents(z) for z in generator.pairs(seeds, settings)]
    if not rows:
        return None  # a plain LDM that can't be sampled without a condition
    return make_grid(to_nhwc(torch.cat(rows)), columns=len(seeds))
