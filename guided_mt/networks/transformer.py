"""Latent diffusion's attention (Rombach et al. 2022): transformer blocks over the positions of an image, which also read context.

State-dict names and numerics are those of latent-diffusion's `SpatialTransformer`, with convolutions as projections (Stable
Diffusion 1) or linear layers (Stable Diffusion 2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Block, Context, GroupNorm32, zero_module

NORM_EPS = 1e-6  # of the norm before the projection; ADM's norms have 1e-5
WIDENING = 4  # of the feed-forward layer


class CrossAttention(nn.Module):
    """Queries from x [B, L, width], keys and values from context [B, M, context_dim], or from x itself where there is none."""

    def __init__(self, width: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads, self.context_dim = num_heads, context_dim
        source = width if context_dim is None else context_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, L, C] attends to the context's tokens, or to itself where there is no context -> [B, L, C]."""
        tokens = x if context is None else context.tokens.to(x.dtype)
        q, k, v = (self._split(part) for part in (self.to_q(x), self.to_k(tokens), self.to_v(tokens)))
        mask = None if context is None else context.mask
        if mask is None:
            return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        # A sample whose tokens are all left out attends to nothing: softmax over no value would be NaN.
        some = mask.any(dim=1)[:, None]  # (B, 1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | ~some)[:, None, None])
        return self.to_out(h.transpose(1, 2).flatten(2)) * some[..., None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, d)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, C] -> [B, L, C'], one half of the projection gated by the GELU of the other."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward part of a transformer block: widened four times behind a GEGLU, then back."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, WIDENING * width), nn.Dropout(0.0), nn.Linear(WIDENING * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, width] -> the same shape."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each on its layer norm, each added to x [B, L, width].

    A network built for context that is given none adds nothing for it, as if no token were shown.
    """

    def __init__(self, width: int, num_heads: int, context_dim: int | None):
        super().__init__()
        self.attn1 = CrossAttention(width, num_heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, num_heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Context | None) -> Tensor:
        """x [B, L, C] -> the same shape. Without a context the second attention is left out, unless it attends to x itself."""
        x = x + self.attn1(self.norm1(x))
        if context is not None or self.attn2.context_dim is None:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(Block):
    """`depth` transformer blocks over the positions of x [B, C, H, W], between two projections, added to x.

    linear: the projections are linear layers on [B, HW, C], else 1x1 convolutions; the same map, another shape of weights.
    """

    residual = True

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        depth: int = 1,
        context_dim: int | None = None,
        linear: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNorm32(channels, eps=NORM_EPS)
        self.proj_in: nn.Linear | nn.Conv2d
        self.proj_out: nn.Linear | nn.Conv2d
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_dim) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def compute(self, x: Tensor, emb: Tensor, context: Context | None) -> Tensor:
        """x [B, C, H, W] -> the same shape; its positions are the tokens, emb is not read."""
        h = self._project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))  # (B, HW, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self._project(self.proj_out, h).transpose(1, 2).reshape(x.shape)

    @staticmethod
    def _project(layer: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
        return F.linear(h, layer.weight.flatten(1), layer.bias)
