"""Files of a clone that was never installed, run with a bare Python: one line that says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from evaluations.installed import what_to_type

FILES = [*sorted((ROOT / "scripts").glob("[!_]*.py")), *sorted((ROOT / "evaluations").glob("*.py"))]
DOORS = [path for path in FILES if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.stem)
def test_it_says_what_to_type(path):
    done = subprocess.run([sys.executable, "-S", "-E", str(path), "--help"], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: numpy, PIL, torch, tqdm") and "pip install -e ." in line


def test_there_are_as_many_as_files():
    assert len(DOORS) == len(list((ROOT / "scripts").glob("[!_]*.py"))) + 5


def test_an_environment_that_make_setup_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluations.installed.ROOT", Path(tmp_path))
    assert "or make setup, which makes .venv" in what_to_type(["torch"])
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert f"or run this by {tmp_path}/.venv/bin/python" in what_to_type(["torch"])
