"""ADM's U-Net (Dhariwal & Nichol 2021): the state-dict names, constructor keywords and numerics of guided-diffusion.

With spatial transformers it is latent-diffusion's. Ours on top: context in ADM's attention (as GLIDE's), an image-like
condition at the first convolution, mixed precision by autocast, `scaled_dot_product_attention`, and `features`, which hands
the decoder heads what they read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from .backbone import Backbone, Features, read_last
from .layers import AttentionBlock, Block, BlockSequence, Context, make_output_block
from .routing import Route
from .unet_encoder import BlockFactory, SpatialTransformerOptions, UNetEncoder


class UNetModel(UNetEncoder, Backbone):
    """ADM's U-Net: x [B, in_channels, H, W], timesteps [B] -> [B, out_channels, H, W] (ADM, unet.py: same names).

    context_dim: width of an optional context [B, L, context_dim] that every attention block attends to.
    use_spatial_transformer: latent-diffusion's attention, `transformer_depth` blocks each, in the place of ADM's.
    condition_channels: channels of an image-like condition, concatenated to x as it were (see `condition_in`).
    precision: "fp32", "bf16" or "fp16" inside `features`; group norm, output block and output are float32 always.
    """

    routes = True

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
        self.out = self.make_output(out_channels)
        if context_dim is not None:
            for module in self.modules():
                if isinstance(module, AttentionBlock):
                    module.add_context(context_dim)

    @override
    def features(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        condition: Tensor | None = None,
        context_mask: Tensor | None = None,
        route: Route | None = None,
    ) -> Features:
        self.check_inputs(x, timesteps, y, context, condition)
        emb = self.embed(timesteps, y)
        seen = None if context is None else Context(context, context_mask)
        with self.autocast(x):
            *skips, middle = self.encode(x, emb, seen, condition, route)
            h = middle
            for block in self.output_blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, seen, route)
        return Features(last=h.to(x.dtype), middle=middle.to(x.dtype))

    def output(self, features: Features) -> Tensor:
        """ADM's output block on the features, outside autocast: [B, out_channels, H, W]."""
        return read_last(self.out, features.last, features.embedding)

    @property
    @override
    def trunk(self) -> nn.Module:
        return self.middle_block

    def make_output(self, channels: int) -> nn.Module:
        """ADM's output block (norm, SiLU, zero convolution) to so many channels."""
        return make_output_block(self.feature_channels, self.input_channels, channels)

    @override
    def context_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for name, parameter in self.named_parameters() if ".encoder_kv." in name)
