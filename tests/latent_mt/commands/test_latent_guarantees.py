"""As guided_mt/commands/test_guarantees.py in latent space, for every row of TASKS and for several at once with three sides: a run
that is killed and started again, or that is spread over processes, is the run; a sample is the same in every batch and on every
number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import ROOT, assert_near, assert_same, contents, finish, mpiexec, progress, start_python, step_folder, words
from tiny_latent import DIT
from tiny_tasks import SIDES, VAL_COUNT, entries, several, write_data, write_tasks

from guided_mt.modalities.registry import TASKS
from guided_mt.runs.checkpoint import checkpoints
from latent_mt.commands import latent_sample, latent_train

# All that has a state: the average, the label's table (new at steps 0 and 3, saved at 2 and 4, killed at 3), an unfinished
# interval of the log, the measured scale factor. Dropout belongs to a process and is in test_latent_training.
RUN = {"ema_rate": "0.5", "log_interval": 3, "total_steps": 4, "save_interval": 2, "val_interval": 4}
ALONE = {"mt_variant": "any", "mt_drop_prob": 0.3}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"rows": [name], **ALONE} for name in TASKS},
    "weighed and routed": {
        "rows": ["masked", "label"],
        **ALONE,
        "mt_timestep_weights": "learned",
        "mt_task_weighting": "uncertainty",
        "mt_routing": "dtr",
    },
    "all, any": {"mt_variant": "any", "mt_drop_prob": 0.3},
    "all, U": {"mt_variant": "U", "mt_drop_prob": 0.3},
    "all, X": {"mt_variant": "X", "mt_drop_prob": 0.0},
}
TRANSFORMER = {"target": "models.DiT", "params": DIT}
ROWS |= {f"{row}, of a DiT": {**ROWS[row], "unet_config": TRANSFORMER} for row in ("all, any", "all, U", "all, X")}
COUNT = 5  # samples from nothing
ODD = 2  # samples per pass: three passes, so that one of two processes has fewer
GIVEN = {"all, any": "map,edges,masked,label", "all, U": "map,masked,label", "all, X": "map,edges,masked"}
GIVEN |= {f"{row}, of a DiT": given for row, given in GIVEN.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every row trained: whole, killed at step 3 and started again, and on two processes; drawn from, likewise."""
    folder = write_data(tmp_path_factory.mktemp("guarantees"))

    def training(kind: str, row: str, dies_at: int | None = None, **values: Any) -> dict[str, Any]:
        params = {key: value for key, value in ROWS[row].items() if key != "rows"}
        what = {"mt_tasks": entries(ROWS[row]["rows"], folder)} if "rows" in ROWS[row] else several(folder)
        for name, entry in what["mt_tasks"].items():
            if "mt_encoder_refresh" in TASKS[entry.get("task", name)].run_options:
                entry["mt_encoder_refresh"] = 3
        if what["mt_tasks"].keys() & {name for name, task in TASKS.items() if task.is_side}:
            what["mt_swap_prob"] = 0.5
        file = folder / f"{kind} {row}.yaml"
        write_tasks(file, folder, folder / kind / row, RUN, scale_by_std=True, **what, **params)
        settings = [f"{key}={value}" for key, value in values.items()]
        return {"command": "latent_train", "argv": ["--config", str(file), *settings], "dies_at": dies_at}

    def drawing(kind: str, row: str, batch_size: int, given: str = "") -> dict[str, Any]:
        settings = {"model_path": folder / "whole" / row, "out": folder / kind / row, "batch_size": batch_size}
        more = {"given": given, "split": "val"} if given else {"num_samples": COUNT}
        argv = words(**settings, **more, steps=2, device="cpu")
        return {"command": "latent_sample", "argv": argv, "dies_at": None}

    def drawings(kind: str, batch_size: int) -> list[dict[str, Any]]:
        from_nothing = [drawing(kind, row, batch_size) for row in ROWS if ROWS[row]["mt_variant"] != "X"]
        return from_nothing + [drawing(kind, row, batch_size, given) for row, given in GIVEN.items()]

    for row in ROWS:
        latent_train.main(training("whole", row)["argv"])
    # The first one lives: what it imports, the children of its process need not.
    deaths = [training("warm", next(iter(ROWS))), *(training("killed", row, dies_at=3) for row in ROWS)]
    finish(many_commands(folder / "deaths.json", deaths))
    for row in ROWS:
        assert [path.name for path in checkpoints(folder / "killed" / row)] == ["step_00000002"]
        latent_train.main(training("killed", row)["argv"])
    for one in drawings("drawn", 16):
        latent_sample.main(one["argv"])
    spread = [training("two", row, **{"data.params.batch_size": 2}) for row in ROWS]
    finish(many_commands(folder / "spread.json", spread + drawings("drawn by two", ODD), mpiexec(2)))
    return folder


def many_commands(file: Path, rows: list[dict[str, Any]], launcher=()):
    file.write_text(json.dumps(rows))
    return start_python(ROOT / "tests" / "support" / "many_commands.py", [str(file)], launcher)


@pytest.mark.parametrize("row", ROWS)
def test_killed_and_started_again_is_the_same_run(row, folder):
    """4 steps == 3 steps + kill -9 + the same command from step 2: weights, averages, state and losses, bit for bit."""
    whole, killed = folder / "whole" / row, folder / "killed" / row
    for step in (2, 4):
        expected, found = contents(step_folder(whole, step)), contents(step_folder(killed, step))
        for one in (expected, found):
            del one["config.yaml"]  # names its own folder
        assert_same(expected, found)
    assert progress(whole) == progress(killed) and [line["step"] for line in progress(whole)] == ["3", "4"]


@pytest.mark.parametrize("row", ROWS)
def test_two_processes_are_the_same_run(row, folder):
    # Adam turns the rounding of a vanishing gradient into a whole step, which these show
    loose = ("grad_", "rms_", "spread_", "val_")
    assert_near(progress(folder / "whole" / row), progress(folder / "two" / row), rel=1e-6, loose=loose, loose_rel=1e-4)


def drawn_from(row: str, what: str, folder: Path) -> list[Path]:
    """The sample files of a row; what: drawn, or drawn by two."""
    return sorted((folder / what / row).glob("*.npz"))


@pytest.mark.parametrize("row", ROWS)
def test_samples_are_the_same_in_every_batch_and_process(row, folder):
    """One process and one pass, or two processes and passes of two; from nothing, and with some of the data given."""
    one, two = drawn_from(row, "drawn", folder), drawn_from(row, "drawn by two", folder)
    assert one and [file.name for file in one] == [file.name for file in two]
    for file, other in zip(one, two, strict=True):
        with np.load(file) as expected, np.load(other) as found:
            assert expected.files == found.files and len(expected["arr_0"]) in (COUNT, VAL_COUNT)
            assert (expected["arr_0"][0] != expected["arr_0"][1]).any()
            for name in expected.files:
                np.testing.assert_array_equal(expected[name], found[name], err_msg=f"{file.name}: {name}")


@pytest.mark.parametrize("row", ROWS)
def test_what_is_not_given_is_in_the_file(row, folder):
    """Of the images and of every modality; form X has classes at random, which it is given, and no other modality."""
    modalities = ROWS[row].get("rows", [*SIDES, *several(folder)["mt_tasks"]])
    if ROWS[row]["mt_variant"] == "X":
        modalities = [name for name, entry in several(folder)["mt_tasks"].items() if "num_classes" in entry]
    for file in drawn_from(row, "drawn", folder):
        if file.stem.endswith("_truth"):
            continue
        with np.load(file) as arrays:
            found = set(arrays.files)
        given = GIVEN.get(row, "").split(",") if "_of_" in file.stem else []
        first = SIDES[:1] if "rows" not in ROWS[row] else []
        names = {"arr_1": "label"}
        shown = {names.get(name, name.removesuffix("_probabilities")) for name in found}
        assert shown == {"arr_0", *modalities} - {*given, *first}, file


@pytest.mark.parametrize("row", ROWS)
def test_the_log_has_every_modality(row, folder):
    """Its loss in training and validation, and the size of each encoding that is the network's own."""
    lines = progress(folder / "whole" / row)
    names, last = ROWS[row].get("rows", [*SIDES[1:], *several(folder)["mt_tasks"]]), lines[-1]
    # In a single step of few images a modality may have been given to all of them.
    assert all(any(np.isfinite(float(line[name])) for line in lines) for name in ("mse", *names))
    for name in names:
        own = name not in SIDES and TASKS[name].tokens is not None and name != "representation"
        assert (f"rms_{name}" in last) == (own and ROWS[row]["mt_variant"] != "X")
