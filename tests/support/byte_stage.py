"""A text stage for tests that needs no vocabulary: a text's first bytes, embedded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latent_mt.conditioners.base import Stage

LENGTH, WIDTH = 8, 16
CONFIG = {"target": "tests.ByteEmbedder"}  # to be registered by `latent_mt.register`
HOME = "byte_stage:ByteEmbedder"
SEEN: list[str] = []


class ByteEmbedder(Stage):
    """Texts -> [B, 8, 16]; the texts are kept in SEEN."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)

    def forward(self, texts: Sequence[str]) -> Tensor:
        SEEN.extend(texts)
        ids = torch.tensor([list(text.encode()[:LENGTH].ljust(LENGTH, b"\0")) for text in texts])
        return self.embedding(ids.to(self.embedding.weight.device))
