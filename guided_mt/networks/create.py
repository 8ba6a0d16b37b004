"""Networks from ADM's command-line values (guided-diffusion, script_util.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .unet import UNetModel

DEFAULT_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    16: (1, 2, 2),
    8: (1, 2),
}


def parse_channel_mult(channel_mult: str, image_size: int) -> tuple[float, ...]:
    """ADM's --channel_mult ("1,2,3,4"; "" chooses by image size) as numbers."""
    if not channel_mult:
        if image_size not in DEFAULT_CHANNEL_MULT:
            raise UserError(f"image size {image_size} has no default --channel_mult: pass one, e.g. 1,2,2,2")
        return DEFAULT_CHANNEL_MULT[image_size]
    try:
        multipliers = tuple(float(part) for part in str(channel_mult).split(","))
    except ValueError:
        raise UserError(f"--channel_mult must be numbers separated by commas, not {channel_mult!r}") from None
    if min(multipliers) <= 0:
        raise UserError(f"--channel_mult must be positive, not {channel_mult!r}")
    divisor = 2 ** (len(multipliers) - 1)
    if image_size % divisor:
        raise UserError(
            f"--image_size {image_size} can't be halved {len(multipliers) - 1} times, as the {len(multipliers)} levels "
            f"of --channel_mult {channel_mult} need: use a multiple of {divisor}"
        )
    return multipliers


def parse_attention_resolutions(attention_resolutions: str, image_size: int, flag: str) -> tuple[int, ...]:
    """ADM's image sizes at which to attend ("32,16,8") as down-sampling factors; sizes that don't occur do nothing."""
    try:
        sizes = [int(part) for part in str(attention_resolutions).split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--{flag} must be integers separated by commas, not {attention_resolutions!r}") from None
    if any(size < 1 for size in sizes):
        raise UserError(f"--{flag} must be positive, not {attention_resolutions!r}")
    return tuple(image_size // size for size in sizes)


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    context_dim: int | None = None,
    condition_channels: int = 0,
    precision: str | None = None,
    factory: Callable[..., UNetModel] | None = None,
    **kwargs: Any,
) -> UNetModel:
    """The U-Net for ADM's command-line values (ADM, script_util.py: same keywords).

    precision: None means "fp16" if use_fp16, else "fp32". factory: the class to build, which also gets **kwargs.
    """
    return (factory or UNetModel)(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=(2 if learn_sigma else 1) * in_channels,
        num_res_blocks=num_res_blocks,
        attention_resolutions=parse_attention_resolutions(attention_resolutions, image_size, "attention_resolutions"),
        dropout=dropout,
        channel_mult=parse_channel_mult(channel_mult, image_size),
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
        context_dim=context_dim,
        condition_channels=condition_channels,
        precision=precision or ("fp16" if use_fp16 else "fp32"),
        **kwargs,
    )
