"""Programs that an experiment starts end in order with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guided_mt.errors import Interrupted
from reproduce.children import passing_on_sigterm, run_child

# A program that takes a while to save when it is asked to end, as a training run.
SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(0.6)
    open(sys.argv[1], "a").write("saved")
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[3] == "deaf" else save)
open(sys.argv[1], "w").close()
time.sleep(20)
"""


def run_and_send(file, code: int, *numbers: signal.Signals, to_child: bool = False, deaf: str = "") -> int:
    """run_child while signals reach this process, each half a second after the other; to_child: also the program."""
    words = [sys.executable, "-c", SAVES, str(file), str(code), deaf]

    def send() -> None:
        while not file.exists():
            time.sleep(0.01)
        for number in numbers:
            if to_child:
                children = Path(f"/proc/{os.getpid()}/task/{threading.main_thread().native_id}/children").read_text()
                os.kill(int(children.split()[-1]), number)
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send).start()
    return run_child(words)


def test_ctrl_c_waits_for_what_the_program_saves(tmp_path):
    with pytest.raises(Interrupted):
        run_and_send(tmp_path / "f", 130, signal.SIGINT, to_child=True)
    assert (tmp_path / "f").read_text() == "saved"


def test_a_second_ctrl_c_waits_no_more(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        run_and_send(tmp_path / "f", 130, signal.SIGINT, signal.SIGINT, deaf="deaf")
    assert not isinstance(caught.value, Interrupted) and (tmp_path / "f").read_text() == ""


def test_sigterm_is_passed_on(tmp_path):
    with pytest.raises(SystemExit) as end:
        run_and_send(tmp_path / "f", 0, signal.SIGTERM)
    assert end.value.code == 143 and (tmp_path / "f").read_text() == "saved"


def test_the_exit_code():
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_sigterm_is_passed_on_to_the_programs_of_all_threads(tmp_path):
    """And none is begun after it."""
    files = [tmp_path / name for name in "abc"]
    programs = [[sys.executable, "-c", SAVES, str(file), "0", ""] for file in files]

    def send() -> None:
        while not (files[0].exists() and files[1].exists()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def one_after_the_other(words: list[str]) -> None:
        run_child(words)
        run_child(programs[2])

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as end, passing_on_sigterm(), ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(one_after_the_other, words) for words in programs[:2]]:
            done.result()
    assert end.value.code == 143
    assert [file.exists() and file.read_text() for file in files] == ["saved", "saved", False]
