"""What ADM's U-Net and its noisy classifier share: their blocks, and the encoder (Dhariwal & Nichol 2021; ADM's names)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inputs import CheckedInputs
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
    timestep_embedding,
    zero_module,
)
from .routing import Route
from .transformer import SpatialTransformer


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
        """A residual block from `channels` to `out_channels`; `resample` is "none", "up" or "down"."""
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
        """ADM's attention, or latent-diffusion's transformer where `spatial_transformer` is set."""
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
        """What halves height and width at `channels`: a residual block with `resblock_updown`, else a plain layer."""
        if self.resblock_updown:
            return self.resblock(channels, channels, "down")
        return Downsample(channels, self.conv_resample)

    def upsample(self, channels: int) -> Block:
        """What doubles height and width at `channels`: a residual block with `resblock_updown`, else a plain layer."""
        if self.resblock_updown:
            return self.resblock(channels, channels, "up")
        return Upsample(channels, self.conv_resample)


class UNetEncoder(CheckedInputs):
    """The part that ADM's U-Net and its classifier share: embeddings, input blocks, middle block (ADM's names).

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
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.condition_channels = condition_channels
        self.set_precision(precision)
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

    def embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """Timesteps [B], and classes [B] if any (-1: this sample has none) -> embedding [B, emb_channels]."""
        dtype: Any = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        return emb if y is None else emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]

    def encode(
        self,
        x: Tensor,
        emb: Tensor,
        context: Context | None,
        condition: Tensor | None,
        route: Route | None = None,
    ) -> list[Tensor]:
        """The outputs of every input block, then of the middle block."""
        h = self.input_blocks[0][0](x)  # type: ignore[index]  # a sequence of one
        if condition is not None:
            h = h + self.condition_in(condition)
        outputs = [h]
        for block in self.input_blocks[1:]:
            outputs.append(block(outputs[-1], emb, context, route))
        outputs.append(self.middle_block(outputs[-1], emb, context, route))
        return outputs
