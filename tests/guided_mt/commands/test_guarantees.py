"""What holds for every row of TASKS, and for several at once: a run that is killed and started again, or that is spread over
processes, is the run; a sample is the same in every batch and on every number of processes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import (
    ROOT,
    assert_near,
    assert_same,
    contents,
    finish,
    flags,
    mpiexec,
    negatives,
    progress,
    start_python,
    step_folder,
    task_flags,
    words,
)

from guided_mt.commands import sample, train
from guided_mt.modalities.registry import TASKS
from guided_mt.runs.checkpoint import checkpoints

# All that has a state: the average, the importance sampler, the label's table (new at steps 0 and 3, saved at 2 and 4, killed
# at 3), an unfinished interval of the log. Dropout belongs to a process and is in test_train.
COMMON = {
    "mt_drop_prob": 0.3,
    "mt_encoder_refresh": 3,
    "mt_conflict_interval": 2,
    "schedule_sampler": "loss-second-moment",
    "ema_rate": 0.5,
    "log_interval": 3,
    "total_steps": 5,
    "save_interval": 2,
}
E_HEAD = {
    "mt_label_head": "E",
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
    "classifier_pool": "adaptive",
}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"mt_task": name, "mt_variant": "any"} for name in TASKS},
    "all, any": {"mt_task": ",".join(TASKS), "mt_variant": "any", "mt_swap_prob": 0.5},
    "all, U": {"mt_task": ",".join(TASKS), "mt_variant": "U", "mt_swap_prob": 0.5},
    "all, X": {"mt_task": ",".join(TASKS), "mt_variant": "X", "mt_drop_prob": 0},
    "head E": {"mt_task": "label", "mt_variant": "U", **E_HEAD},
    "weights that are learned": {
        "mt_task": "masked,label",
        "mt_variant": "any",
        "timestep_weights": "learned",
        "mt_timestep_weights": "masked=learned,label=min-snr",
        "mt_task_weighting": "uncertainty",
        "schedule_sampler": "stratified",
    },
    "transformer": {"mt_backbone": "dit", "mt_task": ",".join(TASKS), "mt_variant": "any", "mt_swap_prob": 0.5},
    "transformer, in context": {
        "mt_backbone": "dit",
        "mt_task": "masked,label,caption",
        "mt_variant": "any",
        "dit_context": "in-context",
        "use_checkpoint": True,
    },
    "routed": {"mt_task": "masked,label", "mt_variant": "any", "mt_routing": "dtr"},
}
for name, package in {"pcgrad": "torchjd", "nash": "ecos"}.items():
    if find_spec(package):  # of the extra 'tasks'
        weighting = {"mt_task_weighting": name, "mt_task_weighting_interval": 2}
        ROWS[name] = {"mt_task": "masked,label", "mt_variant": "U", **weighting}
COUNT = 7  # samples
ODD = 3  # samples per pass: three passes, so that one of two processes has fewer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every row trained: whole, killed at step 3 and started again, and on two processes; drawn from, likewise."""
    folder = tmp_path_factory.mktemp("guarantees")

    def command(kind: str, row: str) -> list[str]:
        needed = task_flags(ROWS[row]["mt_task"], folder)
        return flags(**{**COMMON, **needed, **ROWS[row], "log_dir": folder / kind / row})

    def drawing(kind: str, row: str, **values) -> list[str]:
        settings = {"model_path": folder / "whole" / row, "out": folder / kind / f"{row}.npz", "num_samples": COUNT}
        if row == "all, X":  # which is always given the other image
            settings["given"] = f"paired={negatives(folder)}"
        return words(**{**settings, "steps": 2, "label_draw": "label" in row, "device": "cpu", **values})

    for row in ROWS:
        train.main(command("whole", row))
    # The first one lives: what it imports, the children of its process need not.
    deaths = [{"command": "train", "argv": command("warm", next(iter(ROWS))), "dies_at": None}]
    deaths += [{"command": "train", "argv": command("killed", row), "dies_at": 3} for row in ROWS]
    finish(start_python(ROOT / "tests" / "support" / "many_commands.py", [write(folder / "deaths.json", deaths)]))
    for row in ROWS:
        assert [path.name for path in checkpoints(folder / "killed" / row)] == ["step_00000002"]
        train.main(command("killed", row))
    for row in ROWS:
        sample.main(drawing("drawn", row, batch_size=16))
    spread = [{"command": "train", "argv": command("two", row), "dies_at": None} for row in ROWS]
    spread += [
        {"command": "sample", "argv": drawing("drawn by two", row, batch_size=ODD), "dies_at": None} for row in ROWS
    ]
    finish(
        start_python(
            ROOT / "tests" / "support" / "many_commands.py", [write(folder / "spread.json", spread)], mpiexec(2)
        )
    )
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.mark.parametrize("row", ROWS)
def test_killed_and_started_again_is_the_same_run(row, folder):
    """5 steps == 3 steps + kill -9 + the same command from step 2: weights, averages, state and losses, bit for bit."""
    whole, killed = folder / "whole" / row, folder / "killed" / row
    for step in (2, 4, 5):
        expected, found = contents(step_folder(whole, step)), contents(step_folder(killed, step))
        for one in (expected, found):
            del one["config.yaml"]  # names its own folder
        assert_same(expected, found)
    assert progress(whole) == progress(killed) and [line["step"] for line in progress(whole)] == ["3", "5"]


@pytest.mark.parametrize("row", ROWS)
def test_two_processes_are_the_same_run(row, folder):
    whole, two = progress(folder / "whole" / row), progress(folder / "two" / row)
    assert len(whole) == 2
    # Adam turns the rounding of a vanishing gradient into a whole step, which these show
    assert_near(whole, two, rel=1e-6, loose=("grad_", "rms_", "spread_"), loose_rel=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_samples_are_the_same_in_every_batch_and_process(row, folder):
    """One process and one pass, or two processes and passes of three."""
    with np.load(folder / "drawn" / f"{row}.npz") as expected, np.load(folder / "drawn by two" / f"{row}.npz") as found:
        assert expected.files == found.files and len(expected["arr_0"]) == COUNT
        assert (expected["arr_0"][0] != expected["arr_0"][1]).any()
        for name in expected.files:
            np.testing.assert_array_equal(expected[name], found[name], err_msg=name)


@pytest.mark.parametrize("row", ROWS)
def test_the_log_has_the_picture_of_transfer(row, folder):
    """Norm and cosine of the tasks' gradients, in the intervals that measured them; the size of each encoding in the frame."""
    (first, last), tasks = progress(folder / "whole" / row), ROWS[row]["mt_task"].split(",")
    for a in ("denoising", *tasks):
        assert float(first[f"grad_norm_{a}"]) > 0
        for b in tasks:
            if f"grad_cos_{a}_{b}" in first:
                assert -1 <= float(first[f"grad_cos_{a}_{b}"]) <= 1
    assert sum(name.startswith("grad_cos_") for name in first) == len(tasks) * (len(tasks) + 1) / 2
    assert float(last[f"grad_norm_{tasks[0]}"]) > 0
    for task in tasks:
        assert (f"rms_{task}" in first) == (ROWS[row]["mt_variant"] != "X")
