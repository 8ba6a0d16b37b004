"""What import-linter does not read: the scripts, and what guided_mt.diffusion takes from outside the project."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from tiny import ROOT

DOORS = ("guided_mt.commands", "guided_mt.errors", "latent_mt.commands", "reproduce", "evaluations")


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, wherever in the file; relative ones as they stand, with their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_a_door_to_a_command(script):
    for name in imported(script):
        inside = any(name == door or name.startswith(f"{door}.") for door in (*DOORS, "_installed"))
        assert inside or name.split(".")[0] in sys.stdlib_module_names, name


def test_the_mathematics_needs_torch_and_numpy_alone():
    files = sorted((ROOT / "guided_mt" / "diffusion").rglob("*.py"))
    assert files
    for path in files:
        outside = {name.split(".")[0] for name in imported(path) if not name.startswith(".")} - sys.stdlib_module_names
        allowed = {"torch", "numpy"} | ({"tqdm"} if path.name == "adm_loops.py" else set())  # ADM's progress bar
        assert outside <= allowed, (path, outside - allowed)
