"""The diffusion transformers of latents: the shared one of guided_mt under the constructor keywords of DiT and SiT."""

from __future__ import annotations

import inspect
from typing import Any

from guided_mt.errors import UserError
from guided_mt.networks.dit import CONTEXTS
from guided_mt.networks.dit import DiT as SharedDiT
from guided_mt.networks.dit.create import parse_size
from guided_mt.networks.dit.network import check_sizes
from guided_mt.networks.inputs import PRECISIONS


def dit_options(
    input_size: int = 32,
    patch_size: int | None = None,
    in_channels: int = 4,
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float = 4.0,
    class_dropout_prob: float = 0.1,
    num_classes: int | None = 1000,
    learn_sigma: bool = True,
    size: str = "XL/2",
    context_dim: int | None = None,
    context: str = "cross",
    middle: int | None = None,
    use_checkpoint: bool = False,
    precision: str = "fp32",
) -> dict[str, Any]:
    """DiT's keywords (the `params` of an `unet_config`) -> those of `guided_mt.networks.dit.DiT`.

    From `size` on they are ours: `size` is one of the published ones and fills in patch_size, hidden_size, depth and num_heads
    where they are not given; XL/2 has DiT's own defaults. Raises UserError for sizes that don't fit together.
    """
    chosen = (("context", context, CONTEXTS), ("precision", precision, PRECISIONS))
    for name, value, known in chosen:
        if value not in known:
            raise UserError(f"unet_config: {name} '{value}' is none of {', '.join(known)}")
    if num_classes is not None and num_classes < 1:
        raise UserError(f"unet_config: num_classes {num_classes}: write how many, or null for none")
    try:
        published, patch = parse_size(size)
        options: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch if patch_size is None else patch_size,
            "hidden_size": published.hidden_size if hidden_size is None else hidden_size,
            "depth": published.depth if depth is None else depth,
            "num_heads": published.num_heads if num_heads is None else num_heads,
            "middle": middle,
        }
        check_sizes(**options)
    except UserError as error:  # it names the flags of pixel models
        said = str(error).replace("--image_size", "input_size").replace("--dit_", "")
        raise UserError(f"unet_config: {said}") from None
    return {
        **options,
        "in_channels": in_channels,
        "mlp_ratio": mlp_ratio,
        "class_dropout_prob": class_dropout_prob,
        "num_classes": num_classes,
        "learn_sigma": learn_sigma,
        "context_dim": context_dim,
        "context": context,
        "use_checkpoint": use_checkpoint,
        "precision": precision,
    }


class DiT(SharedDiT):
    """facebookresearch's `DiT(**unet_config.params)`. Keywords as `dit_options`."""

    __signature__ = inspect.signature(dit_options)  # what a configuration may hold

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(**dit_options(*args, **keywords))


def sit_options(*args: Any, **keywords: Any) -> dict[str, Any]:
    """As `dit_options`, for a network that says no variances: with learn_sigma its final layer has twice the channels, of which
    the first half is used (willisma/SiT). Raises UserError likewise."""
    return {**dit_options(*args, **keywords), "drops_sigma": True}


class SiT(SharedDiT):
    """SiT's `SiT(**unet_config.params)`, which REPA's networks are too, with learn_sigma false. Keywords as `dit_options`."""

    __signature__ = inspect.signature(dit_options)

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(**sit_options(*args, **keywords))
