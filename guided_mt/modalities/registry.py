"""The registry of modalities, and everything that is built from a configuration: model, process and modalities.

A row of TASKS brings a modality's own flags (a dataclass), its class and its head; command line, training, sampling,
checkpoints and tests take it from here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..data import ImageSource
from ..diffusion.aggregation import WEIGHTS
from ..diffusion.process import GaussianDiffusion
from ..diffusion.respacing import create_gaussian_diffusion
from ..diffusion.schedules import get_named_beta_schedule
from ..errors import UserError, nearest
from ..networks.backbone import Backbone
from ..networks.classifier import create_classifier
from ..networks.create import create_model
from ..networks.heads import ClassifierHead, ImageHead, PooledHead, PooledMLPHead
from ..networks.model import VARIANTS, MTModel
from ..runs.checkpoint import read_config
from ..runs.config import (
    ClassifierConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    check_keys,
    option,
)
from ..runs.loop_config import TrainConfig
from . import LabelModality, MaskedImage, Modality, RandomLabel, VectorModality
from .names import check_name
from .tokens import ENCODING_NORMS, LabelTokens, VectorTokens, rescaled
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

    modality(config, variance): its head's tracked variance, or None. head(config, unet). tokens(config, width): the module that
    turns x into tokens, for a modality without pixels. needs_labels: whether the images must have classes. complete(config): fills
    in what its flags leave open. sees_plain_noise(config): whether form X, when it is given this modality, is at times trained with
    nothing in its place, a zero image, so that it is a model of plain noisy images too. file_options: flags that name files,
    which may have moved when a run goes on.
    """

    options: type
    modality: Callable[[Config, Tensor | None], Modality]
    head: Callable[[Config, Backbone], nn.Module]
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


def _label_head(config: Config, unet: Backbone) -> nn.Module:
    if config.mt_label_head == "M":
        return PooledHead(unet, config.num_classes)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClassifierConfig)}
    classifier = create_classifier(config.image_size, **options, num_classes=config.num_classes)
    if not config.classifier_use_fp16:
        classifier.precision = config.precision
    return ClassifierHead(classifier, build_diffusion(config))


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
        lambda config, unet: ImageHead(unet),
        sees_plain_noise=lambda config: config.mask_full_prob > 0,
    ),
    "label": Task(LabelConfig, _label, _label_head, _label_tokens, needs_labels=True),
    "random-label": Task(LabelConfig, _random_label, _label_head, _label_tokens),
    "representation": Task(
        RepresentationConfig,
        _representation,
        lambda config, unet: PooledMLPHead(unet, config.representation_size),
        lambda config, width: VectorTokens(config.representation_size, width),
        complete=_representation_size,
        file_options=("representation_file",),
    ),
}


@dataclass
class MTConfig:
    """Multi-modal diffusion"""

    mt_task: str = option(
        "none", f"what is modelled with the image: none, or of {', '.join(TASKS)}, as in masked,label"
    )
    mt_variant: str = option(
        "auto",
        "U: the network sees z_t; X: it is also given the modalities; any: a random subset of them; auto: X for images, "
        "U where a modality is no image",
        ("auto", *VARIANTS),
    )
    mt_weights: str = option(
        "paper", f"aggregation weights w_t ({', '.join(WEIGHTS)}), or one each: masked=paper,label=bridge"
    )
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


def model_sections() -> tuple[type, ...]:
    """What a checkpoint has to carry so that the same network, process and modalities can be built again."""
    return (ModelConfig, DiffusionConfig, MTConfig, *dict.fromkeys(task.options for task in TASKS.values()))


def run_sections() -> tuple[type, ...]:
    """What a training run's config.yaml holds."""
    return (*model_sections(), DataConfig, TrainConfig)


def sampling_may_change() -> set[str]:
    """Keys of `model_sections` that another value than in training makes sense for: they change no weight's meaning."""
    return {f.name for section in model_sections() for f in dataclasses.fields(section) if f.metadata["free"]}


def saved_config(weights: Path) -> dict[str, Any]:
    """The configuration beside a weights file; empty for a foreign file. Raises UserError for a modality that isn't
    registered, and for a key that no run has."""
    saved, file = read_config(weights) or {}, weights.parent / "config.yaml"
    if "val_data_dir" in saved:
        raise UserError(f"{weights}: holds a classifier, not a diffusion model; --classifier_path takes it")
    for name in split_names(str(saved.get("mt_task", ""))):
        if name not in TASKS:
            raise UserError(
                f"{file}: was trained with the modality '{name}'{nearest(name, TASKS)}, which this script doesn't know; "
                "run the file that adds it to TASKS (docs/new_modality.md)"
            )
    # What later versions added, at the value that says what runs without it did.
    saved = {"predict_v": False, "timestep_weights": "uniform", **saved} if saved else {}
    if "mt_loss_weight" in saved:
        saved["mt_loss_weight"] = str(saved["mt_loss_weight"])  # a number in runs of version 0.1
    known = [field.name for section in run_sections() for field in dataclasses.fields(section)]
    return check_keys(saved, known, file)


def split_names(mt_task: str) -> list[str]:
    """The words of `--mt_task`, known or not; none for 'none'."""
    return [name.strip() for name in mt_task.split(",") if name.strip() not in ("", "none")]


def task_names(config: Config) -> list[str]:
    """The modalities of `--mt_task`. Raises UserError for an unknown one, one named twice, and a name that is taken."""
    names = split_names(config.mt_task)
    for name in names:
        if name not in TASKS:
            raise UserError(f"--mt_task: unknown '{name}'{nearest(name, TASKS)}; choose from none, {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise UserError(f"--mt_task {config.mt_task}: names {name} twice")
        check_name(name)
    return names


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


def count_classes(config: Config, images: ImageSource) -> None:
    """Where labels are modelled and --num_classes was not given, it is the number of classes of the data."""
    modelled = any(TASKS[name].options is LabelConfig for name in task_names(config))
    if modelled and images.labels is not None and "num_classes" not in config.typed:
        config[ModelConfig].num_classes = len(images.class_names)


def needs_labels(config: Config) -> bool:
    """Whether training reads the images' classes."""
    return config.class_cond or any(TASKS[name].needs_labels for name in task_names(config))


def sees_plain_noise(config: Config) -> bool:
    """Whether form X with all modalities of `--mt_task` is at times trained with none of them given."""
    return all(TASKS[name].sees_plain_noise(config) for name in task_names(config))


def check_labels(config: Config, images: ImageSource) -> None:
    """Raises UserError where classes are needed and the images have none, or more than --num_classes."""
    if not needs_labels(config):
        return
    why = "--class_cond True" if config.class_cond else f"--mt_task {config.mt_task}"
    if images.labels is None:
        raise UserError(
            f"{images.path}: {why} needs classes (sub-folders, names like CLASS_0001.png, or arr_1 in an .npz), "
            f"and {images.without_class()} has none"
        )
    most = len(images.class_names)
    if most > config.num_classes:
        raise UserError(f"{images.path}: has {most} classes; raise --num_classes {config.num_classes} to {most}")


def check_tasks(config: Config) -> None:
    """Raises UserError for modalities and flags that contradict each other."""
    names = task_names(config)
    loss_weights(config), weights_names(config)
    if config.class_cond and "label" in names:
        raise UserError(
            "--class_cond True gives the network the class that --mt_task label is to predict; leave one of them out"
        )


def variant_of(config: Config) -> str:
    """U, X or any: what `--mt_variant` says or, for auto, suits the modalities. A label is there to be predicted too, hence U."""
    if config.mt_variant != "auto":
        return config.mt_variant
    return "X" if all(TASKS[name].tokens is None for name in task_names(config)) else "U"


def complete(config: Config) -> None:
    """Fill in what the flags leave open. Raises UserError for files that can't be read."""
    config[MTConfig].mt_task = ",".join(task_names(config)) or "none"
    config[MTConfig].mt_variant = variant_of(config)
    for name in task_names(config):
        fill_in = TASKS[name].complete
        if fill_in is not None:
            fill_in(config)


def build_model(config: Config) -> MTModel:
    """The untrained network of a configuration."""
    names = task_names(config)
    model_options = config.as_dict(ModelConfig)
    del model_options["compile"]
    del model_options["use_fp16"]  # parsing has turned it into the precision
    modalities = build_modalities(config)
    width = config.mt_context_dim if config.mt_context_dim > 0 else 4 * config.num_channels
    factory = partial(
        MTModel,
        heads={name: partial(TASKS[name].head, config) for name in names},
        image_inputs={name: m.image_channels for name, m in modalities.items() if TASKS[name].tokens is None},
        token_inputs={name: partial(tokens, config) for name in names if (tokens := TASKS[name].tokens) is not None},
        tracked=[name for name, modality in modalities.items() if modality.tracks_variance],
        variant=variant_of(config) if names else "U",
        num_timesteps=config.diffusion_steps,
    )
    made = create_model(**model_options, learn_sigma=config.learn_sigma, context_dim=width, factory=factory)
    model = cast(MTModel, made)
    if config.mt_drop_prob == 1:
        model.freeze_context()
    return model


def build_diffusion(config: Config, timestep_respacing: str = "") -> GaussianDiffusion:
    """The process of a configuration, on all its timesteps or on those kept by `timestep_respacing`.

    Raises UserError where --diffusion_steps are too few for the schedule.
    """
    steps, schedule = config.diffusion_steps, config.noise_schedule
    most = float(get_named_beta_schedule(schedule, steps).max())
    if most >= 1:  # linear: beta_T = 20 / T, and abar_T would be 0
        raise UserError(
            f"--diffusion_steps {steps} is too small for --noise_schedule {schedule}, whose last beta would be {most:.3g}; "
            f"take at least {int(steps * most) + 1}, or --noise_schedule cosine"
        )
    options: dict[str, Any] = config.as_dict(DiffusionConfig)
    options["steps"] = options.pop("diffusion_steps")
    options["timestep_respacing"] = timestep_respacing
    return create_gaussian_diffusion(**options, mt_weights=weights_names(config))


def build_modalities(config: Config, model: MTModel | None = None) -> dict[str, Modality]:
    """{name: modality}. With a `model` they encode by it, and their heads' tracked variances are filled in."""
    tracked: dict[str, Any] = dict(model.head_variance.items()) if model is not None else {}
    variances = {name: v.value() for name, v in tracked.items() if bool(v.error_count.any())}
    made = {name: TASKS[name].modality(config, variances.get(name)) for name in task_names(config)}
    for name, modality in made.items():
        if model is not None and TASKS[name].tokens is not None:
            modality.encoder = partial(_encode, model, name, config.mt_encoding_norm)
    return made


def _encode(model: MTModel, name: str, norm: str, x: Tensor) -> Tensor:
    return rescaled(model.encode_modality(name, x), norm)
