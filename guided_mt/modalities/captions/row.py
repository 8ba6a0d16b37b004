"""The row of TASKS: a caption's options, and what is built of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ...data import ImageSource
from ...data.captions import OfLabels, find_captions, open_captions
from ...errors import UserError
from ...networks.backbone import Backbone
from ...networks.caption_head import CaptionHead
from ...runs.config import option
from ..row_config import RowConfig
from ..tokens import CaptionTokens
from .counted import count_captions
from .modality import CaptionModality, RandomCaption
from .vocabulary import VOCABULARIES, VocabularyKind

log = logging.getLogger("guided_mt")


@dataclass
class CaptionConfig:
    """Captions (--mt_task caption, random-caption)"""

    caption_vocabulary: str = option(
        "words",
        "words: those of the training captions; bpe: CLIP's byte pairs, of which any text is made",
        VOCABULARIES,
    )
    caption_size: int = option(
        -1,
        "tokens of a vocabulary of words, the most frequent ones; -1: all words of the training captions, 10,000 at most; in "
        "latents, where the network is built first, 1000",
        least=3,
    )
    caption_length: int = option(
        -1,
        "most tokens of a caption, which is cut there; -1: as the longest of the training captions, 32 at most, of bpe 77; in "
        "latents 16, of bpe 77",
        least=1,
        most=77,
    )
    caption_width: int = option(256, "width of the head; what is above 64 a multiple of 64", least=1)
    caption_file: str = option(
        "",
        "where captions are: txt (NAME.txt beside NAME.jpg), or a table .csv, .tsv, .jsonl; empty: an array captions of the .npz, "
        "captions.csv among the images, or texts beside them",
        free=True,
    )
    caption_template: str = option(
        "",
        "makes the captions of the classes instead, as in 'a photo of a {class}': they then say what the label says",
        free=True,
    )


DATA_OPTIONS = ("caption_file", "caption_template")  # what says where captions come from


def kind_of(config: RowConfig) -> VocabularyKind:
    """The row of VOCABULARIES."""
    return VOCABULARIES[config.caption_vocabulary]


def size_of(config: RowConfig) -> int:
    """V."""
    row = kind_of(config)
    return config.caption_size if config.caption_size > 0 and row.split is not None else row.size


def length_of(config: RowConfig) -> int:
    """L."""
    return config.caption_length if config.caption_length > 0 else kind_of(config).length


def complete(config: RowConfig) -> None:
    """Raises UserError for options that don't fit together."""
    if kind_of(config).split is None and config.caption_size not in (-1, kind_of(config).size):
        raise UserError(
            f"{config.flag('caption_size')} {config.caption_size}: the byte pairs are {kind_of(config).size}; leave it out"
        )
    if config.caption_width > 64 and config.caption_width % 64:
        raise UserError(f"{config.flag('caption_width')} {config.caption_width}: take a multiple of 64")
    if config.caption_file and config.caption_template:
        raise UserError(
            f"{config.flag('caption_template')} makes the captions, which {config.flag('caption_file')} names; leave one out"
        )


def fit(config: RowConfig, images: ImageSource) -> None:
    """Fill in V and L where they are left open. Raises UserError where the images have no captions."""
    row, found = kind_of(config), count_captions(images, config.caption_vocabulary)
    if config.caption_size < 0 and row.split is not None:
        config.fill_in("caption_size", 2 + min(len(found.words), row.most_words))
    if config.caption_length < 0:
        config.fill_in("caption_length", min(max(found.lengths), row.most))


def captions(config: RowConfig, source: ImageSource) -> Sequence[Sequence[str]]:
    """Those of the images of --data_dir, where the options say. Raises UserError where there are none."""
    if config.caption_template:
        log.warning(
            "the captions are made of the classes: they say what the label says, so nothing passes between the two"
        )
        return OfLabels(config.caption_template, source, config.flag("caption_template"))
    flag = config.flag("caption_file")
    if config.caption_file:
        return open_captions(config.caption_file, config.data_dir, source, flag)
    return find_captions(config.data_dir, source, flag)


def caption(config: RowConfig) -> CaptionModality:
    """The caption of the image."""
    return CaptionModality(config.name, config.caption_vocabulary, length_of(config), config.caption_width)


def random_caption(config: RowConfig) -> CaptionModality:
    """The caption of another one."""
    return RandomCaption(config.name, config.caption_vocabulary, length_of(config), config.caption_width)


def head(config: RowConfig, backbone: Backbone) -> nn.Module:
    """Queries that attend to the middle features."""
    size = size_of(config)
    words = size - 2 if kind_of(config).split is not None else 0
    return CaptionHead(backbone, size, length_of(config), config.caption_width, words)


def tokens(config: RowConfig, width: int) -> nn.Module:
    """A token of the network's context for each of the caption's."""
    return CaptionTokens(size_of(config), length_of(config), width)
