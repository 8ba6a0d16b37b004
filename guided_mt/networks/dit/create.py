"""Diffusion transformers from command-line values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import UserError, nearest
from .network import DiT


class Size(NamedTuple):
    """One of the published sizes (Peebles and Xie 2023, table 1), without its patches."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES = {"S": Size(12, 384, 6), "B": Size(12, 768, 12), "L": Size(24, 1024, 16), "XL": Size(28, 1152, 16)}
PATCHES = (2, 4, 8)
NAMES = tuple(f"{size}/{patch}" for size in SIZES for patch in PATCHES)


def parse_size(name: str) -> tuple[Size, int]:
    """ "B/2" as its numbers and the side of its patches. Raises UserError for no such size."""
    if name not in NAMES:
        raise UserError(f"--dit_size {name}: choose from {', '.join(NAMES)}{nearest(name, NAMES)}")
    size, _, patch = name.partition("/")
    return SIZES[size], int(patch)


def hidden_size(dit_size: str, dit_hidden_size: int = -1) -> int:
    """The width of the tokens, for the command-line values of these names."""
    return dit_hidden_size if dit_hidden_size > 0 else parse_size(dit_size)[0].hidden_size


def create_dit(
    image_size: int,
    dit_size: str = "S/2",
    dit_patch_size: int = -1,
    dit_hidden_size: int = -1,
    dit_depth: int = -1,
    dit_num_heads: int = -1,
    dit_mlp_ratio: float = 4.0,
    dit_context: str = "cross",
    dit_middle: int = -1,
    class_cond: bool = False,
    num_classes: int = 1000,
    learn_sigma: bool = False,
    in_channels: int = 3,
    *,
    factory: Callable[..., DiT] | None = None,
    **kwargs: Any,
) -> DiT:
    """The transformer for command-line values; -1: as `dit_size` says. factory: the class to build, which also gets **kwargs."""
    size, patch_size = parse_size(dit_size)

    def chosen(value: int, published: int) -> int:
        return published if value == -1 else value

    return (factory or DiT)(
        input_size=image_size,
        patch_size=chosen(dit_patch_size, patch_size),
        in_channels=in_channels,
        hidden_size=chosen(dit_hidden_size, size.hidden_size),
        depth=chosen(dit_depth, size.depth),
        num_heads=chosen(dit_num_heads, size.num_heads),
        mlp_ratio=dit_mlp_ratio,
        num_classes=num_classes if class_cond else None,
        learn_sigma=learn_sigma,
        context=dit_context,
        middle=None if dit_middle == -1 else dit_middle,
        **kwargs,
    )
