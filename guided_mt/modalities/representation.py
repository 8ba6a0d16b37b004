"""Where the vectors of `--mt_task representation` come from: the table SOURCES, and the options of all its rows."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError, reason
from ..networks.backbone import Backbone
from ..networks.clip import clip_config
from ..networks.heads import ACTIVATIONS, PooledMLPHead
from ..networks.image_encoder import UNTRAINED, ImageEncoder, TextEncoder
from ..runs.config import option
from ..runs.processes.launcher import rank_of_launcher
from .base import Modality
from .encoded import EncodedVector
from .row_config import RowConfig
from .tokens import VectorAsToken, VectorTokens
from .vector import VectorModality, read_vectors

TOKENS = ("linear", "vector")
log = logging.getLogger("guided_mt")


@dataclass(frozen=True)
class Source:
    """A way to come by vectors. complete(config): fills in what the flags leave open, the vectors' size above all;
    modality(config, variance): as in `registry.Task`. encoder(config): the frozen encoder, None where vectors come from
    elsewhere; described(config): the options that say which encoder it is, by their name in a cache of its vectors.
    texts(config): what makes vectors of texts that the images' are compared with, if anything does. unused: options that say
    nothing with this row."""

    complete: Callable[[Any], None]
    modality: Callable[[Any, Tensor | None], Modality]
    encoder: Callable[[Any], ImageEncoder] | None = None
    described: Callable[[Any], dict[str, str]] = lambda config: {}
    texts: Callable[[Any], TextEncoder] | None = None
    unused: tuple[str, ...] = ()


def _from_file(config: RowConfig, variance: Tensor | None) -> Modality:
    flag = config.flag("representation_file")
    return VectorModality(config.name, config.representation_size, config.representation_file, variance, flag)


def _size_of_file(config: RowConfig) -> None:
    flag, file = config.flag("representation_file"), config.representation_file
    if not file:
        raise UserError(f"{flag} is missing: the vectors that --mt_task {config.name} is trained on")
    size = config.representation_size if config.representation_size > 0 else None
    found = read_vectors(file, config.name, size, f"{flag} {file}", absent=True)
    config.fill_in("representation_size", found.shape[1])


def _from_encoder(config: RowConfig, variance: Tensor | None) -> Modality:
    row = SOURCES[config.representation_source]
    assert row.encoder is not None
    return EncodedVector(
        config.name,
        config.representation_size,
        partial(row.encoder, config),
        {"source": config.representation_source, **row.described(config)},
        normalised=config.representation_normalised,
        variance=variance,
        where=config.flag("clip_weights"),
        at_hand=Path(config.clip_weights).is_file(),
    )


def _complete_clip(config: RowConfig) -> None:
    for key, wanted in (
        ("clip_arch", "an architecture that open_clip knows, as ViT-H-14, or a JSON file of one"),
        ("clip_weights", f"a file, a name of open_clip's for weights, or '{UNTRAINED}' for a trial"),
    ):
        if not getattr(config, key):
            raise UserError(f"{config.flag(key)} is missing: {wanted}, for representation_source clip-image")
    arch = read_arch(config.clip_arch, f"{config.flag('clip_arch')} {config.clip_arch}")
    if not isinstance(arch, str):
        config.fill_in("clip_arch", json.dumps(arch))
    if config.representation_size <= 0 or not isinstance(arch, str):
        size = int(clip_config(arch)["embed_dim"])
        if config.representation_size not in (-1, size):
            raise UserError(
                f"{config.flag('representation_size')} {config.representation_size}: this CLIP's vectors have {size} numbers; "
                "leave it out"
            )
        config.fill_in("representation_size", size)


def read_arch(text: str, where: str) -> str | dict[str, Any]:
    """`clip_arch` as `clip.clip_config` takes it: a name, or the mapping that a JSON file, or JSON itself, holds.

    where: the flag and its value, for messages. Raises UserError.
    """
    path = Path(text).expanduser()
    inline = text.lstrip().startswith("{")
    if not inline and path.suffix != ".json":
        return text
    try:
        found = json.loads(text if inline else path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: can't be read as JSON ({reason(error)})") from None
    found = found.get("model_cfg", found) | _beside(found) if isinstance(found, Mapping) else found
    if not isinstance(found, dict):
        raise UserError(f"{where}: a JSON object with embed_dim, vision_cfg and text_cfg is expected")
    return found


def _beside(found: Mapping[str, Any]) -> dict[str, Any]:
    """`preprocess_cfg`, which stands beside `model_cfg` in the files of the Hugging Face hub."""
    return {key: found[key] for key in ("preprocess_cfg",) if key in found}


def _clip_of(config: Any) -> ImageEncoder:
    return _clip(config.clip_arch, config.clip_weights)


@functools.lru_cache(maxsize=1)  # previews build modalities of their own, beside those of training
def _clip(arch: str, weights: str) -> ImageEncoder:
    return ImageEncoder(read_arch(arch, f"clip_arch {arch}"), weights)


def _clip_texts(config: Any) -> TextEncoder:
    return TextEncoder(read_arch(config.clip_arch, f"clip_arch {config.clip_arch}"), config.clip_weights)


def _clip_described(config: Any) -> dict[str, str]:
    return {"arch": config.clip_arch, "weights": Path(config.clip_weights).name}


SOURCES: dict[str, Source] = {
    "file": Source(_size_of_file, _from_file, unused=("clip_arch", "clip_weights", "representation_normalised")),
    "clip-image": Source(
        _complete_clip, _from_encoder, _clip_of, _clip_described, _clip_texts, unused=("representation_file",)
    ),
}


@dataclass
class RepresentationConfig:
    """Vectors (--mt_task representation)"""

    representation_source: str = option(
        "file", "where they come from: a file, or the image itself by a frozen encoder", SOURCES
    )
    representation_file: str = option(
        "", ".npz or .npy with one vector per image [N, D], in the order of the images", free=True
    )
    representation_size: int = option(-1, "D; -1: that of the file or the encoder", least=1)
    representation_normalised: bool = option(False, "take an encoder's vectors at unit length, not as it gives them")
    representation_hidden: int = option(256, "width of the head's hidden layer; 1024 in the paper", least=1)
    representation_activation: str = option("silu", "behind the head's hidden layer; relu in the paper", ACTIVATIONS)
    representation_token: str = option(
        "linear",
        "how a vector becomes the token that the network attends to: a learned linear map, or vector: as it is, where the "
        "network's context has its width",
        TOKENS,
    )
    clip_arch: str = option("", "source clip-image: an architecture that open_clip knows, or a JSON file of one")
    clip_weights: str = option(
        "",
        f"source clip-image: a file of weights, a name of open_clip's for some, or '{UNTRAINED}': random ones for a trial",
        free=True,
    )


def representation(config: RowConfig, variance: Tensor | None) -> Modality:
    """The modality of the source that the configuration names."""
    return SOURCES[config.representation_source].modality(config, variance)


def complete(config: RowConfig) -> None:
    """Fill in what the flags leave open, and say which say nothing. Raises UserError for a file that can't be read, and where
    something is missing."""
    row = SOURCES[config.representation_source]
    row.complete(config)
    for key in row.unused:
        if getattr(config, key) != getattr(RepresentationConfig, key):
            _say(f"{config.flag(key)} is not used: representation_source is {config.representation_source}")


@functools.cache
def _say(line: str) -> None:
    """A warning, once, and of one process."""
    if rank_of_launcher() == 0:
        log.warning("%s", line)


def head(config: RowConfig, backbone: Backbone) -> nn.Module:
    """The pooled middle features, a hidden layer, and the vector."""
    size, hidden = config.representation_size, config.representation_hidden
    return PooledMLPHead(backbone, size, hidden, config.representation_activation)


def tokens(config: RowConfig, width: int) -> nn.Module:
    """The module that makes a vector a token. Raises UserError where a vector is to be one as it is and has another width."""
    if config.representation_token == "linear":
        return VectorTokens(config.representation_size, width)
    if config.representation_size != width:
        raise UserError(
            f"{config.flag('representation_token')} vector: the vectors have {config.representation_size} numbers, the "
            f"network's context {width}; take linear"
        )
    return VectorAsToken()


def units_size(config: RowConfig) -> int:
    """How long a vector with units of its own is; 0: it has none."""
    return 0 if SOURCES[config.representation_source].encoder is None else config.representation_size
