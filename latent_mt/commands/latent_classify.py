"""Classify images by the label head of a latent model that was trained with labels (form U or any), or by texts.

    mt-diffusion latent-classify --model_path RUN --data_dir images.zip

    mt-diffusion latent-classify --model_path RUN --data_dir images.zip --texts 'a cat;a dog'

Writes what `mt-diffusion classify` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from guided_mt.commands.classify import (
    Classified,
    ClassifyConfig,
    Network,
    by_texts,
    check_head,
    classify_images,
    noisy,
    read_head,
)
from guided_mt.errors import UserError
from guided_mt.generation.classification import read_timesteps
from guided_mt.runs.checkpoint import find_weights, read_classes
from guided_mt.runs.config import Config, ModelConfig, parse

from ..model.conditions import reads_text, text_condition
from ..model.generate import LatentGenerator
from ..model.latent_diffusion import LatentMTDiffusion
from .loading import load_model, read_saved, settle_precision


def main(argv: Sequence[str]) -> Classified | None:
    """Write the probabilities; returns the file on the main process, None on the others and with --dry_run."""
    return classify_images(open_head(argv))


def open_head(argv: Sequence[str]) -> Network:
    """The label head of `--model_path`. Raises UserError for a model that has none, or none that can be used."""
    flags = parse(argv, (ClassifyConfig,), description=__doc__)
    if flags.classifier_path:
        raise UserError("--classifier_path: classifiers of images are for mt-diffusion classify")
    weights = find_weights(flags.model_path, flags.ema)
    model = load_model(read_saved(weights), weights, torch.device("cpu"), averaged=flags.ema != "none")
    config = Config([flags[ClassifyConfig], *model.config.sections()], flags.typed, model.config.own)
    if config.texts:
        return by_texts(config, weights, model.diffusion, lambda device: generator_on(model, device))
    label = check_head(config, weights)
    config[ModelConfig].num_classes = model.config.own[label]["num_classes"]
    timesteps = read_timesteps(config.timesteps, model.diffusion.num_timesteps, model.diffusion.aggregation)
    classes = read_classes(weights.parent)

    def load(device: torch.device) -> Callable[..., Tensor]:
        generator = LatentGenerator(settle_precision(model.to(device).to_fast_layout()), classes=classes)
        return partial(read_head, generator, label, timesteps=timesteps, draws=config.draws)

    return Network(config, weights, classes, noisy(timesteps, config.draws), load)


def generator_on(model: LatentMTDiffusion, device: torch.device) -> LatentGenerator:
    """What reads the heads, on the device; a model with a text condition is told the empty text. Raises UserError for another
    condition."""
    model = settle_precision(model.to(device).to_fast_layout())
    if model.conditioning_key is None:
        return LatentGenerator(model)
    if not reads_text(model):
        raise UserError(
            f"--texts: this model is conditioned on {model.cond_stage_key}, which images alone don't have; only models without a "
            "condition, or with one of text, can be read"
        )
    return LatentGenerator(model, text_condition(model, [""], "", guided=False))
