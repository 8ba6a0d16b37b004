"""ADM's noisy classifier: the encoder of its U-Net with a pooling head (guided-diffusion, same names)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError
from .create import parse_attention_resolutions, parse_channel_mult
from .layers import GroupNorm32, attention_heads, linear1x1, split_heads, zero_module
from .unet_encoder import BlockFactory, UNetEncoder

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
HEAD_CHANNELS = 64  # per attention head, fixed in ADM
SPATIAL_HIDDEN = 2048  # width of the hidden layer of ADM's two spatial pools


class AttentionPool2d(nn.Module):
    """CLIP's attention pool (ADM's `AttentionPool2d`): [B, channels, size, size] -> [B, out_channels].

    One query, the mean over positions, attends to itself and to every position.
    """

    def __init__(self, size: int, channels: int, num_head_channels: int, out_channels: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = attention_heads(channels, 1, num_head_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, S, S] -> [B, output channels], in the dtype of the features."""
        tokens = x.flatten(2)  # (B, C, HW)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1) + self.positional_embedding
        q, k, v = split_heads(linear1x1(self.qkv_proj, tokens.transpose(1, 2)), 3, self.num_heads, new_order=True)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # only the mean's row is read
        return linear1x1(self.c_proj, pooled.transpose(1, 2).flatten(2))[:, 0]


class EncoderUNetModel(UNetEncoder):
    """ADM's classifier of noisy images: x [B, in_channels, H, W], timesteps [B] -> logits [B, out_channels].

    pool: "adaptive" (mean), "attention", or "spatial" / "spatial_v2" (an MLP on the means of every block's output).
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
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
        precision: str = "fp32",
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
            precision=precision,
        )
        self.pool = pool
        self.out_channels = out_channels
        channels = self.middle_channels
        pooled_channels = sum(self.skip_channels) + channels  # what the spatial pools read
        if pool == "adaptive":
            self.out = nn.Sequential(
                GroupNorm32(channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zero_module(nn.Conv2d(channels, out_channels, 1)),
                nn.Flatten(),
            )
        elif pool == "attention":
            size = image_size // self.size_divisor
            head = AttentionPool2d(size, channels, num_head_channels, out_channels)
            self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), head)
        elif pool == "spatial":
            self.out = nn.Sequential(
                nn.Linear(pooled_channels, SPATIAL_HIDDEN), nn.ReLU(), nn.Linear(SPATIAL_HIDDEN, out_channels)
            )
        elif pool == "spatial_v2":
            self.out = nn.Sequential(
                nn.Linear(pooled_channels, SPATIAL_HIDDEN),
                GroupNorm32(SPATIAL_HIDDEN),
                nn.SiLU(),
                nn.Linear(SPATIAL_HIDDEN, out_channels),
            )
        else:
            raise UserError(f"--classifier_pool must be one of {', '.join(POOLS)}, not {pool!r}")

    @override
    def check_inputs(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> None:
        super().check_inputs(x, timesteps, y, context, condition)
        if self.pool == "attention" and x.shape[2:] != (self.image_size, self.image_size):
            raise UserError(f"attention pooling needs images of size {self.image_size}, not {list(x.shape)}")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The logits [B, out_channels], in x's dtype."""
        self.check_inputs(x, timesteps)
        emb = self.embed(timesteps, None)
        with self.autocast(x):
            outputs = self.encode(x, emb, None, None)
        with torch.autocast(x.device.type, enabled=False):
            if self.pool.startswith("spatial"):
                return self.out(torch.cat([h.to(x.dtype).mean(dim=(2, 3)) for h in outputs], dim=-1))
            return self.out(outputs[-1].to(x.dtype))


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> EncoderUNetModel:
    """The noisy classifier for ADM's command-line values (ADM, script_util.py: same keywords). Raises UserError."""
    mult = parse_channel_mult("", image_size)
    attended = parse_attention_resolutions(
        classifier_attention_resolutions, image_size, "classifier_attention_resolutions"
    )
    widths = [int(m * classifier_width) for m in mult]
    for width in [*(width for level, width in enumerate(widths) if 2**level in attended), widths[-1]]:
        if width % HEAD_CHANNELS:
            raise UserError(
                f"--classifier_width {classifier_width} makes an attention layer of {width} channels; its heads have "
                f"{HEAD_CHANNELS} each, so take a multiple of {HEAD_CHANNELS}"
            )
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=attended,
        channel_mult=mult,
        num_head_channels=HEAD_CHANNELS,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        precision="fp16" if classifier_use_fp16 else "fp32",
    )
