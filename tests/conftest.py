"""Shared set-up: few threads (several tests start processes of their own), and tiny models."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

ROOT = Path(__file__).resolve().parent.parent
sys.path += map(str, sorted(path for path in (ROOT / "tests").rglob("*") if path.is_dir()))  # tests share helpers
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def inception_pb(tmp_path_factory) -> Path:
    """A frozen Inception graph with random weights."""
    from inception_graph import write_graph

    return write_graph(tmp_path_factory.mktemp("inception") / "random_graph.pb")


def complaint_of(main: Callable[[Sequence[str]], None], *argv: str | Path) -> str:
    """The one line that a command of `evaluations` says about bad input."""
    from evaluations.errors import EvaluationError

    with pytest.raises(EvaluationError) as caught:
        main([str(word) for word in argv])
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 600, text
    return text
