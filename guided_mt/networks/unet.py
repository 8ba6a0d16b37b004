"""ADM's U-Net (Dhariwal & Nichol 2021): the state-dict names, constructor keywords and numerics of guided-diffusion.

With spatial transformers it is latent-diffusion's. Ours on top: context in ADM's attention (as GLIDE's), an image-like
condition at the first convolution, mixed precision by autocast, `scaled_dot_product_attention`, and `features`, which hands
the decoder heads what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from .layers import (
    AttentionBlock,
    Block,
    BlockSequence,
    Context,
    Downsample,
    ResBlock,
    Upsample,
    attention_heads,
    conv3x3,
    make_output_block,
    timestep_embedding,
    zero_module,
)
from .transformer import SpatialTransformer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    16: (1, 2, 2),
    8: (1, 2),
}


class UNetFeatures(NamedTuple):
    """What decoder heads read, in the input's dtype."""

    last: Tensor  # (B, feature_channels, H, W): input of the output block
    middle: Tensor  # (B, middle_channels, h, w): output of the middle block


class SpatialTransformerOptions(NamedTuple):
    """What `SpatialTransformer` wants to know beyond its width and heads."""

    depth: int = 1
    context_dim: int | None = None
    linear: bool = False


@dataclass(frozen=True)
class BlockFactory:
    """Makes the residual and attention blocks of one network: what they share stands here once."""

    emb_channels: int
    dropout: float = 0.0
    use_checkpoint: bool = False
    num_head_channels: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    use_new_attention_order: bool = False
    spatial_transformer: SpatialTransformerOptions | None = None  # None: ADM's attention

    def resblock(self, channels: int, out_channels: int, resample: str = "none") -> ResBlock:
        return ResBlock(
            channels,
            out_channels,
            self.emb_channels,
            dropout=self.dropout,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resample=resample,
            use_checkpoint=self.use_checkpoint,
        )

    def attention(self, channels: int, num_heads: int) -> Block:
        if self.spatial_transformer is not None:
            return SpatialTransformer(
                channels,
                attention_heads(channels, num_heads, self.num_head_channels),
                **self.spatial_transformer._asdict(),
                use_checkpoint=self.use_checkpoint,
            )
        return AttentionBlock(
            channels,
            num_heads=num_heads,
            num_head_channels=self.num_head_channels,
            use_new_attention_order=self.use_new_attention_order,
            use_checkpoint=self.use_checkpoint,
        )

    def downsample(self, channels: int) -> Block:
        if self.resblock_updown:
            return self.resblock(channels, channels, "down")
        return Downsample(channels, self.conv_resample)

    def upsample(self, channels: int) -> Block:
        if self.resblock_updown:
            return self.resblock(channels, channels, "up")
        return Upsample(channels, self.conv_resample)


class UNetEncoder(nn.Module):
    """The half that ADM's U-Net and its classifier share: embeddings, input blocks, middle block (ADM's names).

    attention_resolutions holds down-sampling factors, as in ADM's constructor (not pixels, as on its command line).
    """

    def __init__(
        self,
        make: BlockFactory,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        channel_mult: Sequence[float],
        num_heads: int,
        num_classes: int | None = None,
        context_dim: int | None = None,
        condition_channels: int = 0,
        precision: str = "fp32",
    ):
        super().__init__()
        if precision not in PRECISIONS:
            raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.condition_channels = condition_channels
        self.precision = precision
        self.size_divisor = 2 ** (len(channel_mult) - 1)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, make.emb_channels), nn.SiLU(), nn.Linear(make.emb_channels, make.emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, make.emb_channels)

        self.widths = [int(mult * model_channels) for mult in channel_mult]
        channels = self.input_channels = self.widths[0]
        self.input_blocks = nn.ModuleList([BlockSequence(conv3x3(in_channels, channels))])
        self.skip_channels = [channels]  # output channels of every input block
        for level, width in enumerate(self.widths):
            for _ in range(num_res_blocks):
                blocks: list[Block] = [make.resblock(channels, width)]
                if 2**level in attention_resolutions:
                    blocks.append(make.attention(width, num_heads))
                self.input_blocks.append(BlockSequence(*blocks))
                channels = width
                self.skip_channels.append(channels)
            if level < len(self.widths) - 1:
                self.input_blocks.append(BlockSequence(make.downsample(channels)))
                self.skip_channels.append(channels)
        self.middle_block = BlockSequence(
            make.resblock(channels, channels), make.attention(channels, num_heads), make.resblock(channels, channels)
        )
        self.middle_channels = channels
        if condition_channels:
            # The columns that a wider first convolution would have. Apart, so that `input_blocks.0.0.weight` keeps
            # ADM's shape; zero, so that a loaded model's output doesn't change before training. What they were before is
            # drawn from a copy of the generator, so that the other weights start as they would without them.
            with torch.random.fork_rng(devices=[]):
                self.condition_in = zero_module(conv3x3(condition_channels, self.input_channels, bias=False))

    def to_fast_layout(self) -> UNetEncoder:
        """Put the convolutions in the device's fastest memory format; call once after moving the model. Returns self.

        CUDA: channels-last, which its tensor cores read without transposing. CPU: contiguous, since oneDNN's
        convolutions gain little from channels-last and group norm loses more (2 to 5 % of a whole step).
        Parameters keep their shapes, but files that want contiguous tensors (safetensors) need `.contiguous()`.
        """
        on_cuda = next(self.parameters()).is_cuda
        return self.to(memory_format=torch.channels_last if on_cuda else torch.contiguous_format)

    def autocast(self, x: Tensor) -> torch.autocast:
        """Mixed precision as `self.precision` says, whatever the caller's autocast."""
        enabled = self.precision != "fp32"
        return torch.autocast(x.device.type, dtype=PRECISIONS[self.precision] if enabled else None, enabled=enabled)

    def check_inputs(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, context: Tensor | None, condition: Tensor | None
    ) -> None:
        """UserError for inputs this network can't take. Looks at shapes only, so it costs nothing when compiled."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"x must be [B, {self.in_channels}, H, W], not {list(x.shape)}")
        batch, _, height, width = x.shape
        if height % self.size_divisor or width % self.size_divisor:
            raise UserError(
                f"height and width must be multiples of {self.size_divisor} for this network, not {height} x {width}"
            )
        if timesteps.shape != (batch,):
            raise UserError(f"timesteps must be [{batch}], not {list(timesteps.shape)}")
        if y is None and self.num_classes is not None:
            raise UserError("y is missing: the model is class-conditional")
        if y is not None and self.num_classes is None:
            raise UserError("y given to a model without classes")
        if y is not None and y.shape != (batch,):
            raise UserError(f"y must be [{batch}], not {list(y.shape)}")
        if condition is None and self.condition_channels:
            raise UserError(f"condition [B, {self.condition_channels}, H, W] is missing")
        if condition is not None and not self.condition_channels:
            raise UserError("condition given to a model without condition_channels")
        if condition is not None and condition.shape != (batch, self.condition_channels, height, width):
            raise UserError(
                f"condition must be {[batch, self.condition_channels, height, width]}, not {list(condition.shape)}"
            )
        if context is not None and self.context_dim is None:
            raise UserError("context given to a model without context_dim")
        if context is not None and (
            context.ndim != 3 or context.shape[0] != batch or context.shape[2] != self.context_dim
        ):
            raise UserError(f"context must be [{batch}, L, {self.context_dim}], not {list(context.shape)}")

    def embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """Timesteps [B], and classes [B] if any (-1: this sample has none) -> embedding [B, emb_channels]."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))
        return emb if y is None else emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]

    def encode(self, x: Tensor, emb: Tensor, context: Context | None, condition: Tensor | None) -> list[Tensor]:
        """The outputs of every input block, then of the middle block."""
        h = self.input_blocks[0][0](x)
        if condition is not None:
            h = h + self.condition_in(condition)
        outputs = [h]
        for block in self.input_blocks[1:]:
            outputs.append(block(outputs[-1], emb, context))
        outputs.append(self.middle_block(outputs[-1], emb, context))
        return outputs


class UNetModel(UNetEncoder):
    """ADM's U-Net: x [B, in_channels, H, W], timesteps [B] -> [B, out_channels, H, W] (ADM, unet.py: same names).

    context_dim: width of an optional context [B, L, context_dim] that every attention block attends to.
    use_spatial_transformer: latent-diffusion's attention, `transformer_depth` blocks each, in the place of ADM's.
    condition_channels: channels of an image-like condition, concatenated to x as it were (see `condition_in`).
    precision: "fp32", "bf16" or "fp16" inside `features`; group norm, output block and output are float32 always.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        context_dim: int | None = None,
        condition_channels: int = 0,
        precision: str = "fp32",
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        use_linear_in_transformer: bool = False,
    ):
        make = BlockFactory(
            emb_channels=4 * model_channels,
            dropout=dropout,
            use_checkpoint=use_checkpoint,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            use_new_attention_order=use_new_attention_order,
            spatial_transformer=SpatialTransformerOptions(transformer_depth, context_dim, use_linear_in_transformer)
            if use_spatial_transformer
            else None,
        )
        super().__init__(
            make,
            image_size=image_size,
            in_channels=in_channels,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            channel_mult=channel_mult,
            num_heads=num_heads,
            num_classes=num_classes,
            context_dim=context_dim,
            condition_channels=condition_channels,
            precision=precision,
        )
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        channels, skip_channels = self.middle_channels, list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(num_res_blocks + 1):
                blocks: list[Block] = [make.resblock(channels + skip_channels.pop(), width)]
                if 2**level in attention_resolutions:
                    blocks.append(make.attention(width, heads_up))
                if level and i == num_res_blocks:
                    blocks.append(make.upsample(width))
                self.output_blocks.append(BlockSequence(*blocks))
                channels = width
        self.feature_channels = channels
        self.out_channels = out_channels
        self.out = make_output_block(channels, self.input_channels, out_channels)
        if context_dim is not None:
            for module in self.modules():
                if isinstance(module, AttentionBlock):
                    module.add_context(context_dim)

    def features(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        condition: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> UNetFeatures:
        """What the output block and the heads read. x [B, in_channels, H, W], timesteps [B] (may be fractional).

        y [B]: classes, -1 for none; context [B, L, context_dim], context_mask bool [B, L]: False leaves a token out;
        condition [B, condition_channels, H, W].
        """
        self.check_inputs(x, timesteps, y, context, condition)
        return self._features(
            x, self.embed(timesteps, y), None if context is None else Context(context, context_mask), condition
        )

    def _features(self, x: Tensor, emb: Tensor, context: Context | None, condition: Tensor | None) -> UNetFeatures:
        with self.autocast(x):
            *skips, middle = self.encode(x, emb, context, condition)
            h = middle
            for block in self.output_blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return UNetFeatures(last=h.to(x.dtype), middle=middle.to(x.dtype))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The output [B, out_channels, H, W], in x's dtype. Arguments as `features`."""
        return self.output(self.features(x, timesteps, y, context, condition))

    def output(self, features: UNetFeatures) -> Tensor:
        """ADM's output block on the features, outside autocast: [B, out_channels, H, W]."""
        with torch.autocast(features.last.device.type, enabled=False):
            return self.out(features.last)


# --- from command-line values ----------------------------------------------------------------------------------------


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
