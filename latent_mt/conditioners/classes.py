"""LDM's class stage."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from guided_mt.errors import UserError

from .base import Stage, check_ids


class ClassEmbedder(Stage):
    """Class ids [B] -> one token each, [B, 1, embed_dim]."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class"):
        super().__init__()
        self.key, self.n_classes = key, n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Tensor | Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """batch: ids [B], or a batch that holds them under `key`. Raises UserError for ids that are no classes."""
        ids = batch if isinstance(batch, Tensor) else batch[key or self.key]
        if ids.ndim != 1 or ids.is_floating_point():
            raise UserError(f"expected class ids [B], got {str(ids.dtype)[6:]} {list(ids.shape)}")
        if not ids.is_cuda:  # on a GPU the look-up itself fails; asking here would wait for the device
            check_ids(ids, self.n_classes, "class", "n_classes")
        return self.embedding(ids)[:, None]
