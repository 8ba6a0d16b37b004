"""The heads' squared errors, by which own head divides, learned from what a step leaves behind (docs/method.md, section 5.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..modalities.roles import variance_name
from ..networks.multi_task import MultiTask
from .record import Record


@torch.no_grad()
def learn_variances(model: MultiTask, record: Record, names: Iterable[str]) -> None:
    """Update the variances that `model` tracks of the modalities `names`: each role's own where there is more than one."""
    tracked = model.head_variance
    for name in names:
        if name not in tracked:
            continue
        seen, role = record.counts(name), 0
        by_role = variance_name(name, 1) in tracked
        while (key := variance_name(name, role)) in tracked:
            counts = seen * (record.values["role"] == role) if by_role else seen
            tracked[key].update(record.timesteps, record.values[name], counts)  # type: ignore[operator]  # a HeadVariance
            role += 1
