"""Rows of progress.csv."""

from __future__ import annotations

import pytest

from guided_mt.runs.reporter import Reporter


def test_a_value_that_a_row_lacks_is_an_empty_cell(tmp_path):
    pytest.importorskip("tensorboard")
    reporter = Reporter(tmp_path, ["step", "loss", "cosine", "images_per_second"], 2)
    reporter.row({"step": 1, "loss": 0.5, "images_per_second": 1.0})
    reporter.close()
    assert (tmp_path / "progress.csv").read_text().splitlines()[1] == "1,0.5,,1"
