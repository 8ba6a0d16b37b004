"""One writer at a time: who is refused, what a killed one leaves, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
from console_runs import exit_code

from guided_mt.commands import classifier_train, train
from guided_mt.commands.prepare import prepare
from guided_mt.errors import ToldElsewhere, UserError
from guided_mt.generation.sharded import run_sharded
from guided_mt.runs.distributed import Processes
from guided_mt.runs.processes import claim
from guided_mt.runs.processes.claim import Claim


def forked(work: Callable[[], None]) -> int:
    """The id of a process that does this, then sleeps; it has done it when this returns."""
    done, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(tell, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(done, 1)
    os.close(done)
    os.close(tell)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def held(tmp_path):
    """A folder in which another process writes."""
    folder = tmp_path / "run"
    pid = forked(lambda: Claim(folder).__enter__() and None)
    yield folder, pid
    kill(pid)


def test_the_second_is_told_who_writes_where(held):
    folder, pid = held
    with pytest.raises(UserError) as caught, Claim(folder, setting="run.log_dir"):
        pass
    text = str(caught.value)
    assert (
        text.startswith(f"run.log_dir {folder}: process {pid} on {socket.gethostname()} since 2") and "\n" not in text
    )
    assert f"the lock is {folder / '.lock'}" in text


@pytest.mark.parametrize("command, data", [(train, "open_images"), (classifier_train, "open_source")])
def test_a_second_training_stops_before_data_are_opened(command, data, held, monkeypatch, capfd):
    folder, pid = held

    def forbidden(*_: object) -> None:
        raise AssertionError("data were opened")

    monkeypatch.setattr(command, data, forbidden)
    words = ["--log_dir", str(folder), "--data_dir", "builtin:digits", "--image_size", "8", "--num_classes", "10"]
    words += [
        "--classifier_width",
        "32",
        "--classifier_attention_resolutions",
        "4",
        "--classifier_depth",
        "1",
        "--device",
        "cpu",
    ]
    words += ["--channel_mult", "1"] if command is train else []
    assert exit_code(command.main, words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --log_dir {folder}: process {pid} on ")


def test_a_dry_run_claims_nothing(held):
    words = ["--log_dir", str(held[0]), "--data_dir", "builtin:digits", "--image_size", "8", "--channel_mult", "1"]
    assert exit_code(train.main, [*words, "--device", "cpu", "--dry_run", "True"]) == 0


def test_a_second_sampler_of_one_file(tmp_path):
    out = tmp_path / "samples.npz"
    pid = forked(lambda: Claim.of_file(out).__enter__() and None)
    try:
        with pytest.raises(UserError, match=rf"--out {out}: process {pid} on"):
            run_sharded(out, 1, 1, Processes(), {}, lambda batch: {})
        with Claim.of_file(tmp_path / "others.npz"):
            pass
    finally:
        kill(pid)


def test_a_second_preparation_of_one_file(tmp_path):
    out = tmp_path / "digits.zip"
    with Claim.of_file(out), pytest.raises(UserError, match=rf"OUT.zip {out}: this process is writing here"):
        prepare("builtin:digits", out, 8, workers=0, limit=1)


def test_a_killed_run_leaves_no_lock_even_where_its_children_live_on(tmp_path):
    folder, child = tmp_path / "run", tmp_path / "child"

    def work() -> None:
        Claim(folder).__enter__()
        child.write_text(str(forked(lambda: None)))  # as a data worker, which has all open files

    pid = forked(work)
    kill(pid)
    os.kill(int(child.read_text()), 0)  # lives
    with Claim(folder):
        pass
    os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_fork_that_ends_in_order_takes_nothing_back(tmp_path):
    with Claim(tmp_path) as own:
        pid = os.fork()
        if pid == 0:
            own.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / ".lock").exists()


def test_nothing_stays_behind_and_folders_are_made(tmp_path):
    with Claim(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match="this process is writing here"), Claim(tmp_path / "a" / "b"):
            pass
    assert not (tmp_path / "a").exists()
    with Claim(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]


def test_a_lock_whose_file_was_just_removed_is_none(tmp_path, monkeypatch):
    """The holder removes its file between our opening and our locking it: the lock on the nameless file is worth nothing."""
    true, calls = fcntl.lockf, []

    def late(handle: int, *words: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        true(handle, *words)

    monkeypatch.setattr(claim.fcntl, "lockf", late)
    with Claim(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(number, tmp_path, monkeypatch, caplog):
    def without(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(claim.fcntl, "lockf", without)
    with Claim(tmp_path):
        assert "this file system has no locks" in caplog.text and "a second run" in caplog.text
    monkeypatch.setattr(claim, "fcntl", None)
    with Claim(tmp_path):
        pass


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"--log_dir .*file: can't be written .*name another folder"),
        Claim(tmp_path / "file"),
    ):
        pass


def test_all_processes_end_where_the_main_one_is_refused(tmp_path, monkeypatch):
    """One line is printed: the others end in silence."""
    monkeypatch.setattr(Processes, "largest", lambda self, number: 1)
    with pytest.raises(ToldElsewhere), Processes(rank=1, world_size=2).sole_writer(Claim(tmp_path / "run")):
        pass
    assert not (tmp_path / "run").exists() and exit_code(lambda argv: (_ for _ in ()).throw(ToldElsewhere("x"))) == 2
