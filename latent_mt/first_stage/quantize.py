"""The codebook of LDM's VQ first stages: nearest entry, commitment loss, remapped indices (taming's `VectorQuantizer2`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from guided_mt.errors import NPZ_ERRORS, UserError, reason

DISTANCES_AT_ONCE = 2**26  # 256 MB in float32


class Quantized(NamedTuple):
    """quant [B, C, h, w] with straight-through gradients; emb_loss 0-dim; indices int64 [B * h * w], or [B, h, w] where the
    quantiser has `sane_index_shape` ([B * h * w, 1] with `remap`, as in LDM)."""

    quant: Tensor
    emb_loss: Tensor
    indices: Tensor


class VectorQuantizer(nn.Module):
    """n_e vectors of e_dim numbers. State: embedding.weight [n_e, e_dim], and `used` with `remap`.

    beta weighs the commitment term. legacy=True puts it on the codebook term instead: what LDM trains with, and its released
    weights were trained with. remap: an .npy of the entries in use; indices then count these, and others become
    `unknown_index`: "random", "extra" or a number. Raises UserError for a remap that can't be read.
    """

    used: Tensor  # the entries in use, only where `remapped`

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        if n_e < 1 or e_dim < 1:
            raise UserError(f"n_embed {n_e}, embed_dim {e_dim}: a codebook needs at least one entry of one number")
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.register_buffer("used", None if remap is None else _read_used(remap, n_e))
        self.remapped = remap is not None
        self.unknown_index = unknown_index
        if self.remapped and unknown_index == "extra":
            self.unknown_index = len(self.used)
        elif unknown_index != "random" and not isinstance(unknown_index, int):
            raise UserError(f"unknown_index '{unknown_index}': write random, extra or a number")
        # what indices count to
        self.re_embed = n_e if not self.remapped else len(self.used) + (unknown_index == "extra")

    def forward(self, z: Tensor) -> Quantized:
        """z [B, e_dim, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            z = widened(z)
            indices = self.nearest(z)
            quant = self.entries(indices)
            codebook, commitment = (quant - z.detach()).square().mean(), (quant.detach() - z).square().mean()
            if self.legacy:
                emb_loss = commitment + self.beta * codebook
            else:
                emb_loss = self.beta * commitment + codebook
            quant = z + (quant - z).detach()
        return Quantized(quant, emb_loss, self._reported(indices))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z [B, e_dim, h, w] -> the entries nearest to it, int64 [B, h, w]; the first of equals."""
        batch, _, height, width = z.shape
        entries = self.embedding.weight
        points = z.to(entries.dtype).permute(0, 2, 3, 1).reshape(-1, self.e_dim)
        norms = entries.square().sum(dim=1)
        pieces = points.split(max(1, DISTANCES_AT_ONCE // self.n_e))
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, of which |z|^2 is the same for all entries
        indices = [torch.addmm(norms, piece, entries.T, alpha=-2.0).argmin(dim=1) for piece in pieces]
        return torch.cat(indices).view(batch, height, width)

    def entries(self, indices: Tensor) -> Tensor:
        """Entries' numbers [B, h, w] (not remapped) -> [B, e_dim, h, w]."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Indices as `forward` reports them, and (B, h, w, e_dim) -> [B, e_dim, h, w]."""
        if self.remapped:
            indices = self.unmap_to_all(indices)
        return self.entries(indices.reshape(shape[:3]))

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Entries' numbers -> places in `used`, `unknown_index` for entries that aren't in it."""
        table = torch.full((self.n_e,), -1, device=indices.device)
        table[self.used] = torch.arange(len(self.used), device=indices.device)
        places = table[indices]
        if self.unknown_index == "random":
            unknown = torch.randint(self.re_embed, places.shape, device=indices.device)
        else:
            unknown = torch.full_like(places, int(self.unknown_index))
        return torch.where(places < 0, unknown, places)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Places in `used` -> entries' numbers; an unknown place is the first entry in use, as in LDM."""
        return self.used[torch.where(indices < len(self.used), indices, 0)]

    def _reported(self, indices: Tensor) -> Tensor:
        if self.remapped:
            indices = self.remap_to_used(indices)
        if self.sane_index_shape:
            return indices
        return indices.reshape(-1, 1) if self.remapped else indices.reshape(-1)


def widened(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def codebook_usage(counts: Tensor) -> tuple[float, float]:
    """How often each entry was chosen [n_e] -> (share of the entries chosen at all, perplexity exp(entropy), 1..n_e)."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())


def _read_used(path: str, n_e: int) -> Tensor:
    try:
        used = np.load(path, allow_pickle=False)
    except NPZ_ERRORS as error:
        raise UserError(
            f"remap {path}: can't be read ({reason(error)}); it takes an .npy of codebook indices"
        ) from None
    numbers = isinstance(used, np.ndarray) and used.ndim == 1 and np.issubdtype(used.dtype, np.integer)
    if not numbers or not len(used) or used.min() < 0 or used.max() >= n_e or len(np.unique(used)) != len(used):
        raise UserError(f"remap {path}: must hold different indices 0..{n_e - 1}, an integer array of one dimension")
    return torch.from_numpy(used.astype(np.int64))
