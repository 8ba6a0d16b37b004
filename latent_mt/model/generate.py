"""From a trained latent model to latents: guided_mt's `Generator` on the space of a first stage, and what its heads read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from guided_mt.data.images import make_grid, to_nhwc
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError
from guided_mt.generation.build import bind, build_modalities
from guided_mt.generation.classification import head_estimates, read_timesteps
from guided_mt.generation.compiling import compiled_arithmetic, compiled_encoder, compiled_network
from guided_mt.generation.generate import Generator
from guided_mt.modalities import Images
from guided_mt.modalities.settings import loss_weights
from guided_mt.runs.config import SampleConfig, SamplingOptions, option

from ..data.validation import val_sides
from .conditions import class_condition, reads_text, text_condition
from .latent_diffusion import LatentMTDiffusion

ROUTES = ("generate", "read")
PREVIEW_COUNT, PREVIEW_STEPS = 8, 20
log = logging.getLogger("latent_mt")


@dataclass
class LatentSampleConfig(SampleConfig):
    """Sampling"""

    out: str = option("", "the folder to write to; empty: samples in the run's folder")
    clip_denoised: bool = option(False, "clip the predicted z_0 to [-1, 1]; for a first stage whose latents lie there")


class LatentGenerator(Generator):
    """Draws from a latent model, under its own `conditions` {y, c_concat, c_crossattn} where it is one of latent-diffusion's.

    compiling: see `runs.compiling.compiled`.
    """

    def __init__(
        self,
        model: LatentMTDiffusion,
        conditions: Mapping[str, Any] | None = None,
        classes: list[str] | None = None,
        size: tuple[int, int] | None = None,
        compiling: str = "False",
    ):
        """conditions: {y, c_concat, c_crossattn, c_unconditional}, see `network.DiffusionWrapper`. size: (h, w) of the latents;
        None: as in training. compiling: as --compile."""
        self.latent, self.compiling = model, compiling
        self.size, self.has_unconditional = size or (model.size, model.size), "c_unconditional" in (conditions or {})
        config, network = model.config, compiled_network(model.model, compiling)
        encode, between = compiled_encoder(model.network, compiling), compiled_arithmetic(compiling)
        modalities = build_modalities(config, space=model)
        bind(modalities, config, model.network, encode=encode)
        network = partial(network, **conditions) if conditions else network
        super().__init__(config, model.network, modalities, classes, model, model.diffusion, network, encode, between)

    def under(self, conditions: Mapping[str, Any]) -> LatentGenerator:
        """The same under LDM's `conditions`; {}: itself."""
        return LatentGenerator(self.latent, conditions, self.classes, self.size, self.compiling) if conditions else self

    @property
    def device(self) -> torch.device:
        """The device that it draws on."""
        return self.latent.scale_factor.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a latent, (C, h, w)."""
        return (self.latent.channels, *self.size)

    @override
    def _check_guidance(self, known: Mapping[str, Tensor]) -> None:
        if self.has_unconditional:  # a text model was trained with the empty text, and has it beside the other
            return
        if not (self.latent.classes_told and self.model.has_null_class):
            super()._check_guidance(known)
        elif self.config.mt_drop_prob == 0 and self.modalities:
            raise UserError(
                "--guidance_scale needs a model that also learned without its condition: train with mt_drop_prob 0.1"
            )
        elif self.config.mt_drop_prob == 0:
            log.warning("this model's file says no mt_drop_prob: guidance is away from its null class, trained or not")

    def made_from(
        self,
        known: Mapping[str, Tensor],
        seeds: Sequence[int],
        settings: SamplingOptions,
        respacing: str = "",
        target: str = "",
        absent: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """{side or modality: value} of everything, drawn with those `known` given; see `Generator.draw`.

        respacing: timesteps to visit, as `LatentMTDiffusion.respaced`. Raises UserError for what the model was not trained for.
        """
        process = self.latent.respaced(respacing, settings.rule) if respacing else None
        drawn = self.draw(seeds, settings, known, target=target, absent=absent, process=process)
        return {self.roles.sides[self.role_for(list(known), target, absent)]: drawn.x_start, **drawn.modalities}

    # ------------------------------------------------------------ what heads say at little noise

    def reads(self, target: str, source: str) -> bool:
        """Whether the model has a head that was trained to read the side `target` off the side `source`."""
        return self._why_not(target, source) == ""

    def _why_not(self, target: str, source: str) -> str:
        """Why it has not; '' where it has."""
        role, config = self.roles.role_of(source), self.config
        name = self.slots(role).get(target, target)
        if self.model.variant == "X":
            return "the head of a form-X model was always given what it is to predict"
        if role not in self.roles.trained:
            return f"z_0 was never {source} in this model's training ({self.roles.setting})"
        if loss_weights(config)[name] == 0 or (self.model.variant == "any" and config.mt_given_prob == 1):
            settings = f"mt_loss_weight {loss_weights(config)[name]:g}, mt_given_prob {config.mt_given_prob:g}"
            return f"this model's head was never trained ({settings})"
        return ""

    def check(self, route: str, target: str, source: str) -> None:
        """Raises UserError where the model wasn't trained to make the side `target` of the side `source` by this one of ROUTES."""
        why = self._why_not(target, source)
        if route == "generate":
            if self.roles.role_of(target) not in self.roles.trained:
                instead = "read its head instead (--route read), or " if not why else ""
                raise UserError(
                    f"this model was not trained to generate {target} from {source} ({self.roles.setting}); "
                    f"{instead}train with mt_swap_prob 0.5"
                )
        elif why:
            raise UserError(
                f"{why}; {'use --route generate' if self.roles.role_of(target) in self.roles.trained else 'give the other side'}"
            )

    def read(
        self, target: str, source: str, latents: Tensor, seeds: Sequence[int], timesteps: str = "", draws: int = 1
    ) -> Tensor:
        """The latents [B, C, h, w] of the side `target` as the head reads them off those of `source`, which are z_0 at little
        noise, averaged over `timesteps` (see `classification.read_timesteps`) and noise `draws`.

        Raises UserError for a head that was always told or never trained, and where z_0 was never that side.
        """
        self.check("read", target, source)
        role, diffusion = self.roles.role_of(source), self.process
        chosen = read_timesteps(timesteps, diffusion.num_timesteps, diffusion.aggregation)
        streams = SampleStreams(torch.as_tensor(seeds), index=Stream.INPUT, device=self.device)
        name = self.slots(role)[target]
        network = self.network_in(role)
        return head_estimates(network, diffusion, self.modalities, latents, chosen, draws, streams, name=name)


def preview_grid(model: LatentMTDiffusion, data: Any) -> np.ndarray | None:
    """uint8 [H, W, 3], one column per validation image: the sides, what is generated of each from the others, the images of
    each other modality given alone, after its picture, then everything from nothing. Of a plain LDM samples alone; a text model
    is told the empty text, and one of classes a class at random."""
    if model.conditioning_key is not None and not model.modality_names:
        return None  # a plain LDM that can't be sampled without a condition
    conditions = text_condition(model, [""], "", guided=False) if reads_text(model) else {}
    generator = LatentGenerator(model, conditions)
    settings = LatentSampleConfig(steps=PREVIEW_STEPS)
    rows: list[Tensor] = []
    images: list[Tensor] = []
    roles, form_x = generator.roles, model.network.variant == "X"
    names = {name for name in model.modality_names if name not in roles.slots}
    if model.modality_names:
        images, labels = val_sides(data, PREVIEW_COUNT)
        images = [side.to(generator.device) for side in images]
    seeds = range(len(images[0]) if images else PREVIEW_COUNT)
    if model.conditioning_key is None and model.classes_told:
        generator = generator.under(class_condition(model, seeds, -1))
    if images:
        rows += images
        z = dict(zip(roles.sides, (model.encode(side) for side in images), strict=False))
        batch = Images(next(iter(z.values())), None if labels is None else labels.to(generator.device), image=images[0])
        for role in reversed(roles.trained) if roles.slots else ():
            others = {side: value for side, value in z.items() if side != roles.sides[role]}
            rows.append(model.decode(generator.draw(seeds, settings, others).x_start))
        for name in sorted(names):
            modality = generator.modalities[name]
            if modality.loads or (modality.is_class and (labels is None or bool((labels < 0).any()))):
                continue
            streams = SampleStreams(torch.tensor(seeds), index=Stream.PREVIEW, device=generator.device)
            x = modality.from_batch(batch, streams)
            others = (
                {side: value for side, value in z.items() if side != roles.sides[0]} if form_x and roles.slots else {}
            )
            picture = modality.picture(x)
            rows += [] if picture is None else [picture]
            rows.append(model.decode(generator.draw(seeds, settings, {name: x, **others}).x_start))
    if (model.conditioning_key is None or conditions) and not (roles.slots and form_x):
        made = generator.made_from({}, seeds, settings)
        rows += [model.decode(made[side]) for side in roles.sides]
    return make_grid(to_nhwc(torch.cat(rows)), columns=len(seeds)) if rows else None
