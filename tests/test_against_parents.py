"""benchmarks/against_parents.py without a checkout: its rows, and what it says of a folder that is none. What it measures is in
tests/golden: test_adm_runs.py, test_ldm_runs.py."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from tiny import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_rows():
    from parents.table import by_choice, markdown, run, same

    def agrees():
        return same("a", [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0 + 1e-6])])

    def disagrees():
        return [same("b", {"x": 1.0}, {"x": 1.1}), by_choice("c", 0.5, "ours is better")]

    def fails():
        """What is compared."""
        raise ImportError("no module of 2021\nand more")

    rows = run([agrees, disagrees, fails])
    assert [row.verdict for row in rows] == [
        "same",
        "DIFFERS",
        "differs: ours is better",
        "not run: ImportError: no module of 2021",
    ]
    assert [row.wrong for row in rows] == [False, True, False, False]
    assert "| What is compared |  | not run" in markdown("parent", rows)


def test_both_sides_take_the_given_noise():
    from parents.standins import given_normals

    before = torch.randn_like
    with given_normals(torch.ones(2)):
        assert torch.randn_like(torch.zeros(2)).tolist() == [1, 1]
    assert torch.randn_like is before


def test_another_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["against_parents.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="neither guided_diffusion nor ldm is in it"):
        runpy.run_path(str(ROOT / "benchmarks" / "against_parents.py"), run_name="__main__")
