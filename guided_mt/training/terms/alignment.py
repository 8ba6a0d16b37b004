"""Alignment as a term of the loss: which frozen encoder, what of it a run keeps, and the projector, which is trained beside the
model and is no part of it (`networks.alignment` has the formulas)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError, nearest
from ...generation.noisy_classifier import load_classifier
from ...modalities.weighting.over_tasks import parameter_group
from ...networks.alignment import ALIGNMENTS, FeatureEncoder, efficientnet, misalignment
from ...networks.inputs import autocast
from ...networks.multi_task import MultiTask
from ...runs.config import Config

ALIGN = "align"  # the term's name: a column of the log


def _of_classifier(path: str, config: Config) -> FeatureEncoder:
    """The middle features of a noisy classifier at timestep 0, where images have next to no noise. Raises UserError for one of
    images of another size."""
    found = load_classifier(path, defaults={"image_size": config.image_size}, flag="--align_encoder classifier:")
    if found.config.image_size != config.image_size:
        raise UserError(
            f"--align_encoder classifier:{path}: it is of images of {found.config.image_size} pixels, and --image_size is "
            f"{config.image_size}; take one of that size"
        )
    model = found.model
    model.set_precision(config.precision)

    def features(images: Tensor) -> Tensor:
        embedding = model.embed(images.new_zeros(len(images)), None)
        with model.autocast(images):
            return model.encode(images, embedding, None, None)[-1]

    return FeatureEncoder("classifier", model, features)


def _of_efficientnet(path: str, config: Config) -> FeatureEncoder:
    if path:
        raise UserError(f"--align_encoder efficientnet:{path}: its weights are those of the package; leave out :{path}")
    return efficientnet(config.precision)


# {what stands before the colon of --align_encoder: (what stands behind it, configuration) -> the encoder}
ENCODERS: dict[str, Callable[[str, Config], FeatureEncoder]] = {
    "classifier": _of_classifier,
    "efficientnet": _of_efficientnet,
}


def check_alignment(config: Config) -> None:
    """Raises UserError for an alignment without an encoder, and with one that isn't known."""
    if ALIGNMENTS[config.align] is None:
        return
    kind, _, path = config.align_encoder.partition(":")
    if not kind:
        raise UserError(
            f"--align {config.align} needs --align_encoder: classifier:RUN_OR_FILE, or efficientnet; or take --align none"
        )
    if kind not in ENCODERS:
        raise UserError(f"--align_encoder: '{kind}' is none of {', '.join(ENCODERS)}{nearest(kind, ENCODERS)}")
    if kind == "classifier" and not path:
        raise UserError(
            "--align_encoder classifier: which? Write classifier:RUN_OR_FILE, of a run of classifier_train.py"
        )


class Alignment(nn.Module):
    """(middle features [B, C, h, w], clean images [B, 3, H, W]) -> the term of the loss [B], for a row of ALIGNMENTS.

    It holds the projector alone: the encoder has no gradient, is in no state dict, and no wrapper of processes sees it. weight: of
    the term in the loss. gamma: see `spatially_normalised`. precision: the projector's arithmetic. Raises UserError where the
    encoder's map has too few positions.
    """

    def __init__(
        self,
        name: str,
        encoder: FeatureEncoder,
        middle_channels: int,
        image_size: int,
        *,
        weight: float = 0.5,
        gamma: float = 1.0,
        width: int = 2048,
        precision: str = "fp32",
    ):
        super().__init__()
        row = ALIGNMENTS[name]
        if row is None:
            raise ValueError(f"--align {name} aligns nothing")
        self.row, self.encoder, self.weight, self.gamma = row, encoder, weight, gamma
        self.precision = precision
        shape = encoder(torch.zeros(1, 3, image_size, image_size)).shape
        if shape[2] * shape[3] < row.least_positions:
            raise UserError(
                f"--align {name} needs a map of at least {row.least_positions} positions, and that of {encoder.name} for images of "
                f"{image_size} pixels has {shape[2] * shape[3]}; take --align repa"
            )
        self.projector = row.projector(middle_channels, width, shape[1])

    @classmethod
    def of(cls, config: Config, model: MultiTask) -> Alignment | None:
        """That of a configuration; None where nothing is aligned. Its initial weights follow the run's seed and take no number
        from anything else. Raises UserError where the encoder can't be had."""
        if ALIGNMENTS[config.align] is None:
            return None
        check_alignment(config)
        kind, _, path = config.align_encoder.partition(":")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return cls(
                config.align,
                ENCODERS[kind](path, config),
                model.middle_channels,
                config.image_size,
                weight=config.align_weight,
                gamma=config.align_gamma,
                width=config.align_width,
                precision=config.precision,
            )

    def on(self, device: torch.device) -> Alignment:
        """Itself, with the projector and the encoder on the device."""
        self.encoder.to(device)
        return self.to(device)

    def forward(self, middle: Tensor, images: Tensor) -> Tensor:
        """The term [B], float32."""
        with torch.no_grad():
            target = self.row.target(self.encoder(images), self.gamma)
        with autocast(middle, self.precision):
            projected = self.projector(middle)
        return misalignment(projected.float(), target)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The projector as a group of an optimiser, with the run's learning rate."""
        return parameter_group(self, None)

    def saved(self) -> dict[str, Any]:
        """What a resumed run has to find again."""
        return {"encoder": self.encoder.name, "digest": self.encoder.digest, "projector": self.state_dict()}

    def load_saved(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `saved`. Raises UserError where the run was aligned with another encoder."""
        if state["digest"] != self.encoder.digest:
            raise UserError(
                f"the run was aligned with other weights ({state['encoder']} {state['digest'][:12]}) than those of --align_encoder "
                f"({self.encoder.name} {self.encoder.digest[:12]}); name those"
            )
        self.load_state_dict(state["projector"])
