"""`--help` of every script answers without the imports that take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
SLOW = ("pytorch_lightning", "lightning_fabric", "torch.utils.tensorboard", "tensorflow", "matplotlib", "torchmetrics")
RUN = f"""
import runpy, sys

sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code or 0, [name for name in {SLOW} if name in sys.modules])
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow(script):
    words = [sys.executable, "-c", RUN, f"scripts/{script}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    *printed, last = done.stdout.splitlines()
    assert last == "0 []", done.stdout + done.stderr
    assert any(line.startswith("usage:") for line in printed)
