"""The items of a picture of every subset (see picture.py), from a run of either package and from its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guided_mt.commands.console import split_flags, with_saved_config
from guided_mt.data import ImageSource, load_images
from guided_mt.data.images import from_uint8
from guided_mt.data.subset import Subset
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError
from guided_mt.generation.batches import split_sides
from guided_mt.generation.build import needs_labels, open_images, saved_config
from guided_mt.generation.generate import Generator
from guided_mt.generation.masks import make_mask
from guided_mt.modalities import Images, Modality
from guided_mt.runs.checkpoint import find_weights, read_config
from guided_mt.runs.config import Config, SampleConfig, option, parse
from latent_mt.commands.latent_sample import open_split
from latent_mt.commands.loading import load_generator, read_saved
from latent_mt.model.generate import LatentSampleConfig


@dataclass
class SubsetsConfig:
    """What to draw"""

    out: str = option("", "the .png to write; empty: subsets.png in the run's samples")
    data_dir: str = option("", "the data: folder, .tar or .zip, or builtin:digits-test; empty: those of training")
    split: str = option("", "latent models: which split of the data; empty: the validation split of training")
    num_samples: int = option(6, "items, spread evenly over the data", least=2)
    each_class: bool = option(False, "instead of spreading the items, take one of each class in turn")
    mask: str = option("patches:10", "what a masked image lacks: patches:M, half, full, or image:FILE")


@dataclass(frozen=True)
class Items:
    """N items and everything that can be given of them.

    truth {side: images [N, 3, S, S] in [-1, 1]}. known {side or modality: x as `Generator.draw` takes it}. shown {modality: how it
    looks, [N, 3, S, S]}. labels: class ids [N], where there are classes. classes: the class of each item in words, or none.
    """

    truth: dict[str, Tensor]
    known: dict[str, Tensor]
    shown: dict[str, Tensor]
    labels: Tensor | None
    classes: list[str]


def read_flags(argv: Sequence[str], description: str) -> Config:
    """The flags, with the `model_path` of the weights found. Raises UserError."""
    asked = [word for word in argv if word in ("-h", "--help")]
    chosen = [*split_flags(argv, ["model_path", "ema"])[0], *asked]
    alone = parse(chosen, (SubsetsConfig, SampleConfig), description=description)
    weights = find_weights(alone.model_path, alone.ema)
    if "model" in (read_config(weights) or {}):
        config = parse(argv, (SubsetsConfig, LatentSampleConfig), description=description)
        config[LatentSampleConfig].model_path = str(weights)
        return config
    config = with_saved_config(argv, (SubsetsConfig, SampleConfig), description)
    if config.split:
        raise UserError(f"--split {config.split}: is of latent models; name the held-out images by --data_dir")
    return config


def open_run(config: Config, device: torch.device) -> tuple[Generator, ImageSource, int]:
    """(model, data, side of the images in pixels). Raises UserError."""
    weights = find_weights(config.model_path, config.ema)
    if LatentSampleConfig in (type(section) for section in config.sections()):
        generator = load_generator(str(weights), config.ema, device)
        source, size = open_split(config, read_saved(weights))
        if generator.roles.slots and not generator.latent.takes(source.side_names):
            raise UserError(f"{source.path}: needs the sides {', '.join(generator.roles.sides)}")
        return generator, source, size
    generator = Generator.load(config, device)
    config[SubsetsConfig].data_dir = config.data_dir or saved_config(weights).get("data_dir", "")
    return generator, open_images(config, generator.known_classes), config.image_size


def take_items(config: Config, generator: Generator, source: ImageSource, size: int) -> Items:
    """The chosen items of the data, with a mask of each item's own. Raises UserError for data that lack what is to be given."""
    names = givable(generator)
    if not names:
        raise UserError(f"{config.model_path}: this model knows of images alone, so there is nothing to give")
    loaded = load_images(Subset(source, choose(config, source)), size)
    pixels, sides = split_sides(from_uint8(loaded.images.to(generator.device)), source.side_names)
    labels = None if loaded.labels is None else loaded.labels.to(generator.device)
    if needs_labels(generator.config) and (labels is None or bool((labels < 0).any())):
        raise UserError(f"{source.path}: some of the items have no class, which this model is given")
    truth = dict(zip(generator.roles.sides, (pixels, *sides.values()), strict=True))
    encoded = {side: generator.space.encode(images) for side, images in truth.items()}
    first = generator.roles.sides[0]
    batch = Images(encoded[first], labels, sides={side: encoded[side] for side in sides}, image=pixels)
    known, shown = {side: encoded[side] for side in truth if side in names}, {}
    streams = SampleStreams(torch.arange(len(pixels)), index=Stream.INPUT, device=generator.device)
    for name, modality in names.items():
        if modality is None:
            continue
        if modality.is_mask:
            shown[name] = pixels * make_mask(config.mask, size, generator.mask_patch, streams)
            known[name] = modality.enter(shown[name])
        else:
            known[name] = modality.from_batch(batch, streams)
    classes = [] if labels is None or not source.class_names else [source.class_names[i] for i in labels.tolist()]
    return Items(truth, known, shown, labels, classes)


def givable(generator: Generator) -> dict[str, Modality | None]:
    """{what can be given: its modality, None for a side}. What lies beside the training images alone is left out."""
    sides = generator.roles.sides if generator.roles.slots else ()
    others = {name: m for name, m in generator.modalities.items() if name not in generator.roles.slots and not m.loads}
    return {**dict.fromkeys(sides), **others}


def choose(config: Config, source: ImageSource) -> np.ndarray:
    """The numbers [num_samples] of the items. Raises UserError where there are too few."""
    whole = np.flatnonzero(np.all([np.ones(len(source), dtype=bool), *source.present.values()], axis=0))
    if config.each_class:
        if source.labels is None:
            raise UserError(f"{source.path}: has no classes; leave --each_class out")
        whole = whole[source.labels[whole] >= 0]
    if len(whole) < config.num_samples:
        raise UserError(
            f"{source.path}: {len(whole)} items have all that can be given; lower --num_samples {config.num_samples}"
        )
    if not config.each_class:
        return whole[np.linspace(0, len(whole) - 1, config.num_samples).round().astype(int)]
    labels = source.labels[whole]
    place = np.zeros(len(whole), dtype=int)  # among those of its class
    for label in np.unique(labels):
        place[labels == label] = np.arange((labels == label).sum())
    return whole[np.lexsort((labels, place))[: config.num_samples]]
