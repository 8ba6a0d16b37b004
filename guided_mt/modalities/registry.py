"""The registry of modalities: a row of TASKS brings a modality's own flags (a dataclass), its class and its head.

Command line, training, sampling, checkpoints and tests take it from here; what a whole configuration means is built in
`generation.build`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from ..diffusion.aggregation import WEIGHTS
from ..diffusion.process import GaussianDiffusion
from ..errors import UserError, nearest
from ..networks.backbone import Backbone
from ..networks.classifier import create_classifier
from ..networks.heads import ClassifierHead, ImageHead, PooledHead, PooledMLPHead
from ..networks.model import BACKBONES, VARIANTS
from ..runs.config import (
    ClassifierConfig,
    Config,
    option,
)
from . import LabelModality, MaskedImage, Modality, RandomLabel, VectorModality
from .names import check_name
from .tokens import ENCODING_NORMS, LabelTokens, VectorTokens
from .vector import read_vectors


@dataclass
class MaskConfig:
    """Masked images (--mt_task masked)"""

    mask_patch: int = option(-1, "side of a masked patch in pixels; -1: image_size / 4", least=1, free=True)
    mask_max_patches: int = option(10, "most patches per image; their number is uniform in 0..this", least=0, free=True)
    mask_full_prob: float = option(
        0.1, "share of samples trained with the complete mask; 0 is the paper", least=0, most=1, free=True
    )


@dataclass
class LabelConfig(ClassifierConfig):
    """Labels (--mt_task label, random-label; num_classes is their number). The classifier flags are those of head E"""

    mt_label_head: str = option(
        "M", "M: pooled middle block, one linear layer; E: ADM's classifier on x_start", ("M", "E")
    )


@dataclass
class RepresentationConfig:
    """Vectors (--mt_task representation)"""

    representation_file: str = option(
        "", ".npz or .npy with one vector per image [N, D], in the order of the images", free=True
    )
    representation_size: int = option(-1, "D; -1: that of the file", least=1)


@dataclass(frozen=True)
class Task:
    """A modality's flags, and how to build it and its head from a configuration.

    modality(config, variance): variance is that of its head, None until it is known (`Modality.use_variance`).
    head(config, backbone, process): the process is the one on all timesteps. tokens(config, width): the module that
    turns x into tokens, for a modality without pixels. needs_labels: whether the images must have classes. complete(config): fills
    in what its flags leave open. sees_plain_noise(config): whether form X, when it is given this modality, is at times trained with
    nothing in its place, a zero image, so that it is a model of plain noisy images too. file_options: flags that name files,
    which may have moved when a run goes on.
    """

    options: type
    modality: Callable[[Config, Tensor | None], Modality]
    head: Callable[[Config, Backbone, GaussianDiffusion], nn.Module]
    tokens: Callable[[Config, int], nn.Module] | None = None
    needs_labels: bool = False
    complete: Callable[[Config], None] | None = None
    sees_plain_noise: Callable[[Config], bool] = lambda config: False
    file_options: tuple[str, ...] = ()


def mask_patch(config: Config) -> int:
    """The side of a masked patch in pixels: a quarter of the image (16 at the paper's 64) unless given."""
    return config.mask_patch if config.mask_patch > 0 else max(1, config.image_size // 4)


def _masked_image(config: Config, variance: Tensor | None) -> Modality:
    return MaskedImage(
        patch=mask_patch(config),
        max_patches=config.mask_max_patches,
        full_prob=config.mask_full_prob,
        variance=variance,
    )


def _label(config: Config, variance: Tensor | None) -> Modality:
    return _with_head(config, LabelModality(config.num_classes, config.mt_encoder_refresh))


def _random_label(config: Config, variance: Tensor | None) -> Modality:
    return _with_head(config, RandomLabel(config.num_classes, config.mt_encoder_refresh, name="random-label"))


def _with_head(config: Config, modality: LabelModality) -> LabelModality:
    modality.has_log_prob = loss_weights(config)[modality.name] > 0 and config.mt_drop_prob < 1
    return modality


def _label_head(config: Config, backbone: Backbone, process: GaussianDiffusion) -> nn.Module:
    if config.mt_label_head == "M":
        return PooledHead(backbone, config.num_classes)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClassifierConfig)}
    classifier = create_classifier(config.image_size, **options, num_classes=config.num_classes)
    if not config.classifier_use_fp16:
        classifier.precision = config.precision
    return ClassifierHead(classifier, process)


def _label_tokens(config: Config, width: int) -> nn.Module:
    return LabelTokens(config.num_classes, width)


def _representation(config: Config, variance: Tensor | None) -> Modality:
    return VectorModality("representation", config.representation_size, config.representation_file, variance)


def _representation_size(config: Config) -> None:
    if not config.representation_file:
        raise UserError("--representation_file is missing: the vectors that --mt_task representation is trained on")
    size = config.representation_size if config.representation_size > 0 else None
    file = config.representation_file
    found = read_vectors(file, "representation", size, f"--representation_file {file}")
    config[RepresentationConfig].representation_size = found.shape[1]


TASKS: dict[str, Task] = {
    "masked": Task(
        MaskConfig,
        _masked_image,
        lambda config, backbone, process: ImageHead(backbone),
        sees_plain_noise=lambda config: config.mask_full_prob > 0,
    ),
    "label": Task(LabelConfig, _label, _label_head, _label_tokens, needs_labels=True),
    "random-label": Task(LabelConfig, _random_label, _label_head, _label_tokens),
    "representation": Task(
        RepresentationConfig,
        _representation,
        lambda config, backbone, process: PooledMLPHead(backbone, config.representation_size),
        lambda config, width: VectorTokens(config.representation_size, width),
        complete=_representation_size,
        file_options=("representation_file",),
    ),
}


@dataclass
class MTConfig:
    """Multi-modal diffusion"""

    mt_task: str = option("none", "what is modelled with the image: none, or some, as in masked,label", names=TASKS)
    mt_backbone: str = option("unet", "the network that all of it is built on", BACKBONES)
    mt_variant: str = option(
        "auto",
        "U: the network sees z_t; X: it is also given the modalities; any: a random subset of them; auto: X for images, "
        "U where a modality is no image",
        ("auto", *VARIANTS),
    )
    mt_weights: str = option("paper", "aggregation weights w_t, or one each: masked=paper,label=bridge", names=WEIGHTS)
    mt_loss_weight: str = option(
        "0.1", "lambda of eq. 6, or one each: masked=0.1,label=0.05; 0 trains the purely conditional twin"
    )
    mt_drop_prob: float = option(
        0.0, "share of samples trained unconditionally, with no modality and no class", least=0, most=1
    )
    mt_given_prob: float = option(0.5, "variant any: how often a modality is given to the network", least=0, most=1)
    mt_encoding_norm: str = option("none", "rms: rescale the network's own encodings E(x) to RMS 1", ENCODING_NORMS)
    mt_encoder_refresh: int = option(
        1, "steps between encoding all classes anew; 1: exact, with the weights of each step", least=1, free=True
    )
    mt_context_dim: int = option(-1, "width of the tokens of labels and vectors; -1: 4 num_channels", least=1)
    mt_conflict_interval: int = option(
        0,
        "steps between measuring the tasks' gradients on the backbone, and their cosines; 0: never",
        least=0,
        free=True,
    )


def split_names(mt_task: str) -> list[str]:
    """The words of `--mt_task`, known or not; none for 'none'."""
    return [name.strip() for name in mt_task.split(",") if name.strip() not in ("", "none")]


def task_names(config: Config) -> list[str]:
    """The modalities of `--mt_task`. Raises UserError for an unknown one, one named twice, and a name that is taken."""
    return list(_parse_task(config.mt_task, tuple(TASKS)))


@lru_cache
def _parse_task(mt_task: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Once for each value of the flag, however often it is asked."""
    names = split_names(mt_task)
    for name in names:
        if name not in known:
            raise UserError(f"--mt_task: unknown '{name}'{nearest(name, known)}; choose from none, {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"--mt_task {mt_task}: names {name} twice")
        check_name(name)
    return tuple(names)


def per_modality(config: Config, flag: str, convert: Callable[[str], Any]) -> dict[str, Any]:
    """{modality: value} of a flag that is one value for all, or NAME=VALUE,NAME=VALUE with the flag's default for the others.

    Raises UserError for a name that is not in --mt_task, and where `convert` raises one.
    """
    names, text = task_names(config), getattr(config, flag)
    if "=" not in text:
        value = convert(text)
        return dict.fromkeys(names, value)
    values = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in names or name in values:
            wrong = (
                "twice" if name in values else f"but --mt_task {config.mt_task} has no '{name}'{nearest(name, names)}"
            )
            raise UserError(
                f"--{flag} {text}: names {name or part} {wrong}; "
                f"write {','.join(f'{n}=VALUE' for n in names) or 'one value'}"
            )
        values[name] = convert(value)
    default = convert(str(getattr(MTConfig, flag)))
    return {name: values.get(name, default) for name in names}


def loss_weights(config: Config) -> dict[str, float]:
    """lambda per modality (`--mt_loss_weight`). Raises UserError for what is not a number of at least 0."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf:
            raise UserError(
                f"--mt_loss_weight must be at least 0, a number or NAME=NUMBER,..., not {config.mt_loss_weight}"
            )
        return value

    return per_modality(config, "mt_loss_weight", number)


def weights_names(config: Config) -> dict[str, str]:
    """The aggregation weights' name per modality (`--mt_weights`). Raises UserError for an unknown one."""

    def known(name: str) -> str:
        if name not in WEIGHTS:
            raise UserError(f"--mt_weights: '{name}' is none of {', '.join(WEIGHTS)}{nearest(name, WEIGHTS)}")
        return name

    return per_modality(config, "mt_weights", known)


def variant_of(config: Config) -> str:
    """U, X or any: what `--mt_variant` says or, for auto, suits the modalities. A label is there to be predicted too, hence U."""
    if config.mt_variant != "auto":
        return config.mt_variant
    return "X" if all(TASKS[name].tokens is None for name in task_names(config)) else "U"
