"""Encoder and decoder of LDM's first stages: its layers, state-dict names and numerics (Rombach et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_mt.errors import UserError

from .ddconfig import NORM_GROUPS, DDConfig

NORM_EPS = 1e-6


def normalize(channels: int, groups: int) -> nn.GroupNorm:
    """LDM's `Normalize`: group norm, eps 1e-6."""
    if channels % groups:
        raise UserError(
            f"ddconfig: a layer would have {channels} channels, but group norm needs a multiple of {groups}: change ch or ch_mult"
        )
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of the image."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResnetBlock(nn.Module):
    """[B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, config: DDConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = normalize(in_channels, config.norm_groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = normalize(out_channels, config.norm_groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over positions with one head of all channels."""

    def __init__(self, channels: int, groups: int = NORM_GROUPS):
        super().__init__()
        self.norm = normalize(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape; one head, over all positions."""
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H W, C)
        return x + self.proj_out(attended[:, 0].transpose(1, 2).reshape(x.shape))


def make_attention(config: DDConfig, channels: int) -> nn.Module:
    """The attention that the configuration names; the identity for `attn_type: none`."""
    return AttnBlock(channels, config.norm_groups) if config.attn_type == "vanilla" else nn.Identity()


class Downsample(nn.Module):
    """Half the size: a strided convolution padded at right and bottom only, or the mean of each 2x2."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H / 2, W / 2]; padded at the right and the bottom, as in latent-diffusion."""
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Twice the size by repetition, and a convolution `with_conv`."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2 H, 2 W]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Level(nn.Module):
    """What encoder and decoder do at one resolution: blocks, each followed by attention where there is any."""

    downsample: nn.Module  # of the encoder's levels but the last
    upsample: nn.Module  # of the decoder's levels but the last

    def __init__(self, config: DDConfig, channels: int, out_channels: int, blocks: int, resolution: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(config, out_channels if i else channels, out_channels) for i in range(blocks)
        )
        attended = blocks if resolution in config.attn_resolutions else 0
        self.attn = nn.ModuleList(make_attention(config, out_channels) for _ in range(attended))

    def forward(self, h: Tensor) -> Tensor:
        """h [B, C, H, W] through the level's blocks, each with its attention where there is one -> [B, C', H, W]."""
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    """The innermost part of encoder and decoder: block, attention, block."""

    def __init__(self, config: DDConfig, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(config, channels, channels)
        self.attn_1 = make_attention(config, channels)
        self.block_2 = ResnetBlock(config, channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """h [B, C, H, W] -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> [B, z_channels or 2 z_channels (double_z), H / f, W / f]."""

    def __init__(self, config: DDConfig):
        super().__init__()
        self.conv_in = conv3x3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        channels, resolution = config.ch, config.resolution
        for i, mult in enumerate(config.ch_mult):
            level = Level(config, channels, config.ch * mult, config.num_res_blocks, resolution)
            channels = config.ch * mult
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(channels, config.resamp_with_conv)
                resolution //= 2
            self.down.append(level)
        self.mid = Middle(config, channels)
        self.norm_out = normalize(channels, config.norm_groups)
        self.conv_out = conv3x3(channels, config.z_channels * (2 if config.double_z else 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, S, S] -> moments or latents [B, D, s, s], s = S / downsampling."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # type: ignore[operator]
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, out_ch, f h, f w]."""

    def __init__(self, config: DDConfig):
        super().__init__()
        channels, resolution = config.ch * config.ch_mult[-1], config.resolution // config.downsampling
        self.tanh_out = config.tanh_out
        self.conv_in = conv3x3(config.z_channels, channels)
        self.mid = Middle(config, channels)
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(config.ch_mult))):
            level = Level(config, channels, config.ch * mult, config.num_res_blocks + 1, resolution)
            channels = config.ch * mult
            if i:
                level.upsample = Upsample(channels, config.resamp_with_conv)
                resolution *= 2
            self.up.insert(0, level)  # numbered as the encoder's
        self.norm_out = normalize(channels, config.norm_groups)
        self.conv_out = conv3x3(channels, config.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, D, s, s] -> images [B, C, S, S], in [-1, 1] with `tanh_out` alone."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # type: ignore[operator]
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
