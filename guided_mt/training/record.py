"""What a step leaves behind of its samples, for whatever learns from it or reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runs.distributed import Processes


def table_of(values: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Tensor:
    """Values [B] by name as `Record.table` [2, B, names], without gradients.

    counted: {name: [B]}, 1 where a value speaks of its sample and 0 where it does not; values without an entry always count.
    What is not finite never counts.
    """
    counted = counted or {}
    found = torch.stack([value.detach() for value in values.values()], dim=1)
    counts = [counted[name] if name in counted else torch.ones_like(value) for name, value in values.items()]
    weight = torch.stack(counts, dim=1) * torch.isfinite(found)
    return torch.stack([torch.nan_to_num(found) * weight, weight])


@dataclass(frozen=True)
class Record:
    """Values of B samples by name, without gradients.

    timesteps: [B], whole numbers. table: [2, B, names], the values, 0 where they don't count, and then 1 where they do and 0 where
    they don't.
    """

    timesteps: Tensor
    names: tuple[str, ...]
    table: Tensor

    @classmethod
    def of(cls, timesteps: Tensor, values: Mapping[str, Tensor], counted: Mapping[str, Tensor] | None = None) -> Record:
        """See `table_of`."""
        return cls(timesteps, tuple(values), table_of(values, counted))

    @classmethod
    def joined(cls, parts: Sequence[Record]) -> Record:
        """The samples of all parts, which have the same names, in their order."""
        if len(parts) == 1:
            return parts[0]
        timesteps = torch.cat([part.timesteps for part in parts])
        return cls(timesteps, parts[0].names, torch.cat([part.table for part in parts], dim=1))

    def rows(self, name: str) -> Tensor:
        """[2, B]: the values `name`, and which of them count."""
        return self.table[..., self.names.index(name)]

    def gathered(self, name: str, processes: Processes) -> tuple[Tensor, Tensor]:
        """(timesteps, values `name`), each [processes * B], of all processes in rank order: one collective, of one tensor.

        Values that don't count are NaN.
        """
        values, counts = self.rows(name)
        columns = torch.stack([self.timesteps.float(), torch.where(counts > 0, values, torch.nan)], dim=1)
        timesteps, values = processes.all_gather(columns).unbind(dim=1)
        return timesteps.long(), values
