"""Means over a log interval: of several values per sample, in all and by timestep quartile, and of scalars per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runs.distributed import Processes
from .record import Record

QUARTILES = 4  # as ADM's log: q0 has the first quarter of the timesteps


def groups_of(num_timesteps: int) -> Tensor:
    """[T, 5]: 1 where a timestep belongs to a group, of which there are all timesteps and their quartiles."""
    quartile = torch.nn.functional.one_hot(torch.arange(num_timesteps) * QUARTILES // num_timesteps, QUARTILES)
    return torch.cat([torch.ones(num_timesteps, 1), quartile.float()], dim=1)


class Averages:
    """Sums on the device of several values per sample and of `scalars` per step; the host sees them only when asked.

    Every process sums up its own samples. Only `pop` and `state_dict`, which all processes have to call, bring the sums together,
    by one reduction to the main process.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_timesteps: int,
        processes: Processes,
        scalars: Sequence[str] = ("grad_norm",),
    ):
        self.names, self.num_timesteps, self.processes = list(names), num_timesteps, processes
        size = 2 * (1 + QUARTILES) * len(names)
        self._totals = torch.zeros(size + 2 * len(scalars), device=processes.device)
        self.sums, self.counts = self._totals[:size].view(2, 1 + QUARTILES, len(names))
        self.scalars = dict(zip(scalars, self._totals[size:].view(len(scalars), 2), strict=True))  # sum, count
        self._groups = groups_of(num_timesteps).to(processes.device)
        self._once = torch.ones((), device=processes.device)

    def add(self, record: Record) -> None:
        """A record of this process's samples, whose first names are those of these averages. Raises ValueError for others."""
        if list(record.names[: len(self.names)]) != self.names:
            raise ValueError(f"a record of {', '.join(record.names)} for averages of {', '.join(self.names)}")
        groups = self._groups[record.timesteps].T  # (5, B)
        values, counts = record.table[..., : len(self.names)]
        self.sums += groups @ values
        self.counts += groups @ counts

    def add_scalars(self, values: Mapping[str, Tensor]) -> None:
        """{name: 0-dim tensor} of this step, for some or all of the scalars; every process gives the same names."""
        for name, value in values.items():  # so that the count over all processes is that of the steps
            self.scalars[name].add_(torch.stack([value, self._once]), alpha=1 / self.processes.world_size)

    def pop(self) -> dict[str, float]:
        """{name: mean, name_q0: ..., scalar: mean} over all processes, nan where nothing was seen; starts anew.

        The values are the main process's; the others get nan.
        """
        self.processes.collect(self._totals)
        means = (self.sums / self.counts).cpu()  # 0 / 0 is nan, on purpose
        measured = {name: float(total[0] / total[1]) for name, total in self.scalars.items()}
        self._totals.zero_()
        suffixes = ["", *(f"_q{q}" for q in range(QUARTILES))]
        values = {name + s: float(means[i, j]) for j, name in enumerate(self.names) for i, s in enumerate(suffixes)}
        return values | measured

    def state_dict(self) -> dict[str, Any]:
        """An unfinished interval of all processes, so that a resumed run logs the same line; the main process's is to be saved."""
        self.processes.collect(self._totals)
        return {"sums": self.sums, "counts": self.counts, "scalars": dict(self.scalars)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; names that it lacks start empty."""
        self._totals.zero_()
        if not self.processes.is_main:
            return
        for mine, saved in ((self.sums, state["sums"]), (self.counts, state["counts"])):
            mine[:, : saved.shape[1]].copy_(saved)  # version 0.1 had fewer names, the first of these
        saved = state["scalars"] if "scalars" in state else {"grad_norm": state["norms"]}  # checkpoints of version 0.1
        for name, total in self.scalars.items():
            if name in saved:  # a scalar that the run did not have yet starts empty
                total.copy_(saved[name])
