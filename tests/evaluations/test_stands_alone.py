"""evaluations imports neither guided_mt nor latent_mt."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module

import evaluations

for module in pkgutil.walk_packages(evaluations.__path__, "evaluations."):
    import_module(module.name)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"guided_mt", "latent_mt", "reproduce"}))
"""


def test_no_module_imports_the_other_packages():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
