"""Averages over a log interval: of values by quartile, and of scalars that are measured in some steps only."""

from __future__ import annotations

import math

import pytest
import torch

from guided_mt.runs.distributed import Processes
from guided_mt.training.averages import Averages
from guided_mt.training.record import Record


def averages(scalars: tuple[str, ...] = ("grad_norm", "cosine")) -> Averages:
    return Averages(["loss"], 8, torch.device("cpu"), scalars)


def test_scalars_are_averaged_over_the_steps_that_measured_them():
    found = averages()
    for k in range(3):
        found.add_scalars({"grad_norm": torch.tensor(float(k))})
    found.add_scalars({"cosine": torch.tensor(0.5)})
    means = found.pop()
    assert means["grad_norm"] == 1.0 and means["cosine"] == 0.5
    assert math.isnan(found.pop()["cosine"])


def test_state_goes_on_and_takes_older_files():
    first, second = averages(), averages()
    first.add(Record(torch.tensor([1]), {"loss": torch.tensor([2.0])}))
    first.add_scalars({"grad_norm": torch.tensor(4.0), "cosine": torch.tensor(1.0)})
    second.load_state_dict(first.state_dict())
    second.add_scalars({"cosine": torch.tensor(0.0)})
    means = second.pop()
    assert (means["loss"], means["grad_norm"], means["cosine"]) == (2.0, 4.0, 0.5)
    old = {"sums": first.sums, "counts": first.counts, "norms": torch.tensor([6.0, 2.0])}
    second.load_state_dict(old)
    means = second.pop()
    assert means["grad_norm"] == 3.0 and math.isnan(means["cosine"])


def test_averages_by_quartile():
    found = Averages(["loss", "masked"], 8, torch.device("cpu"))
    values = {"loss": torch.tensor([1.0, 3.0, 5.0, math.nan]), "masked": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    found.add(Record(torch.tensor([0, 1, 7, 3]), values, {"masked": torch.tensor([1.0, 0.0, 1.0, 1.0])}))
    means = found.pop()
    assert means["loss"] == 3.0 and means["loss_q0"] == 2.0 and means["loss_q3"] == 5.0
    assert means["masked"] == pytest.approx(80 / 3) and means["masked_q0"] == 10.0 and means["masked_q1"] == 40.0
    assert math.isnan(means["loss_q1"]) and math.isnan(found.pop()["loss"])


def test_a_record_joins_its_parts_and_tells_what_counts():
    parts = [
        Record(
            torch.tensor([t]),
            {"loss": torch.tensor([1.0 * t]), "x": torch.tensor([0.5])},
            {"x": torch.tensor([t % 2.0])},
        )
        for t in (4, 7)
    ]
    whole = Record.joined(parts)
    assert whole.timesteps.tolist() == [4, 7] and whole.values["loss"].tolist() == [4.0, 7.0]
    assert whole.counts("x").tolist() == [0.0, 1.0] and whole.counts("loss").tolist() == [1.0, 1.0]
    values, counts = whole.table(["x", "loss"])
    assert values.tolist() == [[0.5, 4.0], [0.5, 7.0]] and counts.tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_a_record_is_gathered_as_one_tensor():
    """Two processes with the same samples: everything twice, in rank order, through a single collective."""

    class Two(Processes):
        def all_gather(self, values: torch.Tensor) -> torch.Tensor:
            calls.append(values)
            return torch.cat([values, values + 1])

    calls: list[torch.Tensor] = []
    record = Record(torch.tensor([4, 7]), {"loss": torch.ones(2), "role": torch.zeros(2)}, {"loss": torch.zeros(2)})
    found = record.gathered(Two(world_size=2))
    assert len(calls) == 1
    assert found.timesteps.tolist() == [4, 7, 5, 8] and found.timesteps.dtype == torch.int64
    assert found.values["role"].tolist() == [0, 0, 1, 1] and found.values["loss"].tolist() == [1, 1, 2, 2]
    assert found.counted.keys() == {"loss"} and found.counted["loss"].tolist() == [0, 0, 1, 1]
