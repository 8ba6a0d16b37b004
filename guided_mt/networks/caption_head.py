"""The decoder head of a caption: learned queries that read the middle features, and a vocabulary that is never multiplied out.

What the head says of a position is a vector; its logits over a vocabulary of up to 49,408 tokens are made of it where they are
needed, a few rows at a time, and are gone afterwards (docs/method.md, section 10.10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone
from .heads import HeadInputs

LOGITS = 2**24  # at most so many logits at once: 64 MiB
WORD_BYTES = 32  # of a word in UTF-8; what is longer is cut there
_HEAD_WIDTH = 64  # of attention


class WordTable(nn.Module):
    """Words as a buffer, so that they are in every weights file: uint8 [size, WORD_BYTES], UTF-8 padded with zeros."""

    table: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("table", torch.zeros(size, WORD_BYTES, dtype=torch.uint8))

    def words(self) -> list[str]:
        """Those that were set, in their order; [] before. Waits for the device."""
        rows = self.table.cpu().numpy()
        return [bytes(row).rstrip(b"\0").decode("utf-8", "ignore") for row in rows[rows[:, 0] > 0]]

    def set(self, words: Sequence[str]) -> None:
        """Take these, as many as there is room for; each is whole in WORD_BYTES."""
        rows = np.zeros(self.table.shape, dtype=np.uint8)
        for row, word in zip(rows, words, strict=False):
            content = word.encode()
            row[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        self.table.copy_(torch.from_numpy(rows))


class CaptionHead(nn.Module):
    """L learned queries attend to the middle features [B, M, h, w] and pass an MLP: [B, L, width]; `logits` of a position are a
    linear map of that.

    size: V, of the vocabulary. words: how many words it has to hold, 0 for a vocabulary that is known without.
    """

    def __init__(self, backbone: Backbone, size: int, length: int, width: int = 256, words: int = 0):
        super().__init__()
        self.num_heads = max(1, width // _HEAD_WIDTH)
        self.queries = nn.Parameter(torch.randn(length, width))
        self.norm = nn.LayerNorm(backbone.middle_channels)
        self.kv = nn.Linear(backbone.middle_channels, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.last_norm = nn.LayerNorm(width)
        self.vocabulary = nn.Linear(width, size)
        self.words = WordTable(words)

    def forward(self, seen: HeadInputs) -> Tensor:
        """What is said of each position, float32 [B, L, width]; `logits` makes logits of it."""
        with torch.autocast(seen.middle.device.type, enabled=False):
            positions = self.norm(seen.middle.flatten(2).transpose(1, 2))  # (B, hw, M)
            k, v = self._heads(self.kv(positions)).chunk(2, dim=-1)
            queries = self.queries.expand(len(positions), -1, -1)
            found = F.scaled_dot_product_attention(self._heads(queries), k, v)
            x = queries + self.out(found.transpose(1, 2).flatten(2))
            return self.last_norm(x + self.mlp(x))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, n, heads * d] -> [B, heads, n, d]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def logits(self, said: Tensor) -> Tensor:
        """[..., V] float32 of what the head said, [..., width]."""
        with torch.autocast(said.device.type, enabled=False):
            return self.vocabulary(said.float())

    def token_log_probs(self, said: Tensor, ids: Tensor) -> Tensor:
        """log p of the tokens ids [B, L] at their positions, [B, L], of what the head said [B, L, width].

        Of its logits [B L, V] no more than LOGITS exist at a time, in the backward pass too, which makes them again.
        """

        def of_rows(rows: Tensor, targets: Tensor) -> Tensor:
            return -F.cross_entropy(self.logits(rows), targets, reduction="none")

        return self._by_rows(of_rows, said, ids)

    def expected(self, said: Tensor, tokens: Tensor, end: int, known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The mean of a caption's embedded tokens, [B, L, D], under what the head said [B, L, width]; tokens [V, D] are those
        embeddings.

        Position i holds a token of p_i unless the caption has ended before, which leaves `end` there; it has not with
        probability prod_{j < i} (1 - p_j(end)). known: (ids [B, L], bool [B, L]: positions whose token is known to be that one).
        """

        def of_rows(rows: Tensor) -> Tensor:
            p = self.logits(rows).softmax(dim=-1)
            return torch.cat([p @ tokens.to(p.dtype), p[:, end : end + 1]], dim=-1)

        found = self._by_rows(of_rows, said)
        if known is not None:
            ids, fixed = known
            sure = torch.cat([tokens[ids].float(), (ids == end).float()[..., None]], dim=-1)
            found = torch.where(fixed[..., None], sure, found)
        going_on = 1 - found[..., -1:]
        reached = torch.cat([torch.ones_like(going_on[:, :1]), going_on[:, :-1].cumprod(dim=1)], dim=1)
        return reached * found[..., :-1] + (1 - reached) * tokens[end].to(found.dtype)

    def best(self, said: Tensor) -> tuple[Tensor, Tensor]:
        """(the likeliest token of each position, int64 [B, L], and its probability [B, L])."""

        def of_rows(rows: Tensor) -> Tensor:
            p, ids = self.logits(rows).softmax(dim=-1).max(dim=-1)
            return torch.stack([p.double(), ids.double()], dim=-1)

        p, ids = self._by_rows(of_rows, said).unbind(-1)
        return ids.long(), p.float()

    def drawn(self, said: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        """A token of each position, int64 [B, L], by numbers in [0, 1), [B, L]; of probabilities ~ p^(1 / temperature)."""

        def of_rows(rows: Tensor, u: Tensor) -> Tensor:
            p = (self.logits(rows) / temperature).softmax(dim=-1).cumsum(dim=-1)
            return (p < u[:, None]).sum(dim=-1).clamp(max=p.shape[1] - 1)

        return self._by_rows(of_rows, said, uniforms)

    def _by_rows(self, function: Callable[..., Tensor], said: Tensor, *others: Tensor) -> Tensor:
        """`function` of rows [n, ...] of the B L positions, few enough at a time; nothing of it is kept for the backward pass."""
        rows = max(1, LOGITS // self.vocabulary.out_features)
        parts = list(zip(*(x.flatten(0, 1).split(rows) for x in (said, *others)), strict=True))
        if len(parts) == 1:
            found = function(*parts[0])
        elif torch.is_grad_enabled():
            again = partial(
                checkpoint, function, use_reentrant=False, preserve_rng_state=False
            )  # nothing in it is random
            found = torch.cat([again(*part) for part in parts])
        else:
            found = torch.cat([function(*part) for part in parts])
        return found.unflatten(0, said.shape[:2])
