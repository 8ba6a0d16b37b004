"""From a trained model to samples: which modalities are known, how each variant is conditioned, which timesteps are kept."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.network import ModelOutput
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams, Stream
from ..diffusion.sampling import Sample
from ..errors import UserError, nearest
from ..modalities import ImageModality, Modality, Pixels, Space
from ..modalities.registry import mask_patch
from ..modalities.settings import roles_of, weights_names
from ..networks.multi_task import MultiTask
from ..runs.checkpoint import Weights, find_weights, load_weights
from ..runs.config import Config, SamplingOptions
from .build import bind, build_modalities, build_model, needs_labels, sees_plain_noise, trained_process
from .compiling import compiled_arithmetic, compiled_encoder, compiled_network
from .drawing import draw, start_warning, visited

log = logging.getLogger("guided_mt")


@dataclass
class Generator:
    """A trained model with everything that drawing from it needs, in pixels or in latents.

    config: of the model; classes: the names of its classes, where it had some. space: Z, None for pixels. process: on all
    timesteps of training, None for that of `config`. network: the model as it is called, `model` itself unless it stands in
    something else or is compiled; encode: likewise its `encode_modality`; arithmetic: see `sampling.sample`.
    """

    config: Config
    model: MultiTask
    modalities: dict[str, Modality]
    classes: list[str] | None
    space: Space = None  # type: ignore[assignment]  # filled in below, as the next two
    process: GaussianDiffusion = None  # type: ignore[assignment]
    network: Callable[..., ModelOutput] = None  # type: ignore[assignment]
    encode: Callable[[str, Tensor], Tensor] | None = None
    arithmetic: Callable[[Callable], Callable] | None = None
    warned: bool = False

    def __post_init__(self) -> None:
        self.space = Pixels(self.config.image_size) if self.space is None else self.space
        self.process = trained_process(self.config) if self.process is None else self.process
        self.network = self.model if self.network is None else self.network
        self.roles, self._role = roles_of(self.config), 0
        for modality in self.modalities.values():
            if self.classes:
                modality.use_classes(self.classes)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> Generator:
        """The model of `config.model_path`, ready to sample on `device`."""
        weights = Weights.find(config.model_path, config.ema)
        modalities = build_modalities(config)
        model = build_model(config, modalities)
        load_weights(model, weights.file, allow_new=weights.settings is None, averaged=config.ema != "none")
        model = model.to(device).to_fast_layout().eval().requires_grad_(False)
        how = config.compile if "compile" in config.typed else "False"  # else it says how the model was trained
        network, encode = compiled_network(model, how), compiled_encoder(model, how)
        bind(modalities, config, model, encode=encode)
        between = compiled_arithmetic(how)
        return cls(config, model, modalities, weights.classes, network=network, encode=encode, arithmetic=between)

    @property
    def known_classes(self) -> list[str] | None:
        """The class names that data must have: those of training where the model knows of classes, any where not."""
        return self.classes if needs_labels(self.config) else None

    @property
    def timestep_respacing(self) -> str:
        """The timesteps that were asked for, '' where the steps of a request decide."""
        return getattr(self.config, "timestep_respacing", "")

    @property
    def device(self) -> torch.device:
        """The device that it draws on."""
        return next(self.model.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an element of Z."""
        return (self.space.channels, self.space.size, self.space.size)

    @property
    def mask_patch(self) -> int:
        """The side of a masked patch in pixels, as in training; for a model without masked images what `--mask_patch` says."""
        masks = [modality.patch for modality in self.modalities.values() if modality.is_mask]  # type: ignore[attr-defined]
        return masks[0] if masks else mask_patch(getattr(self.config, "mask_patch", -1), self.config.image_size)

    @property
    def gives(self) -> bool:
        """Whether a known modality is given to the network (forms X and any) or stands in the frame (U)."""
        return self.model.variant != "U"

    # ------------------------------------------------------------ sides and roles

    def modality_of(self, name: str) -> Modality:
        """What reads and shows the modality or side `name`, whatever the role. Raises KeyError for another name."""
        slots = self.slots(0)
        if name in slots or name in self.modalities:
            return self.modalities[slots.get(name, name)]
        if name != self.roles.sides[0] or not self.roles.slots:
            raise KeyError(name)
        image = ImageModality(name)
        image.use_space(self.space)
        return image

    @property
    def names(self) -> list[str]:
        """What can be given: the sides where there are several, and the other modalities."""
        return [*(self.roles.sides[:1] if self.roles.slots else ()), *self.slots(0)]

    def slots(self, role: int) -> dict[str, str]:
        """{what the user calls it: modality} in this role: a modality by its name, a side by that of the image."""
        return {self.roles.names(role).get(name, name): name for name in self.modalities}

    def role_for(self, known: Collection[str], target: str = "", absent: Collection[str] = ()) -> int:
        """The role to draw in, with the sides and modalities `known` and without those `absent`: that in which `target` is z_0,
        or the first of training in which z_0 is neither. Raises UserError where there is none."""
        sides, trained = self.roles.sides, self.roles.trained
        if target and target not in sides:
            raise UserError(f"'{target}' is no image of this model{nearest(target, sides)}; it has {', '.join(sides)}")
        for name in absent:
            if name in known or name == target:
                raise UserError(f"'{name}' is to be absent, so it can't be {'given' if name in known else 'drawn'}")
        if target in known:
            raise UserError(f"'{target}' is given, so it can't be drawn")
        wanted = [role for role, side in enumerate(sides) if side not in known and side not in absent]
        if not wanted:
            taken = "given" if not absent else "given or absent"
            raise UserError(f"nothing is left to draw: {', '.join(sides)} are all {taken}; leave one of them out")
        wanted = [self.roles.role_of(target)] if target else wanted
        possible = [role for role in wanted if role in trained]
        if possible:
            return possible[0]
        raise UserError(
            f"this model was not trained to generate {', '.join(sides[role] for role in wanted)} from "
            f"{', '.join(known) or 'nothing'}: z_0 was always {', '.join(sides[role] for role in trained)} "
            f"({self.roles.setting})"
        )

    def _take_role(self, role: int) -> None:
        """Heads' variances differ between roles."""
        if role != self._role:
            bind(self.modalities, self.config, self.model, role, self.encode)
            self._role = role

    def network_in(self, role: int, labels: Tensor | None = None) -> Callable[..., ModelOutput]:
        """The network with its classes: `labels` [B], or the role where it is told one."""
        if self.roles.told:
            labels = torch.full((1,), role, device=self.device)
        return _with_classes(self.network, labels)

    # ------------------------------------------------------------ drawing

    def draw(
        self,
        seeds: Sequence[int],
        settings: SamplingOptions,
        known: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        progress: bool = False,
        *,
        target: str = "",
        absent: Collection[str] = (),
        process: GaussianDiffusion | None = None,
    ) -> Sample:
        """One sample per seed; known {modality or side: x}, labels [B] for a class-conditional model. In form X a modality that is
        not known takes its default (a label at random) or none (the complete mask), and the sample doesn't tell it.

        target: the side that is z_0 (see `role_for`); the sample's `modalities` hold the others, by the names of the sides. absent:
        what the samples have none of. process: on the timesteps to visit, instead of those that the settings say. Raises UserError
        for what this model was not trained for.
        """
        role = self.role_for(list(known or {}), target, absent)
        self._take_role(role)
        slots = self.slots(role)
        known = {slots.get(name, name): x for name, x in (known or {}).items()}
        absent = [slots.get(name, name) for name in absent]
        modalities = self.modalities
        if self.model.variant == "X":
            left_open = [name for name in modalities if name not in known and name not in absent]
            streams = SampleStreams(torch.as_tensor(seeds), index=Stream.DEFAULTS, device=self.device)
            defaults = {name: modalities[name].default(streams) for name in left_open}
            known |= {name: x for name, x in defaults.items() if x is not None}
            drawn = [name for name, x in defaults.items() if x is not None]
            if drawn and known.keys() - set(drawn) and not self.warned:
                self.warned = True
                log.warning("not given, so drawn at random for each sample: %s (form X is given all)", ", ".join(drawn))
            sides = [name for name in left_open if name in self.roles.slots and self.config.mt_drop_prob == 0]
            if sides:
                names = self.roles.names(role)
                raise UserError(
                    f"this form-X model was always given {', '.join(names[name] for name in sides)}: name it with --given, or "
                    "train mt_variant any or U"
                )
            not_given = [name for name in left_open if name not in known and name in self.model.context_in]
            if not_given and self.config.mt_drop_prob == 0 and not self.warned:
                self.warned = True
                log.warning(
                    "this form-X model was always given %s in training (no --mt_drop_prob)", ", ".join(not_given)
                )
            modalities = {name: m for name, m in modalities.items() if name in known or name in absent}
        for name in known:
            if not self.gives and settings.mt_condition == "own-head" and not self.modalities[name].has_log_prob:
                raise UserError(
                    f"this model's '{name}' head was never trained, so own-head conditioning has nothing to go by; "
                    "train it with this --mt_task, or use --mt_condition algorithm1"
                )
        if settings.guidance_scale != 1:
            self._check_guidance(known)
        in_frame = [name for name in modalities if not (self.gives and name in known) and name not in absent]
        far = start_warning(self.process, settings, [name for name in in_frame if name not in known])
        if far and not self.warned:
            self.warned = True
            log.warning("%s", far)
        drawn_sample = draw(
            self.network_in(role, labels),
            process or visited(self.process, settings, self.timestep_respacing, in_frame),
            modalities,
            self.shape,
            seeds,
            settings,
            known=known,
            gives=self.gives,
            device=self.device,
            progress=progress,
            absent=absent,
            arithmetic=self.arithmetic,
        )
        if not self.roles.slots:
            return drawn_sample
        names = self.roles.names(role)
        return Sample(drawn_sample.x_start, {names.get(n, n): x for n, x in drawn_sample.modalities.items()})

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
        process = visited(self.process, settings, self.timestep_respacing)
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
            network,
            process,
            {},
            self.shape,
            seeds,
            settings,
            device=self.device,
            start=start,
            cond_fn=cond_fn,
            arithmetic=self.arithmetic,
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
        network = self.network_in(0, labels)
        if self.modalities and config.mt_drop_prob > 0:
            return lambda x, t: network(x, t, {}, unconditional=True).output
        nothing_given = model.variant == "X" and sees_plain_noise(config)
        without_frame = model.variant == "U" and all(name == "none" for name in weights_names(config).values())
        if not self.modalities or nothing_given or without_frame:
            return lambda x, t: network(x, t, {}).output
        raise UserError(
            f"this form-{model.variant} model never saw plain noisy images; use one trained with --mt_task none, or with "
            "--mt_drop_prob"
        )


def _with_classes(model: Callable[..., ModelOutput], labels: Tensor | None) -> Callable[..., ModelOutput]:
    """The model with its classes; guidance doubles the batch, and the classes with it."""

    def network(z_t: Tensor, t: Tensor, modalities: Mapping[str, Tensor], **options: Any) -> ModelOutput:
        if labels is not None:
            options["y"] = labels.repeat(len(z_t) // len(labels))
        return model(z_t, t, modalities, **options)

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


def adm_path(config: Config, default_name: str, adm_name: str = "") -> Path:
    """`output_path` of a command that ADM has too: where $OPENAI_LOGDIR is set, it is there and has ADM's name."""
    folder = os.environ.get("OPENAI_LOGDIR")
    if folder and not config.out:
        return Path(folder) / (adm_name or default_name)
    return output_path(config, default_name)


def samples_folder(weights: Path) -> Path:
    """Where files made with a weights file go: in its run, or beside it."""
    run = weights.parent.parent.parent if weights.parent.parent.name == "checkpoints" else weights.parent
    return run / "samples"
