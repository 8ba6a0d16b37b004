"""What 64 processes tell each other in a step, counted: torch's fake group answers for the other 63."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import flags, task_flags
from torch.testing._internal.distributed.fake_pg import FakeStore

from guided_mt.commands import train
from guided_mt.modalities.registry import TASKS
from guided_mt.runs import distributed
from guided_mt.runs.distributed import Processes
from guided_mt.training import loop

WORLD = 64
REQUEST = ("all_reduce", 8)  # whether a signal asks to save or stop: after each step on CPUs, every tenth on GPUs
LOCAL = 2  # samples per process and step
T = 40  # timesteps of the tiny process


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[tuple[str, int]]]:
    """(collective, bytes that it hands to each process) of all but the gradients, which stay where they are."""
    found: list[tuple[str, int]] = []

    def counted(name: str, true: Any) -> Any:
        def call(values: torch.Tensor, *args: Any, **keywords: Any) -> Any:
            found.append((name, values.nbytes))
            return true(values, *args, **keywords)

        return call

    def setup(device: str) -> Processes:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
        return Processes(world_size=WORLD)

    monkeypatch.setattr(distributed, "setup", setup)
    monkeypatch.setattr(loop, "DistributedDataParallel", lambda network, **_: network)
    monkeypatch.setattr(dist, "all_reduce", counted("all_reduce", dist.all_reduce))
    monkeypatch.setattr(dist, "reduce", counted("reduce", dist.reduce))
    monkeypatch.setattr(distributed, "ALL_GATHER", counted("all_gather", distributed.ALL_GATHER))
    yield found
    Processes().close()


CASES: dict[str, tuple[dict[str, Any], list[tuple[str, int]]]] = {
    "nothing": ({"mt_task": "none"}, []),
    "labels": ({"mt_task": "label"}, []),
    "a head of pixels": ({"mt_task": "masked"}, [("all_reduce", 2 * T * 4)]),
    "form X": ({"mt_task": "paired", "mt_variant": "X", "mt_swap_prob": 0.5}, [("all_reduce", 2 * T * 4)]),
    "the importance sampler": (
        {"mt_task": "label", "schedule_sampler": "loss-second-moment"},
        [("all_gather", WORLD * LOCAL * 2 * 4)],
    ),
}


def steps(calls: list[tuple[str, int]], folder: Any, total: int, **settings: Any) -> Counter[tuple[str, int]]:
    """What a run of `total` steps asked for, which reports and saves after the last."""
    calls.clear()
    needed = task_flags(settings["mt_task"], folder)
    settings |= {"global_batch_size": WORLD * LOCAL, "log_interval": 100, "total_steps": total, "data_workers": 0}
    train.main(flags(**settings, **needed, log_dir=folder / str(total)))
    return Counter(calls)


@pytest.mark.parametrize("case", CASES)
def test_of_an_ordinary_step(case, calls, tmp_path):
    settings, expected = CASES[case]
    few, more = (steps(calls, tmp_path, total, **settings) for total in (1, 3))
    assert more - few == Counter(2 * [REQUEST, *expected])


def test_of_all_tasks_at_once(calls, tmp_path):
    """Log, head variances and sampler: one collective each, and the log's only where it is written."""
    settings = {"mt_task": ",".join(TASKS), "mt_variant": "any", "schedule_sampler": "loss-second-moment"}
    few, more = (steps(calls, tmp_path, total, **settings) for total in (1, 3))
    kinds = Counter(kind for kind, _ in (more - few).elements())
    assert kinds == {"all_reduce": 2 * 2, "all_gather": 2} and few["reduce", 0] == 0
    assert (
        sum(count for (kind, _), count in more.items() if kind == "reduce") == 2
    )  # of the report and of the checkpoint
