"""How a command ends: exit codes, and one line for what the user can mend."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from console_runs import exit_code

from guided_mt.errors import Interrupted, ProcessError, UserError
from guided_mt.generation.sharded import run_sharded
from guided_mt.runs.distributed import Processes


def ended(error: BaseException, capsys) -> tuple[int, str]:
    """(exit code, what stands on stderr) of a command that raises."""

    def main(_: object) -> None:
        raise error

    return exit_code(main), capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("bad flag"), 2, "error: bad flag\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted(), 130, ""),
        (Interrupted("interrupted: 3 batches"), 130, "interrupted: 3 batches\n"),
        (
            ModuleNotFoundError("No module named 'pytorch_lightning'", name="pytorch_lightning"),
            2,
            "error: the package pytorch_lightning is missing: pip install -e '.[latent]' in the project's folder\n",
        ),
        (
            ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot"),
            2,
            "error: the package matplotlib is missing: pip install -e '.[plots]' in the project's folder\n",
        ),
        (
            ModuleNotFoundError("No module named 'blobfile'", name="blobfile"),
            2,
            "error: the package blobfile is missing: pip install -e '.' in the project's folder\n",
        ),
    ],
)
def test_ends(error, code, said, capsys):
    assert ended(error, capsys) == (code, said)


def test_a_module_of_ours_that_is_missing_is_a_fault_with_its_traceback(capsys):
    with pytest.raises(ModuleNotFoundError):
        ended(ModuleNotFoundError("No module named 'guided_mt.x'", name="guided_mt.x"), capsys)


def test_what_a_process_alone_knows_it_tells_whatever_its_rank(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended(UserError("for all alike"), capsys) == (2, "")
    assert ended(ProcessError("rank 1 waited"), capsys) == (2, "error: rank 1 waited\n")


def test_sigusr1_ends_no_command(capsys):
    assert exit_code(lambda _: os.kill(os.getpid(), signal.SIGUSR1)) == 0


def test_interrupted_sampling_keeps_its_parts_and_goes_on(tmp_path, capsys):
    """The second batch is interrupted; the same command again makes that one and the third."""
    made: list[int] = []

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        if batch[0] == 2 and made == [0]:
            made.append(-1)
            os.kill(os.getpid(), signal.SIGINT)
        made.append(batch[0])
        return {"arr_0": np.array(batch[:2])}

    out = tmp_path / "s.npz"
    command = lambda _: run_sharded(out, 6, 2, Processes(), {}, make)  # noqa: E731
    assert exit_code(command) == 130
    assert f"interrupted: 1 batches wait in {out}.parts; the same command goes on\n" in capsys.readouterr().err
    assert exit_code(command) == 0 and made == [0, -1, 2, 4]
    assert np.load(out)["arr_0"].tolist() == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
