"""The run policy alone: what is due after which step, and when a run is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import progress

from guided_mt.errors import Interrupted, UserError
from guided_mt.runs import checkpoint
from guided_mt.runs.distributed import Processes
from guided_mt.runs.loop_config import LoopConfig
from guided_mt.runs.policy import RunPolicy
from guided_mt.runs.processes.signals import Request, Requests
from guided_mt.runs.skipped import SkippedSteps


class Subject:
    """Something that is trained: it notes what it is asked for."""

    sharded = False

    def __init__(self) -> None:
        self.skipped, self.asked = SkippedSteps(), []

    def report_row(self) -> dict[str, float]:
        self.asked.append("row")
        return {"loss": 0.5}

    def preview(self) -> np.ndarray:
        self.asked.append("preview")
        return np.zeros((4, 4, 3), np.uint8)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"model": {"w": torch.ones(1)}}

    def training_state(self) -> dict[str, Any]:
        return {"more": 1}


def drive(folder: Path, steps: int, *, bad: range = range(0), scale: float | None = None, **settings: Any) -> Subject:
    """A run of `steps` steps with 16 samples each, of which those in `bad` are not finite; scale: fp16's, in every step."""
    folder.mkdir(exist_ok=True)
    subject, preview_interval = Subject(), settings.pop("preview_interval", 0)
    config = LoopConfig(**{"total_steps": steps, "save_interval": 1000, "log_interval": 1000, **settings})
    columns = ["step", "samples", "loss", "val", "skipped_steps", "images_per_second"]
    with RunPolicy(
        subject, config, Processes(), folder, step=0, columns=columns, images_per_step=16, config_yaml="a: 1\n",
        preview_interval=preview_interval, advice="be careful",
    ) as policy:  # fmt: skip
        for step in range(1, steps + 1):
            subject.skipped.count(torch.tensor(float(step in bad)), None if scale is None else torch.tensor(scale))
            if policy.after_step(step, {"val": 0.25} if step == 5 else {}):
                break
    return subject


def saved(folder: Path) -> list[int]:
    return [checkpoint.checkpoint_step(found) for found in checkpoint.checkpoints(folder)]


def test_intervals(tmp_path):
    """Rows at the interval, where there are figures and at the end; pictures; checkpoints, of which the newest stay."""
    subject = drive(tmp_path, 7, log_interval=3, save_interval=2, keep_checkpoints=2, preview_interval=4)
    rows = progress(tmp_path)
    assert [row["step"] for row in rows] == ["3", "5", "6", "7"] and rows[0]["samples"] == "48"
    assert [row["val"] for row in rows] == ["", "0.25", "", ""] and {row["loss"] for row in rows} == {"0.5"}
    assert subject.asked == ["row", "preview", "row", "row", "row"]
    assert [file.name for file in (tmp_path / "grids").iterdir()] == ["step_00000004.png"]
    assert saved(tmp_path) == [6, 7]
    newest = checkpoint.checkpoints(tmp_path)[-1]
    assert checkpoint.read_state(newest / "training_state.pt") == {"step": 7, "more": 1}
    assert (newest / "config.yaml").read_text() == "a: 1\n"


def test_a_save_waits_for_a_good_step(tmp_path):
    drive(tmp_path, 9, bad=range(4, 7), save_interval=4)
    assert saved(tmp_path) == [7, 8, 9]
    assert progress(tmp_path)[-1]["skipped_steps"] == "3"


@pytest.mark.parametrize("bad", [range(1, 11), range(2, 20), range(11, 21)], ids=str)
def test_ten_skipped_steps_in_a_row_are_noticed_wherever_they_lie(bad, tmp_path):
    with pytest.raises(UserError, match=rf"not finite {len(bad)} steps in a row, .*: be careful$"):
        drive(tmp_path, 25, bad=bad)


@pytest.mark.parametrize("bad", [range(2, 11), range(5, 14)], ids=str)
def test_nine_are_not(bad, tmp_path):
    drive(tmp_path, 25, bad=bad)
    assert saved(tmp_path) == [25] and progress(tmp_path)[-1]["skipped_steps"] == "9"


def test_back_offs_of_the_loss_scale_are_counted_but_speak_of_nothing(tmp_path):
    """Neither stop a run nor keep it from saving; at a scale of 1 they do both."""
    drive(tmp_path / "off", 25, bad=range(2, 20), scale=2.0, save_interval=4, keep_checkpoints=10)
    assert saved(tmp_path / "off") == [4, 8, 12, 16, 20, 24, 25]
    assert progress(tmp_path / "off")[-1]["skipped_steps"] == "18"
    with pytest.raises(UserError, match="18 steps in a row"):
        drive(tmp_path / "floor", 25, bad=range(2, 20), scale=1.0, save_interval=4)
    assert saved(tmp_path / "floor") == []


class Signalled(Subject):
    """A signal comes while step 4 is reported."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number

    def report_row(self) -> dict[str, float]:
        os.kill(os.getpid(), self.number)
        return {}


def signalled(number: signal.Signals, folder: Path, processes: Processes | None = None) -> tuple[list[int], RunPolicy]:
    """(the steps that were done of 3 to 6, the policy after the run)."""
    config, steps = LoopConfig(total_steps=7, log_interval=4, save_interval=100), []
    with RunPolicy(
        Signalled(number), config, processes or Processes(), folder, step=2, columns=["step", "loss", "images_per_second"],
        images_per_step=1, config_yaml="", advice="",
    ) as policy:  # fmt: skip
        for step in range(3, 7):
            steps.append(step)
            if policy.after_step(step):
                break
    return steps, policy


@pytest.fixture
def handlers():
    """The signals' handlers, which a run gives back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name, word", [("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")])
def test_signals_that_save_and_end(name, word, tmp_path, caplog, handlers):
    caplog.set_level("INFO")
    steps, policy = signalled(signal.Signals[name], tmp_path)
    assert steps == [3, 4] and saved(tmp_path) == [4]
    assert caplog.messages == [f"{word}: saved step 4; run the same command to go on"]
    if name == "SIGTERM":
        policy.raise_if_interrupted()
    else:
        with pytest.raises(Interrupted):
            policy.raise_if_interrupted()


def test_sigusr1_saves_and_goes_on(tmp_path, caplog, handlers):
    caplog.set_level("INFO")
    steps, policy = signalled(signal.SIGUSR1, tmp_path)
    assert steps == [3, 4, 5, 6] and saved(tmp_path) == [4]
    assert caplog.messages == ["SIGUSR1: saved step 4; going on"]
    policy.raise_if_interrupted()


@pytest.mark.parametrize("launcher, rank, raises", [("mpi", 0, True), ("mpi", 1, False), ("torchrun", 0, False)])
def test_who_ends_with_130_among_several(launcher, rank, raises, tmp_path, monkeypatch, handlers):
    """Launchers end all where one fails, and torchrun starts all anew."""
    monkeypatch.setattr(Processes, "largest", lambda self, number: int(number))
    (tmp_path / "checkpoints").mkdir()
    _, policy = signalled(signal.SIGINT, tmp_path, Processes(rank=rank, world_size=2, launcher=launcher))
    with pytest.raises(Interrupted) if raises else contextlib.nullcontext():
        policy.raise_if_interrupted()


def test_a_second_ctrl_c_is_the_systems(tmp_path, handlers, capfd):
    """It ends the process at once, whatever that does."""
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.take() is Request.INTERRUPT and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert capfd.readouterr().err == "\nCtrl-C: saving after this step; once more ends at once, without\n"


def test_of_several_requests_the_largest_counts(handlers):
    with Requests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.take() is Request.STOP
        assert requests.take() is Request.STOP


def test_a_failing_save_stops_the_run(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        drive(tmp_path, 3)
