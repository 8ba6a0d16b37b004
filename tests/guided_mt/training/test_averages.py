"""Averages over a log interval: of values by quartile, and of scalars that are measured in some steps only."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

from guided_mt.runs.distributed import Processes
from guided_mt.training.averages import Averages
from guided_mt.training.record import Record


def averages(scalars: tuple[str, ...] = ("grad_norm", "cosine")) -> Averages:
    return Averages(["loss"], 8, Processes(), scalars)


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
    first.add(Record.of(torch.tensor([1]), {"loss": torch.tensor([2.0])}))
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
    found = Averages(["loss", "masked"], 8, Processes())
    values = {"loss": torch.tensor([1.0, 3.0, 5.0, math.nan]), "masked": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    found.add(Record.of(torch.tensor([0, 1, 7, 3]), values, {"masked": torch.tensor([1.0, 0.0, 1.0, 1.0])}))
    means = found.pop()
    assert means["loss"] == 3.0 and means["loss_q0"] == 2.0 and means["loss_q3"] == 5.0
    assert means["masked"] == pytest.approx(80 / 3) and means["masked_q0"] == 10.0 and means["masked_q1"] == 40.0
    assert math.isnan(means["loss_q1"]) and math.isnan(found.pop()["loss"])


def test_a_record_joins_its_parts_and_tells_what_counts():
    parts = [
        Record.of(
            torch.tensor([t]),
            {"loss": torch.tensor([1.0 * t]), "x": torch.tensor([0.5])},
            {"x": torch.tensor([t % 2.0])},
        )
        for t in (4, 7)
    ]
    whole = Record.joined(parts)
    assert whole.timesteps.tolist() == [4, 7]
    assert whole.rows("loss").tolist() == [[4.0, 7.0], [1.0, 1.0]]
    assert whole.rows("x").tolist() == [[0.0, 0.5], [0.0, 1.0]]


def test_what_the_importance_sampler_learns_from_is_gathered_as_one_tensor():
    """Two processes with the same samples: everything twice, in rank order, through a single collective."""

    class Two(Processes):
        def all_gather(self, values: torch.Tensor) -> torch.Tensor:
            calls.append(values)
            return torch.cat([values, values + 1])

    calls: list[torch.Tensor] = []
    record = Record.of(torch.tensor([4, 7]), {"loss": torch.tensor([0.5, 2.0]), "x": torch.zeros(2)})
    timesteps, losses = record.gathered("loss", Two(world_size=2))
    assert [call.shape for call in calls] == [(2, 2)]
    assert timesteps.tolist() == [4, 7, 5, 8] and timesteps.dtype == torch.int64
    assert losses.tolist() == [0.5, 2.0, 1.5, 3.0]


class Together(Processes):
    """One of several processes that take their turns in one, the main one last."""

    box: ClassVar[list[torch.Tensor]] = []

    def collect(self, totals: torch.Tensor) -> None:
        self.box.append(totals.clone())
        totals.zero_()
        if self.is_main:
            assert len(self.box) == self.world_size
            totals += torch.stack(self.box).sum(dim=0)
            self.box.clear()


def several(count: int) -> list[Averages]:
    """Averages of `count` processes, the main one's last."""
    return [Averages(["loss", "masked"], 8, Together(rank, count)) for rank in reversed(range(count))]


def feed(members: list[Averages], samples: Record, norm: float) -> None:
    """A step of which each process has its share of the samples."""
    size = len(samples.timesteps) // len(members)
    for place, member in enumerate(members):
        part = slice(place * size, (place + 1) * size)
        member.add(Record(samples.timesteps[part], samples.names, samples.table[:, part]))
        member.add_scalars({"grad_norm": torch.tensor(norm)})


@pytest.mark.parametrize("counts", [(1, 1), (4, 4), (1, 4), (6, 3), (2, 1)], ids=str)
def test_the_log_is_that_of_one_process(counts, tmp_path):
    """Whatever the number of processes before and after a resumption; a save in between, as this is, changes nothing."""
    torch.manual_seed(0)
    steps = []
    for _ in range(5):
        values = {"loss": torch.rand(12), "masked": torch.rand(12)}
        values["loss"][3] = math.nan
        steps.append(Record.of(torch.randint(0, 8, (12,)), values, {"masked": torch.randint(0, 2, (12,)).float()}))
    whole = Averages(["loss", "masked"], 8, Processes())
    for number, step in enumerate(steps):
        feed([whole], step, float(number))
    before, after = several(counts[0]), several(counts[1])
    for number, step in enumerate(steps[:2]):
        feed(before, step, float(number))
    state = [member.state_dict() for member in before][-1]
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for member in after:
        member.load_state_dict(state)
    for number, step in enumerate(steps[2:], start=2):
        feed(after, step, float(number))
        if counts[0] == counts[1]:  # the run that was not stopped
            feed(before, step, float(number))
    *others, main = [member.pop() for member in after]
    assert main == pytest.approx(whole.pop(), rel=1e-6, nan_ok=True)
    assert all(math.isnan(value) for other in others for value in other.values())
    if counts[0] == counts[1]:
        assert main == [member.pop() for member in before][-1]  # to the bit


def test_a_record_of_other_values_is_refused():
    with pytest.raises(ValueError, match="a record of role for averages of loss"):
        averages().add(Record.of(torch.tensor([1]), {"role": torch.tensor([0.0])}))
