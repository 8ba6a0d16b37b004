"""The demo in this process: all stages at two steps, nothing done twice, what it says when it is stopped; its training followed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny import words

from guided_mt.commands import train as train_command
from guided_mt.errors import UserError
from guided_mt.runs.config import load_preset
from reproduce.demo import stages, training

STEPS = 2


@pytest.fixture
def small(monkeypatch):
    """Few samples of few calls."""
    few = {"CALLS": 2, "RESTORED": 12, "NAMED": 12, "FROM_NOTHING": 4, "PER_LABEL": 1, "COLUMNS": 3}
    for name, value in few.items():
        monkeypatch.setattr(stages, name, value)


def no_training(*_):
    raise AssertionError("trained again")


def test_all_stages_and_once(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    argv, trained = ["--run", str(run), "--steps", str(STEPS)], []
    less = stages.trainings(run, STEPS)[1].steps

    def in_process(preset, folder, steps, processes, *more):
        assert processes == 1
        trained.append((preset, folder, steps))
        tiny = words(global_batch_size=4, image_size=8, channel_mult=1, attention_resolutions=8)
        train_command.main([*training.options(preset, folder, steps), *more, *tiny])

    monkeypatch.setattr(stages, "train", in_process)
    stages.main(argv)
    said = capsys.readouterr().out
    for part in ("1/4", "mean training image", "label head names", "digits drawn with a label given", "Type next:"):
        assert part in said
    assert trained == [("demo-digits", run, STEPS), ("demo-digits-label", run / "label", less)]
    made = [run / "samples" / f"restored_{STEPS}.png"]
    made += [run / "label" / "samples" / f"{name}_{less}.png" for name in ("samples", "of_labels", "subsets")]
    assert all(file.exists() and str(file) in said for file in made)
    assert Image.open(made[-1]).height > 6 * 64  # true, masked, and four subsets
    assert Image.open(made[-2]).width == 10 * (64 + 2) + 2

    before = {file: file.stat().st_mtime_ns for file in made}
    monkeypatch.setattr(stages, "train", no_training)
    stages.main(argv)
    assert before == {file: file.stat().st_mtime_ns for file in made}

    with pytest.raises(UserError, match=f"was trained for {STEPS} steps, more than 1"):
        stages.main(["--run", str(run), "--steps", "1"])


def test_stopped_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", stopped)
    with pytest.raises(SystemExit, match="130"):
        stages.main(["--run", str(tmp_path)])
    assert "the same command goes on" in capsys.readouterr().err


def test_training_is_followed(tmp_path, monkeypatch, capsys):
    progress, log = tmp_path / "progress.csv", tmp_path / training.LOG
    monkeypatch.setattr(training, "LOOK", 0.05)
    lines = f"printf 'step,loss\\n20,0.5\\n' > {progress}; sleep 0.2; printf '40,0.25\\n' >> {progress}"
    lines += "; echo why it failed; exit $0"
    for code in (0, 3):
        shell = ["sh", "-c", lines, str(code)]
        monkeypatch.setattr(training, "command", lambda *_, shell=shell, **__: shell)
        monkeypatch.setattr(training, "shown", " ".join)
        if code:
            with pytest.raises(UserError, match=f"exit code 3; {log}"):
                training.train("demo-digits", tmp_path, 40, 1)
        else:
            training.train("demo-digits", tmp_path, 40, 1)
    shown = capsys.readouterr().err
    assert "40/40" in shown and "loss 0.2500" in shown and "why it failed" in shown


def test_rows_that_are_being_written_are_left_out(tmp_path):
    file = tmp_path / "progress.csv"
    assert training.reached(file)[0] == 0
    file.write_text("step,loss,mse\n20,0.5,0.4\n40,0.")
    assert training.reached(file) == (20, 0.5)


def test_more_steps_than_the_preset_fall_to_0_at_their_end():
    typed = training.options("demo-digits", Path("runs/demo"), 4000)
    assert typed[typed.index("--total_steps") + 1] == typed[typed.index("--lr_anneal_steps") + 1] == "4000"
    for name in (stages.PRESET, stages.SECOND):
        preset = load_preset(name)
        assert preset["lr_anneal_steps"] == preset["total_steps"]
