"""Every row of the evaluator's METRICS: its scores and its protocol are written, and do not depend on who else is asked."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from small_inception import pixels, use_small_backend

from evaluations import evaluator
from evaluations.scores.comparison import METRICS

# fd_dinov2 has its own test, with a small network in the place of its own
ROWS = [name for name in METRICS if name != "fd_dinov2"]


@pytest.mark.parametrize("name", ROWS)
def test_a_rows_scores_are_written_alone_and_among_others(name, tmp_path, monkeypatch, capsys):
    use_small_backend(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", arr_0=pixels(60, 0))
    np.savez("samples.npz", arr_0=pixels(40, 1, brightness=10))

    def found(metrics: str) -> dict:
        evaluator.main(["reference.npz", "samples.npz", "--metrics", metrics, "--json", "scores.json"])
        return json.loads((tmp_path / "scores.json").read_text())

    alone, together = found(name), found(",".join(ROWS))
    assert alone["scores"] and all(math.isfinite(value) for value in alone["scores"].values())
    assert alone["scores"].items() <= together["scores"].items()
    assert alone["protocol"].items() <= together["protocol"].items()
    printed = capsys.readouterr().out
    assert all(f"{key} {value}" in printed for key, value in alone["protocol"].items())
