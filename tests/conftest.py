"""Shared set-up: few threads (several tests start processes of their own), and tiny models."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["MT_DIFFUSION_LISTINGS"] = "off"  # tests leave nothing in the user's cache
signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is off where a shell runs the suite in the background

ROOT = Path(__file__).resolve().parent.parent
sys.path += map(str, sorted(path for path in (ROOT / "tests").rglob("*") if path.is_dir()))  # tests share helpers
GOLDEN = ROOT / "tests" / "golden"


# The files that take longest, begun first: with several workers the suite ends when the last file does.
LONGEST = (
    "test_latent_guarantees.py",
    "test_guarantees.py",
    "test_samplers.py",
    "test_train.py",
    "test_evaluator.py",
    "test_compare.py",
    "test_latent_training.py",
    "test_commands.py",
    "test_mixture.py",
    "test_modalities.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core, and eight at most: each holds torch, Lightning and its models."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.fixture(autouse=True)
def levels_of_logs() -> Iterator[None]:
    """Commands quieten the data of all ranks but the first; the next test hears it again."""
    levels = {name: logging.getLogger(name).level for name in ("guided_mt.data", "latent_mt.data")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


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
