"""Averages over a log interval: scalars that are measured in some steps only."""

from __future__ import annotations

import math

import pytest
import torch

from guided_mt.training.metrics import Averages, Reporter


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
    first.add(torch.tensor([1]), torch.tensor([[2.0]]), torch.ones(1, 1))
    first.add_scalars({"grad_norm": torch.tensor(4.0), "cosine": torch.tensor(1.0)})
    second.load_state_dict(first.state_dict())
    second.add_scalars({"cosine": torch.tensor(0.0)})
    means = second.pop()
    assert (means["loss"], means["grad_norm"], means["cosine"]) == (2.0, 4.0, 0.5)
    old = {"sums": first.sums, "counts": first.counts, "norms": torch.tensor([6.0, 2.0])}
    second.load_state_dict(old)
    means = second.pop()
    assert means["grad_norm"] == 3.0 and math.isnan(means["cosine"])


def test_a_value_that_a_row_lacks_is_an_empty_cell(tmp_path):
    pytest.importorskip("tensorboard")
    reporter = Reporter(tmp_path, ["step", "loss", "cosine", "images_per_second"], 2)
    reporter.row({"step": 1, "loss": 0.5, "images_per_second": 1.0})
    reporter.close()
    assert (tmp_path / "progress.csv").read_text().splitlines()[1] == "1,0.5,,1"
