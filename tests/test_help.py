"""`--help` of every script answers without the imports that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("[!_]*.py"))
SLOW = ("pytorch_lightning", "lightning_fabric", "torch.utils.tensorboard", "tensorflow", "matplotlib", "torchmetrics")
# Each in a child of one process that has torch, which every script imports, and nothing else.
RUN = f"""
import json, os, runpy, sys
import torch

assert not [name for name in {SLOW} if name in sys.modules]
for script in sys.argv[1:]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        sys.argv = [script, "--help"]
        sys.path.insert(0, "scripts")
        code = None
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        print()
        print(json.dumps([code, [name for name in {SLOW} if name in sys.modules]]), flush=True)
        os._exit(0)
    os.close(writer)
    print(json.dumps([script, open(reader).read()]))
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each script printed, and at the end a line of its exit code and the slow modules that it imported."""
    words = [sys.executable, "-c", RUN, *(f"scripts/{script}" for script in SCRIPTS)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow(script, printed):
    *lines, last = printed[f"scripts/{script}"].splitlines()
    assert json.loads(last) == [0, []], printed[f"scripts/{script}"]
    assert any(line.startswith("usage:") for line in lines)
