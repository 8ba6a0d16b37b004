"""ADM's noisy classifier as a file: its settings, and how it is built and loaded.

It is found in a run of classifier_train.py, in a file of ADM's, and in a run of ours with the E head, which holds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.process import GaussianDiffusion
from ..modalities.settings import MTConfig
from ..networks.classifier import EncoderUNetModel, create_classifier
from ..runs.checkpoint import (
    classifier_state,
    find_weights,
    load_classifier_weights,
    read_classes,
    read_config,
    read_weights,
)
from ..runs.config import ClassifierConfig, Config, DiffusionConfig, option, parse
from .build import trained_process


@dataclass
class ClassifierSizeConfig:
    """What is classified"""

    image_size: int = option(64, "side of the square images, in pixels", least=1)
    num_classes: int = option(1000, "number of classes; data may have fewer", least=1)


class NoisyClassifier(NamedTuple):
    """model, class names by id or None, and the configuration: of the three sections of `classifier_sections`."""

    model: EncoderUNetModel
    classes: list[str] | None
    config: Config


def classifier_sections() -> tuple[type, ...]:
    """What a checkpoint has to carry so that the same classifier can be built, and told the same timesteps, again."""
    return (ClassifierSizeConfig, ClassifierConfig, DiffusionConfig)


def shape_settings(config: Config) -> dict[str, Any]:
    """Of a configuration, what decides the shapes of the classifier's weights."""
    settings = config.as_dict(ClassifierSizeConfig, ClassifierConfig)
    return {key: value for key, value in settings.items() if key != "classifier_use_fp16"}


def build_classifier(config: Config) -> EncoderUNetModel:
    """The untrained classifier of a configuration."""
    size = config[ClassifierSizeConfig]
    return create_classifier(size.image_size, **config.as_dict(ClassifierConfig), num_classes=size.num_classes)


def build_process(config: Config) -> GaussianDiffusion:
    """The process that noises the classifier's images. Raises UserError where --diffusion_steps are too few."""
    return trained_process(Config([config[DiffusionConfig], MTConfig()]))


def saved_settings(weights: Path) -> dict[str, Any]:
    """The classifier's part of the configuration beside a weights file; empty for a foreign file."""
    names = {field.name for section in classifier_sections() for field in fields(section)} - {"timestep_respacing"}
    saved = read_config(weights, "classifier", "pixel") or {}  # the E head is a classifier too
    saved = {"trained_timesteps": "", **saved} if saved else {}  # runs of before knew none
    return {key: value for key, value in saved.items() if key in names}


def count_classes(state: Mapping[str, Tensor]) -> int:
    """The number of logits of a classifier's state dict: the length of its last bias."""
    ends = [key for key in state if key.startswith("out.") and key.endswith(".bias") and "qkv_proj" not in key]
    return len(state[max(ends)]) if ends else 0


def find_classifier(
    path: str,
    ema: str = "",
    settings: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    flag: str = "--classifier_path",
) -> tuple[Path, Config]:
    """The weights file that `path` means (see `checkpoint.find_weights`), and its configuration.

    settings go before what is saved beside the file, defaults after it: a foreign file has nothing saved, and its number of
    classes is read off the weights. Raises UserError where no classifier is in the file.
    """
    weights = find_weights(path, ema, flag)
    state = classifier_state(read_weights(weights, ema != "none"), weights)
    known = {**(defaults or {}), "num_classes": max(1, count_classes(state)), **saved_settings(weights)}
    return weights, parse([], classifier_sections(), description="", base={**known, **(settings or {})})


def load_classifier(
    path: str,
    *,
    ema: str = "",
    settings: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    flag: str = "--classifier_path",
) -> NoisyClassifier:
    """The classifier of a run, a checkpoint or a weights file, ready to classify on `device`; see `find_classifier`."""
    weights, config = find_classifier(path, ema, settings, defaults, flag)
    model = build_classifier(config)
    load_classifier_weights(model, weights, shape_settings(config), averaged=ema != "none")
    model = model.to(device).to_fast_layout().eval().requires_grad_(False)
    return NoisyClassifier(model, read_classes(weights.parent), config)
