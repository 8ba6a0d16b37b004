"""Everything that is built from a whole configuration: network, process and modalities, and what it must agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from ..modalities import Modality
from ..modalities.registry import (
    TASKS,
    LabelConfig,
    MTConfig,
    loss_weights,
    split_names,
    task_names,
    variant_of,
    weights_names,
)
from ..modalities.tokens import rescaled
from ..networks.backbone import Backbone
from ..networks.heads import HeadVariance
from ..networks.model import BACKBONES, MTModel
from ..runs.checkpoint import read_config
from ..runs.config import Config, DataConfig, DiffusionConfig, ModelConfig, check_keys
from ..runs.loop_config import TrainConfig


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
    later = {"mt_backbone": "unet", "prediction": "eps", "predict_v": False, "timestep_weights": "uniform"}
    saved = {**later, **saved} if saved else {}
    if "mt_loss_weight" in saved:
        saved["mt_loss_weight"] = str(saved["mt_loss_weight"])  # a number in runs of version 0.1
    known = [field.name for section in run_sections() for field in dataclasses.fields(section)]
    _check_rows(check_keys(saved, known, file), file)
    return saved


def _check_rows(saved: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where a run was trained with a row of a registry that isn't there."""
    fields = [field for section in model_sections() for field in dataclasses.fields(section) if field.name in saved]
    asked = [(f.name, str(saved[f.name]), f.metadata["choices"]) for f in fields if f.metadata["choices"]]
    weights = str(saved["mt_weights"]).split(",") if "mt_weights" in saved else []
    asked += [("mt_weights", part.rpartition("=")[2].strip(), WEIGHTS) for part in weights]
    for flag, name, rows in asked:
        if name not in rows:
            raise UserError(
                f"{file}: was trained with --{flag} {name}{nearest(name, rows)}, which this script doesn't know; "
                "run the file that adds it (docs/architecture.md)"
            )


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


def complete(config: Config) -> None:
    """Fill in what the flags leave open. Raises UserError for files that can't be read."""
    config[MTConfig].mt_task = ",".join(task_names(config)) or "none"
    config[MTConfig].mt_variant = variant_of(config)
    for name in task_names(config):
        fill_in = TASKS[name].complete
        if fill_in is not None:
            fill_in(config)


def build_model(config: Config, modalities: Mapping[str, Modality] | None = None) -> MTModel:
    """The untrained network of a configuration, for `modalities` where they are built already."""
    names = task_names(config)
    model_options = config.as_dict(ModelConfig)
    del model_options["compile"]
    del model_options["use_fp16"]  # parsing has turned it into the precision
    modalities, process = modalities or build_modalities(config), build_diffusion(config)
    width = config.mt_context_dim if config.mt_context_dim > 0 else 4 * config.num_channels
    made = BACKBONES[config.mt_backbone](
        **model_options,
        learn_sigma=config.learn_sigma,
        context_dim=width,
        heads={name: partial(_head, config, process, name) for name in names},
        image_inputs={name: m.image_channels for name, m in modalities.items() if TASKS[name].tokens is None},
        token_inputs={name: partial(tokens, config) for name in names if (tokens := TASKS[name].tokens) is not None},
        tracked=[name for name, modality in modalities.items() if modality.tracks_variance],
        variant=variant_of(config) if names else "U",
        num_timesteps=config.diffusion_steps,
    )
    if config.mt_drop_prob == 1:
        made.freeze_context()
    return cast(MTModel, made)


def _head(config: Config, process: GaussianDiffusion, name: str, backbone: Backbone) -> nn.Module:
    return TASKS[name].head(config, backbone, process)


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
    try:
        return create_gaussian_diffusion(**options, mt_weights=weights_names(config))
    except ValueError as error:  # what its formulas say of bad settings, in the words of the flags
        raise UserError(str(error)) from None


def build_modalities(config: Config, model: MTModel | None = None) -> dict[str, Modality]:
    """{name: modality} of a configuration, bound to `model` where there is one."""
    made = {name: TASKS[name].modality(config, None) for name in task_names(config)}
    if model is not None:
        bind(made, config, model)
    return made


def bind(modalities: Mapping[str, Modality], config: Config, model: MTModel) -> None:
    """Let modalities encode by `model`, and know their heads' variances as they are tracked by now."""
    for name, modality in modalities.items():
        if TASKS[name].tokens is not None:
            modality.encoder = partial(_encode, model, name, config.mt_encoding_norm)
        tracked = cast(HeadVariance, model.head_variance[name]) if name in model.head_variance else None
        if tracked is not None and bool(tracked.error_count.any()):
            modality.use_variance(tracked.value())


def _encode(model: MTModel, name: str, norm: str, x: Tensor) -> Tensor:
    return rescaled(model.encode_modality(name, x), norm)
