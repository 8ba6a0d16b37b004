"""What every conditioning stage has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from guided_mt.errors import UserError


class Stage(nn.Module):
    """A conditioning stage: `encode(x)` is `self(x)`."""

    def encode(self, *args: Any, **keywords: Any) -> Tensor:
        """The condition that `forward` makes, under latent-diffusion's name."""
        return self(*args, **keywords)


def check_ids(ids: Tensor, count: int, kind: str, key: str) -> None:
    """Raises UserError for ids outside 0..count - 1."""
    wrong = ids[(ids < 0) | (ids >= count)]
    if wrong.numel():
        raise UserError(
            f"{kind} id {int(wrong.flatten()[0])} is none of the {count} (0 to {count - 1}) that {key} allows"
        )
