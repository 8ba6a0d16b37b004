"""The registry of modalities: a row of TASKS brings a modality's own flags (a dataclass), its class and its head.

Command line, YAML files, training, sampling, checkpoints and tests take it from here, in pixels and in latents; what a whole
configuration says of its modalities is read in `settings`, and built in `generation.build`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..data import ImageSource
from ..diffusion.process import GaussianDiffusion
from ..networks.backbone import Backbone
from ..networks.classifier import create_classifier
from ..networks.heads import ClassifierHead, ImageHead, PooledHead
from ..runs.config import ClassifierConfig, option
from . import LabelModality, MaskedImage, Modality, PairedImage, RandomLabel, representation
from .captions import row as captions
from .captions.row import CaptionConfig
from .representation import RepresentationConfig
from .row_config import RowConfig
from .tokens import LabelTokens


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
class PairedConfig:
    """Another image of the same thing (--mt_task paired, or several as in map:paired,depth:paired)"""

    paired_dir: str = option(
        "",
        "folder or archive with another image of the same name for each image, or one each: map=maps.zip,depth=depth.zip",
        free=True,
    )
    paired_side: str = option("", "what the data call this image; empty: as the modality")


@dataclass(frozen=True)
class Task:
    """A modality's flags, and how to build it and its head from a configuration.

    What it is built from is a `RowConfig`: its options and those of the run by attribute, its `name`, and the `space` that Z is.

    modality(config, variance): variance is that of its head, None until it is known (`Modality.use_variance`).
    head(config, backbone, process): the process is the one on all timesteps. tokens(config, width): the module that
    turns x into tokens, for a modality without pixels; without it x is an element of Z and enters as an image. needs_labels:
    whether the images must have classes. is_side: whether x is another image of the same thing, which can be z_0 as well; its
    options are those of PairedConfig, and perhaps more.
    complete(config): fills in what its flags leave open. sees_plain_noise(config): whether form X, when it is given this modality,
    is at times trained with nothing in its place, a zero image, so that it is a model of plain noisy images too. run_options:
    options of the run that say something of this modality alone. file_options: flags that name files, which may have moved when a
    run goes on. units(config): the size of its vectors where the network keeps units of them (`heads.VectorUnits`), else 0.
    captions(config, images): those of the images, for a modality that is trained on them, which become `ImageSource.captions`.
    fit(config, images): fills in what flags leave open and only the training images say; a network that is built without them
    has other defaults. data_options: those that say where captions are, beside --data_dir.
    """

    options: type
    modality: Callable[[RowConfig, Tensor | None], Modality]
    head: Callable[[RowConfig, Backbone, GaussianDiffusion], nn.Module]
    tokens: Callable[[RowConfig, int], nn.Module] | None = None
    needs_labels: bool = False
    is_side: bool = False
    complete: Callable[[RowConfig], None] | None = None
    sees_plain_noise: Callable[[RowConfig], bool] = lambda config: False
    run_options: tuple[str, ...] = ()
    file_options: tuple[str, ...] = ()
    units: Callable[[RowConfig], int] = lambda config: 0
    captions: Callable[[RowConfig, ImageSource], Sequence[Sequence[str]]] | None = None
    fit: Callable[[RowConfig, ImageSource], None] | None = None
    data_options: tuple[str, ...] = ()


def mask_patch(given: int, image_size: int) -> int:
    """The side of a masked patch in pixels: a quarter of the image (16 at the paper's 64) unless given."""
    return given if given > 0 else max(1, image_size // 4)


def _masked_image(config: RowConfig, variance: Tensor | None) -> Modality:
    return MaskedImage(
        config.name,
        patch=mask_patch(config.mask_patch, config.image_size),
        max_patches=config.mask_max_patches,
        full_prob=config.mask_full_prob,
        variance=variance,
    )


def _image_head(config: RowConfig, backbone: Backbone, process: GaussianDiffusion) -> nn.Module:
    return ImageHead(backbone, config.space.channels)


def _label(config: RowConfig, variance: Tensor | None) -> Modality:
    return LabelModality(config.num_classes, config.mt_encoder_refresh, config.name)


def _random_label(config: RowConfig, variance: Tensor | None) -> Modality:
    return RandomLabel(config.num_classes, config.mt_encoder_refresh, config.name)


def _label_head(config: RowConfig, backbone: Backbone, process: GaussianDiffusion) -> nn.Module:
    if config.mt_label_head == "M":
        return PooledHead(backbone, config.num_classes)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClassifierConfig)}
    space = config.space
    classifier = create_classifier(space.size, **options, num_classes=config.num_classes, in_channels=space.channels)
    if not config.classifier_use_fp16:
        classifier.precision = config.precision
    return ClassifierHead(classifier, process, limit=space.limit)


def _label_tokens(config: RowConfig, width: int) -> nn.Module:
    return LabelTokens(config.num_classes, width)


_OF_LABELS = ("num_classes", "mt_encoder_refresh", "mt_encoding_norm")


def _caption_row(modality: Callable[[RowConfig], Modality]) -> Task:
    return Task(
        CaptionConfig,
        lambda config, variance: modality(config),
        lambda config, backbone, process: captions.head(config, backbone),
        captions.tokens,
        complete=captions.complete,
        run_options=("mt_encoding_norm",),
        file_options=("caption_file",),
        captions=captions.captions,
        fit=captions.fit,
        data_options=captions.DATA_OPTIONS,
    )


TASKS: dict[str, Task] = {
    "masked": Task(
        MaskConfig,
        _masked_image,
        _image_head,
        sees_plain_noise=lambda config: config.mask_full_prob > 0,
    ),
    "label": Task(LabelConfig, _label, _label_head, _label_tokens, needs_labels=True, run_options=_OF_LABELS),
    "random-label": Task(LabelConfig, _random_label, _label_head, _label_tokens, run_options=_OF_LABELS),
    "representation": Task(
        RepresentationConfig,
        representation.representation,
        lambda config, backbone, process: representation.head(config, backbone),
        representation.tokens,
        complete=representation.complete,
        run_options=("mt_encoding_norm",),
        file_options=("representation_file", "clip_weights"),
        units=representation.units_size,
    ),
    "caption": _caption_row(captions.caption),
    "random-caption": _caption_row(captions.random_caption),
    "paired": Task(
        PairedConfig,
        lambda config, variance: PairedImage(config.name, config.paired_side, variance),
        _image_head,
        is_side=True,
        file_options=("paired_dir",),
    ),
}
