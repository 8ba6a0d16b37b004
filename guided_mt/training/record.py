"""What a step leaves behind of its samples, for whatever learns from it or reports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..runs.distributed import Processes


@dataclass(frozen=True)
class Record:
    """Values of B samples by name, without gradients.

    timesteps: [B], whole numbers. values: {name: [B]}. counted: {name: [B]}, 1 where a value speaks of its sample and 0 where it
    does not; values without an entry always count.
    """

    timesteps: Tensor
    values: Mapping[str, Tensor]
    counted: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Record]) -> Record:
        """The samples of all parts, which have the same names, in their order."""
        first = parts[0]
        return cls(
            torch.cat([part.timesteps for part in parts]),
            {name: torch.cat([part.values[name] for part in parts]) for name in first.values},
            {name: torch.cat([part.counted[name] for part in parts]) for name in first.counted},
        )

    def gathered(self, name: str, processes: Processes) -> tuple[Tensor, Tensor]:
        """(timesteps, values `name`), each [processes * B], of all processes in rank order: one collective, of one tensor."""
        columns = torch.stack([self.timesteps.float(), self.values[name].float()], dim=1)
        timesteps, values = processes.all_gather(columns).unbind(dim=1)
        return timesteps.long(), values

    def counts(self, name: str) -> Tensor:
        """[B]: 1 where the value `name` counts, else 0."""
        return self.counted[name] if name in self.counted else torch.ones_like(self.values[name])

    def table(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(values, counts) of these names, each [B, names]."""
        values = torch.stack([self.values[name] for name in names], dim=1)
        return values, torch.stack([self.counts(name) for name in names], dim=1)
