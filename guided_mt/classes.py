"""Which class each sample gets: the one that was asked for, or each sample's own draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import UserError
from ..random import SampleStreams


def choose_classes(
    names: Sequence[str], wanted: str, seeds: Sequence[int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Class ids [B]: that of the name or id `wanted`, or with '' one drawn by each seed. Raises UserError for an unknown one."""
    if not wanted:
        return SampleStreams(torch.as_tensor(seeds), index=2, device=device).integers(len(names))
    if wanted in names:
        chosen = names.index(wanted)
    elif wanted.isdigit() and int(wanted) < len(names):
        chosen = int(wanted)
    else:
        raise UserError(f"--class '{wanted}': this model has {len(names)} classes, {', '.join(names[:10])} ...")
    return torch.full((len(seeds),), chosen, device=device)
