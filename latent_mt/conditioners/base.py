"""What every conditioning stage has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from guided_mt.errors import UserError


class Stage(nn.Module):
    """A conditioning stage: `encode(x)` is `self(x)`.

    not_weights: entries of older checkpoints that aren't weights, and that are passed over.
    """

    not_weights: Sequence[str] = ()
    reads_text = False  # whether `encode` takes a list of texts

    @property
    def unused(self) -> list[str]:
        """Entries of the state dict that the output doesn't depend on, which a checkpoint may lack."""
        return []

    def encode(self, *args: Any, **keywords: Any) -> Tensor:
        """The condition that `forward` makes, under latent-diffusion's name."""
        return self(*args, **keywords)

    def leave_out(self, missing: Collection[str]) -> None:
        """Take out those of the `unused` parts that have an entry in `missing`: a checkpoint without them is not given weights that
        nobody trained."""


def check_ids(ids: Tensor, count: int, kind: str, key: str) -> None:
    """Raises UserError for ids outside 0..count - 1."""
    wrong = ids[(ids < 0) | (ids >= count)]
    if wrong.numel():
        raise UserError(
            f"{kind} id {int(wrong.flatten()[0])} is none of the {count} (0 to {count - 1}) that {key} allows"
        )
