"""Checkpoints that are written while training goes on: what is in them, when they are whole, and what is said when one fails."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from test_policy import Subject, drive, saved
from tiny import ROOT, contents, step_folder, wait_for

from guided_mt.errors import UserError
from guided_mt.runs import checkpoint
from guided_mt.runs.distributed import Processes
from guided_mt.runs.loop_config import LoopConfig
from guided_mt.runs.policy import RunPolicy
from guided_mt.runs.writer import CheckpointWriter, HostCopies

TIMEOUT = 60  # seconds until a test that waits for a thread fails


class Gate:
    """`save_checkpoint` that waits, when it has been called, until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called, self.open, self.inside, self.most = threading.Event(), threading.Event(), 0, 0
        self.save = checkpoint.save_checkpoint
        monkeypatch.setattr(checkpoint, "save_checkpoint", self)

    def __call__(self, *args: Any, **values: Any) -> Path:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.called.set()
        assert self.open.wait(TIMEOUT)
        written = self.save(*args, **values)
        self.inside -= 1
        return written


def begin(writer: CheckpointWriter, folder: Path, step: int = 1, **state: Any) -> None:
    weights = {"model": {"w": state.pop("weights", torch.ones(2))}}
    writer.begin(folder, step, weights=weights, training_state=state, config_yaml="a: 1", classes=None)


def policy(folder: Path, subject: Subject, **settings: Any) -> RunPolicy:
    config = LoopConfig(**{"total_steps": 9, "save_interval": 2, "log_interval": 1000, **settings})
    columns = ["step", "loss", "images_per_second"]
    return RunPolicy(
        subject, config, Processes(), folder, step=0, columns=columns, images_per_step=1, config_yaml="", advice=""
    )


def test_what_is_written_is_the_state_at_the_save(tmp_path, monkeypatch):
    """Training changes its tensors in place while the thread waits for the disk."""
    gate, writer = Gate(monkeypatch), CheckpointWriter()
    weights, moments, groups = torch.ones(2), {0: {"m": torch.ones(2, dtype=torch.float64)}}, [{"lr": 0.5}]
    begin(writer, tmp_path, weights=weights, moments=moments, groups=groups)
    assert gate.called.wait(TIMEOUT)
    weights.zero_()
    moments[0]["m"] += 1
    groups[0]["lr"] = 0.0
    gate.open.set()
    assert writer.close() is None
    found = contents(step_folder(tmp_path, 1))
    assert found["model.safetensors"]["w"].tolist() == [1, 1]
    assert found["training_state.pt"]["moments"][0]["m"].tolist() == [1, 1]
    assert found["training_state.pt"]["groups"] == [{"lr": 0.5}]


def test_copies_keep_layouts_and_are_made_once():
    fast = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    originals = {"a": {"fast": fast, "half": torch.ones(2).bfloat16()}, "b": [fast.detach(), (torch.tensor(1), "x", 2)]}
    copies = HostCopies()
    found = copies.of(originals)
    copies.wait()
    assert torch.equal(found["a"]["fast"], fast) and found["a"]["fast"].stride() == fast.stride()
    assert found["a"]["fast"].data_ptr() != fast.data_ptr() and found["b"][0] is found["a"]["fast"]
    assert found["a"]["half"].dtype == torch.bfloat16 and found["b"][1] == (torch.tensor(1), "x", 2)


def test_training_goes_on_meanwhile_and_one_checkpoint_is_written_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with policy(tmp_path, Subject()) as running:
        for step in range(1, 4):
            assert not running.after_step(step)  # that of step 2 is not yet written
        assert gate.called.is_set() and saved(tmp_path) == []
        gate.open.set()
        for step in range(4, 10):
            running.after_step(step)
        assert saved(tmp_path) == [2, 4, 6, 8, 9] and gate.most == 1


def test_the_end_of_a_run_by_an_error_waits_for_the_write(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError), policy(tmp_path, Subject()) as running:
        running.after_step(2)
        threading.Timer(0.1, gate.open.set).start()
        raise ZeroDivisionError
    assert saved(tmp_path) == [2]


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Writing the checkpoint of `step` ends with this error, before anything else is done."""
    save = checkpoint.save_checkpoint

    def failing(run: Path, at: int, **values: Any) -> Path:
        if at == step:
            raise error
        return save(run, at, **values)

    class Now:
        def submit(self, work: Any) -> Future:
            future: Future = Future()
            try:
                future.set_result(work())
            except Exception as raised:
                future.set_exception(raised)
            return future

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
    monkeypatch.setattr("guided_mt.runs.writer.ThreadPoolExecutor", lambda *_, **__: Now())


@pytest.mark.parametrize("failing, stopped", [(4, 5), (6, 8)], ids=["report", "save"])
def test_a_failed_write_stops_the_run_at_the_next_look(failing, stopped, tmp_path, monkeypatch):
    """Which is the next report, as that of step 5, or the next save; earlier checkpoints stay."""
    fail_at(failing, monkeypatch, UserError("disk full"))
    with pytest.raises(UserError, match="disk full"), policy(tmp_path, Subject()) as running:
        for step in range(1, 10):
            reached = step
            running.after_step(step, {"loss": 0.5} if step == 5 else {})
    assert reached == stopped and saved(tmp_path) == list(range(2, failing, 2))


def test_what_is_no_bad_input_is_raised_as_it_is(tmp_path, monkeypatch):
    fail_at(2, monkeypatch, KeyError("a fault of ours"))
    with pytest.raises(KeyError, match="a fault of ours"):
        drive(tmp_path, 3, save_interval=2)


def test_a_failed_write_beside_another_error_is_said(tmp_path, monkeypatch, caplog):
    fail_at(2, monkeypatch, UserError("disk full"))
    with pytest.raises(ZeroDivisionError), policy(tmp_path, Subject()) as running:
        running.after_step(2)
        raise ZeroDivisionError
    assert caplog.messages == ["disk full"]


def test_a_failed_write_at_the_end_of_a_run_that_ends_early(tmp_path, monkeypatch):
    fail_at(2, monkeypatch, UserError("disk full"))
    with pytest.raises(UserError, match="disk full"), policy(tmp_path, Subject()) as running:
        running.after_step(2)


def test_too_little_memory_for_the_copies_is_told_like_a_full_disk(tmp_path, monkeypatch):
    def no_memory(self: HostCopies, value: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(HostCopies, "of", no_memory)
    with pytest.raises(UserError, match=r"step_00000003: .* \(can't allocate memory\); earlier checkpoints are intact"):
        drive(tmp_path, 3)


PROGRAM = """
import sys, time
from pathlib import Path
import torch
from guided_mt.runs import checkpoint
from guided_mt.runs.writer import CheckpointWriter
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
sync = checkpoint.sync
checkpoint.sync = lambda path: (time.sleep(seconds), sync(path))
weights = {"model": {"w": torch.ones(2)}}
CheckpointWriter().begin(folder, 2, weights=weights, training_state={}, config_yaml="", classes=None)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


def test_the_end_of_the_program_finishes_the_write(program, tmp_path):
    done = warm.run(program, [tmp_path / "run", "0.1"], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "run") == [2]


def test_kill_9_while_writing_leaves_the_older_checkpoint(program, tmp_path):
    run, writer = tmp_path / "run", CheckpointWriter()
    begin(writer, run)
    assert writer.failure(wait=True) is None
    process = warm.Started(program, [str(run), "1000"], {"PYTHONPATH": str(ROOT)})
    half = run / "checkpoints" / ".tmp_step_00000002"
    wait_for(lambda: (half / "training_state.pt").exists(), process)
    process.kill()
    process.wait()
    assert half.exists() and saved(run) == [1]
    begin(writer, run, step=3)
    assert writer.close() is None and not half.exists() and saved(run) == [1, 3]
