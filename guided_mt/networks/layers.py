"""The layers of the networks: ADM's blocks under ADM's names (Dhariwal & Nichol 2021), and what reads context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from ..errors import UserError
from .routing import Route

NORM_GROUPS = 32
Network = TypeVar("Network", bound="FastLayout")
Part = TypeVar("Part", bound=nn.Module)


class FastLayout(nn.Module):
    """A network with convolutions."""

    def to_fast_layout(self: Network) -> Network:
        """Put the convolutions in the device's fastest memory format; call once after moving the network. Returns self.

        CUDA: channels-last, which its tensor cores read without transposing. CPU: contiguous, since oneDNN's
        convolutions gain little from channels-last and group norm loses more (2 to 5 % of a whole step).
        Parameters keep their shapes, but files that want contiguous tensors (safetensors) need `.contiguous()`.
        """
        parameter = next(self.parameters(), None)
        on_cuda = parameter is not None and parameter.is_cuda
        return self.to(memory_format=torch.channels_last if on_cuda else torch.contiguous_format)


class Context(NamedTuple):
    """What attention reads besides the image: tokens [B, L, context_dim]; mask bool [B, L], False leaves a token out."""

    tokens: Tensor
    mask: Tensor | None = None


class GroupNorm32(nn.GroupNorm):
    """Group norm over 32 groups; statistics and affine map in float32 whatever the dtype of x."""

    def __init__(self, channels: int, eps: float = 1e-5):
        if channels % NORM_GROUPS:
            raise UserError(
                f"a layer would have {channels} channels, but group norm needs a multiple of {NORM_GROUPS}: change "
                "--num_channels (classifier: --classifier_width; LDM's YAML: model_channels) or --channel_mult"
            )
        super().__init__(NORM_GROUPS, channels, eps)

    def modulated(self, x: Tensor, scale_shift: Tensor) -> Tensor:
        """norm(x) * (1 + scale) + shift as one group norm; x [B, C, H, W], scale_shift [B, 2C].

        Seen as one sample of B * C channels, the affine map may differ per sample: fewer passes over x, and the plain
        norm's output needn't be kept for backward.
        """
        scale, shift = scale_shift.to(self.weight.dtype).chunk(2, dim=1)  # (B, C) each
        weight = self.weight * (1 + scale)
        bias = self.bias * (1 + scale) + shift
        batch, channels, *size = x.shape
        flat = x.reshape(1, batch * channels, *size)
        # Not F.group_norm, which refuses a group of one value (32 channels of size 1 x 1).
        normed = torch.group_norm(flat, batch * NORM_GROUPS, weight.flatten(), bias.flatten(), self.eps)
        return normed.view(x.shape)


def zero_module(module: Part) -> Part:
    """The module with all parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size of the image, or halves it with `stride` 2."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


def make_output_block(channels_in: int, hidden: int, out_channels: int) -> nn.Sequential:
    """ADM's output block: norm over `channels_in`, SiLU, zero convolution from `hidden` (ADM's `out`, same names).

    In ADM `channels_in` and `hidden` are the same number, reached by two ways.
    """
    return nn.Sequential(GroupNorm32(channels_in), nn.SiLU(), zero_module(conv3x3(hidden, out_channels)))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids [B, dim] of timesteps [B] (may be fractional): cosines, then sines; float32 (ADM, nn.py)."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class Block(nn.Module):
    """A part that runs `compute(x, emb, context)`, with activations recomputed in backward if `use_checkpoint`.

    residual: whether it adds to `bypass(x)`, so that it can be routed.
    """

    use_checkpoint = False
    residual = False

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None, route: Route | None = None) -> Tensor:
        """x [B, C, H, W], emb [B, E] and the tokens of the context -> [B, C', H', W'].

        With `use_checkpoint` it is computed once more in the backward pass. route: a residual block computes on the channels of its
        window m alone, block(x m) + bypass(x (1 - m)).
        """
        if route is None or not self.residual:
            return self._computed(x, emb, context)
        inside = x * route.mask(x.shape[1]).to(x.dtype)
        return self._computed(inside, emb, context) + self.bypass(x - inside)

    def _computed(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, context, use_reentrant=False)
        return self.compute(x, emb, context)

    def compute(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """What the block does to x [B, C, H, W]; `forward` decides whether it is recomputed."""
        raise NotImplementedError

    def bypass(self, x: Tensor) -> Tensor:
        """What a residual block adds to, a linear map of x [B, C, H, W] without a bias."""
        return x


class Upsample(Block):
    """Twice the size by repetition, then a convolution if `conv_resample` (ADM's `Upsample`)."""

    def __init__(self, channels: int, conv_resample: bool):
        super().__init__()
        self.conv = conv3x3(channels, channels) if conv_resample else nn.Identity()

    def compute(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(Block):
    """Half the size by a strided convolution if `conv_resample`, else by averaging (ADM's `Downsample`)."""

    def __init__(self, channels: int, conv_resample: bool):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2) if conv_resample else nn.AvgPool2d(2)

    def compute(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """x [B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return self.op(x)


RESAMPLE: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "up": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "down": lambda: nn.AvgPool2d(2),
}


class ResBlock(Block):
    """ADM's residual block (same names): [B, channels, H, W] -> [B, out_channels, H', W'], H' by `resample`."""

    residual = True

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        resample: str = "none",
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm32(channels), nn.SiLU(), conv3x3(channels, out_channels))
        self.resample = RESAMPLE[resample]()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, (2 if use_scale_shift_norm else 1) * out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(dropout), zero_module(conv3x3(out_channels, out_channels))
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def compute(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> [B, C', H', W']; the context is not read."""
        norm_in, silu, conv_in = self.in_layers
        norm_out, *rest_out = self.out_layers
        h = conv_in(self.resample(silu(norm_in(x))))
        emb_out = self.emb_layers(emb)  # (B, C) or (B, 2C)
        if self.use_scale_shift_norm:
            h = norm_out.modulated(h, emb_out)  # type: ignore[operator]  # a GroupNorm32
        else:
            h = norm_out(h + emb_out[:, :, None, None].to(h.dtype))
        for layer in rest_out:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h

    @override
    def bypass(self, x: Tensor) -> Tensor:
        skip = self.skip_connection
        resampled = self.resample(x)
        return F.conv2d(resampled, skip.weight) if isinstance(skip, nn.Conv2d) else resampled


def split_heads(projected: Tensor, parts: int, num_heads: int, new_order: bool) -> tuple[Tensor, ...]:
    """[B, L, parts * heads * d] -> `parts` tensors [B, heads, L, d].

    The channels are ordered (part, head, d) in ADM's new attention order and (head, part, d) in its legacy order.
    """
    batch, length, _ = projected.shape
    if new_order:
        return projected.view(batch, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return projected.view(batch, length, num_heads, parts, -1).permute(3, 0, 2, 1, 4).unbind(0)


def linear1x1(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """The 1x1 convolution on [B, L, C]: the layout attention needs, and a free view of a channels-last image."""
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


class AttentionBlock(Block):
    """ADM's self-attention over positions (same names); after `add_context` also over context, as GLIDE's `encoder_kv`.

    Keys and values are those of the context [B, L, context_dim] followed by those of the image [B, C, H, W].
    """

    encoder_kv: nn.Conv1d  # only where there is a context
    residual = True

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_new_attention_order: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.num_heads = attention_heads(channels, num_heads, num_head_channels)
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def add_context(self, context_dim: int) -> None:
        """Make the keys and values of a context of this width. Apart from the rest, so that a network with context starts
        from the same random weights as one without."""
        self.encoder_kv = nn.Conv1d(context_dim, 2 * self.norm.num_channels, 1)

    def compute(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """x [B, C, H, W] -> the same shape. Positions attend to each other and to the context's tokens; emb is not read."""
        positions = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = split_heads(linear1x1(self.qkv, positions), 3, self.num_heads, self.use_new_attention_order)
        mask = None
        if context is not None:
            projected = linear1x1(self.encoder_kv, context.tokens)
            context_k, context_v = split_heads(projected, 2, self.num_heads, self.use_new_attention_order)
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
            if context.mask is not None:
                mask = F.pad(context.mask, (0, positions.shape[1]), value=True)[:, None, None]  # (B, 1, 1, L + HW)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # (B, HW, C)
        return x + linear1x1(self.proj_out, h).transpose(1, 2).reshape(x.shape)


def attention_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """The number of heads of a layer: `num_head_channels` wins over `num_heads` unless it is -1 (ADM)."""
    flag, divisor = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", num_head_channels)
    if divisor < 1 or channels % divisor:
        raise UserError(f"an attention layer has {channels} channels, which --{flag} {divisor} doesn't divide")
    return num_heads if num_head_channels == -1 else channels // num_head_channels


class BlockSequence(nn.Sequential):
    """Blocks one after the other (ADM's `TimestepEmbedSequential`)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Context | None = None, route: Route | None = None
    ) -> Tensor:
        """x [B, C, H, W] through every block in turn, each with the same emb [B, E], context and route."""
        for block in self:
            x = block(x, emb, context, route)
        return x
