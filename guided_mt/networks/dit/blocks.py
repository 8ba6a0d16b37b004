"""The blocks of a diffusion transformer (Peebles and Xie 2023): the names and numerics of facebookresearch/DiT.

Ours on top: attention to the tokens of modalities (`ContextAttention`), as in latent diffusion's transformers.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import Context, zero_module

NORM_EPS = 1e-6


def layer_norm(width: int) -> nn.LayerNorm:
    """Layer norm whose scale and shift come from elsewhere."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x [B, N, width], shift and scale [B, width]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Attention(nn.Module):
    """Self-attention over x [B, N, width]; timm's names."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, width] -> the same shape. mask bool [B, 1, 1, N]: False leaves a token out."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(h.transpose(1, 2).flatten(2))


class ContextAttention(nn.Module):
    """What the tokens of a context [B, L, context_dim] say to each of x [B, N, width]: added to x, and zero before training."""

    def __init__(self, width: int, num_heads: int, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = layer_norm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(context_dim, 2 * width)
        self.proj = zero_module(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, N, width]; zero for a sample whose tokens are all left out."""
        k, v = self.kv(context.tokens).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask, some = context.mask, None
        if mask is not None:  # softmax over no value would be NaN
            some = mask.any(dim=1)[:, None, None]
            mask = (mask[:, None] | ~some)[:, None]  # (B, 1, 1, L)
        attend = self._of_few if 2 * self.num_heads * k.shape[2] <= x.shape[2] else self._of_many
        h = attend(self.norm(x), k, v, mask)
        return h if some is None else h * some

    def _of_many(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def _of_few(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The same, where the projections of queries and outputs are applied to the few tokens in the place of the many
        positions: (W x) . k = x . (W^T k), and the sum of p_l v_l projected is the sum of p_l projected v_l."""
        heads, size = self.num_heads, k.shape[3]
        weight, bias = (part.unflatten(0, (heads, size)) for part in (self.q.weight, self.q.bias))
        of_x = torch.einsum("bhld,hdc->bhlc", k, weight.to(k.dtype)) * size**-0.5
        offset = torch.einsum("bhld,hd->bhl", k, bias.to(k.dtype)) * size**-0.5
        scores = torch.einsum("bnc,bhlc->bnhl", x.to(k.dtype), of_x) + offset[:, None]
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), -torch.inf)
        values = torch.einsum("bhld,chd->bhlc", v, self.proj.weight.unflatten(1, (heads, size)).to(v.dtype))
        return torch.einsum("bnhl,bhlc->bnc", scores.softmax(dim=-1).to(v.dtype), values) + self.proj.bias


class MLP(nn.Module):
    """Two linear layers with tanh's approximation of GELU between; timm's names."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """SiLU and a zero linear layer: `parts` vectors [B, width] of an embedding [B, width] (adaLN-Zero)."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), zero_module(nn.Linear(width, parts * width)))
        self.parts = parts

    def vectors(self, activated: Tensor) -> tuple[Tensor, ...]:
        """The vectors of an embedding that has passed SiLU already, once for all blocks."""
        return cast(nn.Linear, self[1])(activated).chunk(self.parts, dim=1)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward on tokens [B, N, width], scaled, shifted and gated by the embedding (adaLN-Zero).

    context_dim: width of tokens that are attended to between the two; None: there are none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.attn = Attention(width, num_heads)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = Modulation(width, 6)
        self.context_attn: ContextAttention | None = None
        if context_dim is not None:  # from a copy of the generator: the rest starts as it would without a context
            with torch.random.fork_rng(devices=[]):
                self.context_attn = ContextAttention(width, num_heads, context_dim)

    def forward(self, x: Tensor, activated: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        """x [B, N, width] -> the same shape. activated [B, width]: SiLU of the embedding; mask: as `Attention.forward`."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.compute, x, activated, context, mask, use_reentrant=False)
        return self.compute(x, activated, context, mask)

    def compute(self, x: Tensor, activated: Tensor, context: Context | None, mask: Tensor | None) -> Tensor:
        """What the block does to x; `forward` decides whether it is computed again in the backward pass."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation.vectors(activated)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulated(self.norm1(x), shift1, scale1), mask))
        if context is not None and self.context_attn is not None:
            x = x + self.context_attn(x, context)
        return torch.addcmul(x, gate2[:, None], self.mlp(modulated(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Tokens as a map [B, width, h, w] and the embedding [B, width] -> [B, channels, h patch, w patch], zero before training."""

    def __init__(self, width: int, patch_size: int, channels: int):
        super().__init__()
        self.patch_size, self.channels = patch_size, channels
        self.norm_final = layer_norm(width)
        self.linear = zero_module(nn.Linear(width, patch_size**2 * channels))
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """The patches, put where they lie in the image."""
        size, p = tokens.shape[2:], self.patch_size
        shift, scale = self.adaLN_modulation.vectors(F.silu(embedding))
        h = self.linear(modulated(self.norm_final(tokens.flatten(2).transpose(1, 2)), shift, scale))
        h = h.view(len(h), *size, p, p, self.channels)  # rows, columns, then rows and columns of a patch
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(h), self.channels, size[0] * p, size[1] * p)
