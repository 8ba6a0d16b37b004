"""Zero-shot classification by the representation that a model's head reads off an image, beside the frozen encoder's own answer.

Each class is a text. An image is of the class whose text's vector is nearest to the image's (Radford et al. 2021); here the image's
vector is what the diffusion model's head says at little noise, and again what the encoder says of the image itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.text_file import read_lines
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..modalities.encoded import EncodedVector
from ..modalities.representation import SOURCES
from ..modalities.settings import loss_weights, row_config, row_of, task_names
from ..networks.image_encoder import TextEncoder
from ..runs.config import Config
from .classification import head_estimates
from .generate import Generator

OF_THE_DATA = "data"  # the value of --texts that means the names of the data's classes


class TextClasses(NamedTuple):
    """K classes as texts: vectors [K, D] of unit length, and what cosines are multiplied by before the softmax."""

    vectors: Tensor
    scale: float


class Answers(NamedTuple):
    """Of B images: class probabilities [B, K] by the head's vector and by the encoder's own, the head's vector [B, D], and the
    cosine [B] between the two."""

    head: Tensor
    encoder: Tensor
    vector: Tensor
    cosine: Tensor


def read_texts(text: str, template: str) -> tuple[list[str], list[str]]:
    """(names, texts) of the classes: `--texts` is a file with a class in each line, or 'a cat;a dog'; `--template` makes its
    text of it.

    Raises UserError for a file that can't be read, fewer than two classes, one named twice, and a template without {}.
    """
    if "{}" not in template:
        raise UserError(f"--template '{template}': write {{}} where the class stands, as in 'a photo of a {{}}'")
    if ";" in text:
        names = text.split(";")
    else:
        way_out = f"name a file with a class in each line, write 'a cat;a dog', or {OF_THE_DATA}"
        names = read_lines(text, f"--texts {text}", way_out)
    names = [name.strip() for name in names if name.strip()]
    return names, texts_of(names, template)


def texts_of(names: Sequence[str], template: str) -> list[str]:
    """The text of each class. Raises UserError for fewer than two classes, and for one named twice."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--texts: names '{twice}' twice")
    if len(names) < 2:
        raise UserError(f"--texts: has {len(names)} class(es); two are the least to choose from")
    return [template.replace("{}", name) for name in names]


def encoder_head(config: Config, path: str) -> str:
    """The modality whose head says an encoder's vector. Raises UserError for a model without one, or with one that learned
    nothing."""
    name = says_vectors(config)
    if not name:
        raise UserError(
            f"{path}: was trained with --mt_task {config.mt_task}, so no head says a vector that texts can be compared with; "
            "train with representation, representation_source clip-image"
        )
    if config.mt_variant == "X":
        raise UserError(
            f"{path}: form X is told the representation, so it can't say it; train with --mt_variant U or any"
        )
    if loss_weights(config)[name] == 0 or config.mt_drop_prob == 1:
        raise UserError(f"{path}: the head of '{name}' learned nothing (--mt_loss_weight 0 or --mt_drop_prob 1)")
    return name


def says_vectors(config: Config) -> str:
    """The first modality that is an encoder's vector; '' where there is none."""
    return next((n for n in task_names(config) if row_of(config, n).units(row_config(config, n))), "")


def encode_texts(config: Config, name: str, texts: Sequence[str], device: torch.device) -> TextClasses:
    """The texts as the text half of the modality's encoder has them. Raises UserError where it can't be had."""
    own = row_config(config, name)
    source = SOURCES[own.representation_source]
    if source.texts is None:
        raise UserError(f"--texts: representations of {own.representation_source} have no texts to be compared with")
    encoder: TextEncoder = source.texts(own)
    return TextClasses(encoder(texts).to(device), encoder.scale)


@torch.no_grad()
def answer(
    generator: Generator,
    name: str,
    classes: TextClasses,
    pixels: Tensor,
    streams: SampleStreams,
    *,
    timesteps: Sequence[int],
    draws: int,
) -> Answers:
    """For images [B, 3, S, S] in [-1, 1]; timesteps and draws as in `classification.head_estimates`."""
    modality = cast(EncodedVector, generator.modalities[name])
    network, z_0 = generator.network_in(0), generator.space.encode(pixels)
    x = head_estimates(network, generator.process, generator.modalities, z_0, timesteps, draws, streams, name)
    said, own = modality.vectors(x), modality.encoder_on(pixels.device)(pixels)
    return Answers(by_text(said, classes), by_text(own, classes), said, F.cosine_similarity(said, own, dim=1))


def by_text(vectors: Tensor, classes: TextClasses) -> Tensor:
    """Class probabilities [B, K]: the softmax of the scaled cosines between vectors [B, D] and the classes' texts."""
    return (classes.scale * F.normalize(vectors, dim=1) @ classes.vectors.T).softmax(dim=1)
