"""LDM's text stages: BERT's tokens through a transformer that is trained with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from guided_mt.errors import UserError, reason

from .base import Stage, check_ids

HEADS, HEAD_DIM = 8, 64  # of LDM's text transformers, whatever their width
TOKENIZER, VOCABULARY = "bert-base-uncased", 30522


class SelfAttention(nn.Module):
    """[B, L, dim] -> [B, L, dim] over all positions, heads of 64."""

    def __init__(self, dim: int):
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, C] -> the same shape."""
        q, k, v = (
            part(x).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """[B, L, dim] -> [B, L, dim] through four times the width."""

    def __init__(self, dim: int):
        super().__init__()
        # Nested as in LDM, whose middle entry is a dropout of rate 0.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU()), nn.Identity(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, C] -> the same shape."""
        return self.net(x)


class AttentionLayers(nn.Module):
    """`depth` times x + attention(norm(x)), x + feed_forward(norm(x)); every layer is the pair (norm, what it does)."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        kinds = [kind for _ in range(depth) for kind in (SelfAttention, FeedForward)]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), kind(dim)]) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, C] -> the same shape, through every layer with its norm before and its sum after."""
        for norm, layer in self.layers:  # type: ignore[misc]
            x = x + layer(norm(x))  # type: ignore[has-type]
        return x


class PositionalEmbedding(nn.Module):
    """A learned vector per position."""

    def __init__(self, dim: int, max_seq_len: int):
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, length: int) -> Tensor:
        """The vectors of the first `length` positions, [L, dim]."""
        return self.emb.weight[:length]  # (L, dim)


class TextTransformer(nn.Module):
    """Token ids [B, L] -> embeddings [B, L, dim], as the x-transformers encoder that LDM trained.

    to_logits has weights in released checkpoints and no part in the embeddings.
    """

    def __init__(self, vocab_size: int, max_seq_len: int, dim: int, depth: int, embedding_dropout: float = 0.0):
        super().__init__()
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.token_emb = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = PositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(embedding_dropout)
        self.attn_layers = AttentionLayers(dim, depth)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises UserError for ids [B, L] that are too long or outside the vocabulary."""
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise UserError(f"expected token ids [B, L], got {str(tokens.dtype)[6:]} {list(tokens.shape)}")
        if tokens.shape[1] > self.max_seq_len:
            raise UserError(f"{tokens.shape[1]} tokens are more than max_seq_len {self.max_seq_len}; cut them")
        if not tokens.is_cuda:
            check_ids(tokens, self.vocab_size, "token", "vocab_size")
        x = self.emb_dropout(self.token_emb(tokens) + self.pos_emb(tokens.shape[1]))
        return self.norm(self.attn_layers(x))


class TransformerEmbedder(Stage):
    """Token ids [B, L] -> [B, L, n_embed]; L up to max_seq_len, n_layer pairs of attention and feed-forward."""

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: str = "cuda"):
        """device: LDM's, without effect; the stage is where the model is moved to."""
        super().__init__()
        self.transformer = TextTransformer(vocab_size, max_seq_len, n_embed, n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, L, C]."""
        return self.transformer(tokens)


class BERTTokenizer(Stage):
    """Text -> ids [B, max_length] of the bert-base-uncased vocabulary, padded and cut. Needs the package `transformers`
    with that tokenizer's files on this machine; nothing is downloaded.

    It has no weights. The files are read at the first text.
    """

    def __init__(self, device: str = "cuda", vq_interface: bool = True, max_length: int = 77):
        """device, vq_interface: LDM's, without effect; ids are on the CPU."""
        super().__init__()
        self.max_length = max_length
        self._tokenizer: Any = None

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Raises UserError where the tokenizer can't be had."""
        self._tokenizer = self._tokenizer or load_tokenizer()
        texts = [text] if isinstance(text, str) else list(text)
        encoded = self._tokenizer(
            texts, truncation=True, max_length=self.max_length, padding="max_length", return_tensors="pt"
        )
        return encoded["input_ids"]


class BERTEmbedder(Stage):
    """Text, or token ids [B, L], -> [B, L, n_embed]. Only the tokenizer is BERT's; the transformer is trained with the model.

    use_tokenizer: whether text may be given (see BERTTokenizer); ids always may.
    """

    reads_text = True

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = VOCABULARY,
        max_seq_len: int = 77,
        device: str = "cuda",
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
    ):
        """device: LDM's, without effect; the stage is where the model is moved to."""
        super().__init__()
        self.tknz_fn = BERTTokenizer(max_length=max_seq_len) if use_tokenizer else None
        self.transformer = TextTransformer(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Text, or token ids [B, L] -> [B, L, C]. Raises UserError for text where `use_tokenizer` is false."""
        if isinstance(text, Tensor):
            return self.transformer(text)
        if self.tknz_fn is None:
            raise UserError("this text stage has use_tokenizer: false; give token ids [B, L] instead of text")
        return self.transformer(self.tknz_fn(text).to(self.transformer.token_emb.weight.device))


def load_tokenizer() -> Any:
    """bert-base-uncased's tokenizer from this machine's files. Raises UserError where they or the package are missing."""
    way_out = "give token ids instead of text"
    try:
        from transformers import BertTokenizerFast
    except ImportError as error:
        raise UserError(
            f"text needs the package transformers (pip install transformers); or {way_out} ({reason(error)[:120]})"
        ) from None
    try:
        tokenizer = BertTokenizerFast.from_pretrained(TOKENIZER, local_files_only=True)
        # Without files transformers 5 makes a tokenizer that knows no word, and says nothing.
        problem = "" if tokenizer.vocab_size == VOCABULARY else f"{tokenizer.vocab_size} words instead of {VOCABULARY}"
    except Exception as error:  # huggingface_hub and tokenizers raise many kinds
        problem = reason(error)[:120]
    if problem:
        raise UserError(
            f"text needs the tokenizer files of {TOKENIZER} on this machine (huggingface-cli download {TOKENIZER}); or "
            f"{way_out} ({problem})"
        )
    return tokenizer
