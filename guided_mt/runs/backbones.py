"""The networks that everything is built on, as rows of a table: `--mt_backbone`, with the flags that only one of them has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import UserError
from ..networks.create import create_model
from ..networks.dit import CONTEXTS
from ..networks.dit.create import NAMES, create_dit, hidden_size
from ..networks.model import MTDiT, MTUNet
from ..networks.multi_task import MultiTask
from .config import Config, ModelConfig, option


@dataclass
class DiTConfig:
    """Transformer (--mt_backbone dit)"""

    dit_size: str = option("S/2", "depth, width and heads of a published size, and the side of its patches", NAMES)
    dit_patch_size: int = option(-1, "side of a patch in pixels; -1: that of dit_size", least=1)
    dit_hidden_size: int = option(-1, "width of a token; -1: that of dit_size", least=4)
    dit_depth: int = option(-1, "number of blocks; -1: that of dit_size", least=2)
    dit_num_heads: int = option(-1, "attention heads; -1: those of dit_size", least=1)
    dit_mlp_ratio: float = option(4.0, "width of the feed-forward layers as a multiple of a token's", least=0.1)
    dit_context: str = option(
        "cross",
        "how labels, captions and vectors enter: each block attends to them, or they stand in the sequence before the image",
        CONTEXTS,
    )
    dit_middle: int = option(-1, "the block whose output heads read as middle features; -1: half of the depth", least=1)


def _of_unet(flags: Mapping[str, Any]) -> int:
    return 4 * flags["num_channels"]  # the width of ADM's timestep embedding


def _of_dit(flags: Mapping[str, Any]) -> int:
    return hidden_size(flags["dit_size"], flags["dit_hidden_size"])


@dataclass(frozen=True)
class BackboneRow:
    """make: the flags of "Model" and of `options`, `learn_sigma`, `context_dim`, and the keywords of `MultiTask` -> the untrained
    network.

    options: flags of its own, a dataclass of `option`s. reads: the flags of "Model" that it knows, None for all; another one on the
    command line is refused. context_width: flags -> the width of tokens where --mt_context_dim says none.
    """

    make: Callable[..., MultiTask]
    options: type | None = None
    reads: Collection[str] | None = None
    context_width: Callable[[Mapping[str, Any]], int] = _of_unet


BACKBONES: dict[str, BackboneRow] = {
    "unet": BackboneRow(partial(create_model, factory=MTUNet)),  # type: ignore[arg-type]  # what the factory makes
    "dit": BackboneRow(
        partial(create_dit, factory=MTDiT),  # type: ignore[arg-type]
        DiTConfig,
        ("image_size", "class_cond", "num_classes", "use_checkpoint", "precision"),
        _of_dit,
    ),
}

_NOT_FOR_NETWORKS = ("use_fp16", "compile")  # parsing turns the first into the precision; runs compile what they made


def backbone_sections() -> list[type]:
    """The flags that single backbones have."""
    return list(dict.fromkeys(row.options for row in BACKBONES.values() if row.options is not None))


def build_backbone(name: str, config: Config, context_dim: int, **keywords: Any) -> MultiTask:
    """The untrained network of the row `name`; context_dim: -1 for the row's own, keywords: over the flags, and `MultiTask`'s.

    Raises UserError for a flag on the command line that this network has no use for, and for sizes that don't fit.
    """
    row, known = BACKBONES[name], config.as_dict(ModelConfig)
    read = [key for key in (row.reads or known) if key not in _NOT_FOR_NETWORKS]
    own = [f.name for f in dataclasses.fields(row.options)] if row.options else []
    others = [f.name for section in backbone_sections() for f in dataclasses.fields(section) if f.name not in own]
    for key in [*(key for key in known if key not in (*read, *_NOT_FOR_NETWORKS)), *others]:
        if key in config.words:
            raise UserError(f"--{key}: --mt_backbone {name} has no use for it; leave it out")
    flags = {key: known[key] for key in read}
    if row.options:
        flags |= {key: getattr(config, key) for key in own}
    width = context_dim if context_dim > 0 else row.context_width({**known, **flags})
    return row.make(**{**flags, "context_dim": width, **keywords})
