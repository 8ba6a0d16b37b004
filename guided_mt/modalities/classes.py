"""Class ids: from what the user writes, or drawn by each sample for itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..diffusion.random import SampleStreams, Stream
from ..errors import UserError, nearest


def class_id(text: str, names: Sequence[str], flag: str) -> int:
    """The id of a class given by name or id. Raises UserError for one that is not among `names`; `flag` is what was written."""
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    known = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
    meant = "" if text.lstrip("-").isdigit() else nearest(text, names)
    raise UserError(
        f"{flag}: no such class{meant}; this model has {len(names)} classes, 0 to {len(names) - 1} or by name: {known}"
    )


def choose_classes(
    names: Sequence[str], wanted: str, seeds: Sequence[int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Class ids [B]: that of the name or id `wanted`, or with '' one drawn by each seed. Raises UserError for an unknown one."""
    if not wanted:
        return SampleStreams(torch.as_tensor(seeds), index=Stream.CLASS, device=device).integers(len(names))
    return torch.full((len(seeds),), class_id(wanted, names, f"--class {wanted}"), device=device)
