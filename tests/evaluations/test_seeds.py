"""Rows measured with several seeds: mean and spread, missing numbers, the figure."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from evaluations.tables.seeds import Column, Measured, markdown_table, mean_and_spread, plot_seeds, write_seeds_csv

COLUMNS = (Column("error", "error", 2), Column("accuracy", "accuracy", 1), Column("never", "never measured"))
RESULTS = [
    Measured("a", 0, {"error": 1.0, "accuracy": 0.5}),
    Measured("a", 1, {"error": 2.0, "accuracy": 0.5}),
    Measured("b", 0, {"error": 0.25}),
    Measured("real", None, {"error": 0.0}),
]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((), ""), ((0.25,), "0.25"), ((1.0, 2.0, 3.0), "2.00 +- 1.00"), ((1.0, 1.0), "1.00 +- 0.00")],
)
def test_mean_and_spread(values, expected):
    assert mean_and_spread(values, 2) == expected


def test_table():
    """A row per name in the order of their results; columns that nothing has are left out."""
    assert markdown_table(RESULTS, COLUMNS).splitlines() == [
        "| | error | accuracy |",
        "| --- | --- | --- |",
        f"| a | 1.50 +- {np.std([1, 2], ddof=1):.2f} | 0.5 +- 0.0 |",
        "| b | 0.25 |  |",
        "| real | 0.00 |  |",
    ]


def test_csv(tmp_path):
    write_seeds_csv(RESULTS, COLUMNS, tmp_path / "seeds.csv")
    rows = list(csv.DictReader((tmp_path / "seeds.csv").open()))
    assert [(row["row"], row["seed"]) for row in rows] == [("a", "0"), ("a", "1"), ("b", "0"), ("real", "")]
    assert (rows[1]["error"], rows[2]["accuracy"], rows[0]["never"]) == ("2.0", "", "")


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    plot_seeds(RESULTS, COLUMNS, tmp_path / "seeds.png")
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")
