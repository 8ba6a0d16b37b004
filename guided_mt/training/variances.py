"""The heads' squared errors, by which own head divides, learned from what a step leaves behind (docs/method.md, section 5.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..modalities.roles import variance_name
from ..networks.multi_task import MultiTask
from ..runs.distributed import Processes
from .record import Record


@torch.no_grad()
def learn_variances(model: MultiTask, record: Record, names: Iterable[str], processes: Processes) -> None:
    """Update the variances that `model` tracks of the modalities `names`: each role's own where there is more than one.

    record: this process's samples. One reduction of [tracked variances, 2, T] makes the update the same on all processes.
    """
    tracked = model.head_variance
    keys, sums = [], []
    for key, rows in _learned_from(model, record, names):
        keys.append(key)
        sums.append(tracked[key].sums(record.timesteps, rows))  # type: ignore[operator]  # a HeadVariance
    if keys:
        for key, own in zip(keys, processes.sum(torch.stack(sums)), strict=True):
            tracked[key].update(own)  # type: ignore[operator]


def _learned_from(model: MultiTask, record: Record, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(key of a tracked variance, [2, B]: values and which of them count)."""
    tracked = model.head_variance
    for name in names:
        if name not in tracked:
            continue
        rows, role = record.rows(name), 0
        by_role = variance_name(name, 1) in tracked
        while (key := variance_name(name, role)) in tracked:
            yield key, rows * (record.rows("role")[0] == role) if by_role else rows
            role += 1
