"""Figure 6 end to end on tiny runs: what is trained, what is equal in both series, resuming, and what is refused."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_classify import arrays
from tiny import contents, flags, step_folder, words

from evaluations.errors import EvaluationError
from evaluations.tables.curves import Curve, common_curve, describe, first_at_least
from guided_mt.commands import classifier_train, train
from guided_mt.errors import UserError
from reproduce import figure6

POINT = {
    "val_images": 12,
    "val_draws": 2,
    "eval_interval": 2,
    "global_batch_size": 8,
    "data_workers": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> Path:
    """A model with head E."""
    run = tmp_path_factory.mktemp("joint") / "E"
    head = {
        "mt_label_head": "E",
        "classifier_width": 64,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "4",
    }
    task = {"mt_task": "label", "mt_variant": "U", "num_classes": 10, **head}
    train.main(flags(log_dir=run, total_steps=2, ema_rate="0.5", **task))
    return run


def argv(run: Path, out: Path, **values) -> list[str]:
    data = {"data_dir": "builtin:digits", "val_data_dir": "builtin:digits-test"}
    return words(**{"joint": run, "out": out, **data, **POINT, "iterations": 2, "seeds": "0", **values})


@pytest.fixture
def in_process(monkeypatch) -> list[list[str]]:
    """classifier-train without a process of its own; the commands that were run."""
    ran: list[list[str]] = []

    def run(line):
        ran.append(list(line))
        classifier_train.main(line[4:])  # python -m mt_diffusion classifier-train
        return 0

    monkeypatch.setattr(figure6, "run_child", run)
    return ran


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "figure6.csv").read_text().splitlines()))


def test_end_to_end_then_more_steps_and_another_seed(joint, tmp_path, request, capsys):
    out = tmp_path / "f6"
    figure6.main(argv(joint, out, lr=1e-3))
    printed = capsys.readouterr().out
    assert "from scratch: " in printed and str(out / "figure6.png") in printed
    assert [(row["series"], int(row["step"])) for row in rows(out)] == [
        (f"{name}/seed_0", step) for name in ("finetuned", "scratch") for step in (0, 2)
    ]
    assert all(int(row["count"]) == 24 for row in rows(out))
    with Image.open(out / "figure6.png") as picture:
        assert min(picture.size) > 300

    # The same data, noise and network in both, from other weights.
    tuned, scratch = (arrays(out / name / "seed_0" / "held_out" / "step_00000000.npz") for name in figure6.SERIES)
    np.testing.assert_array_equal(tuned["labels"], scratch["labels"])
    assert (tuned["probabilities"] != scratch["probabilities"]).any()
    shapes = [
        {
            key: value.shape
            for key, value in contents(step_folder(out / name / "seed_0", 2))["model.safetensors"].items()
        }
        for name in figure6.SERIES
    ]
    assert shapes[0] == shapes[1]

    before, ran = rows(out), request.getfixturevalue("in_process")
    figure6.main(argv(joint, out, lr=1e-3, iterations=4, seeds="0,1"))
    assert len(ran) == 4 and "over 2 seeds" in capsys.readouterr().out
    again = {(row["series"], row["step"]): row for row in rows(out)}
    assert len(again) == 12 and all(again[row["series"], row["step"]] == row for row in before)

    text = complaint(argv(joint, out, lr=1e-2))
    assert "seed_0: was trained with other settings: lr (0.001 there, 0.01 here); take another --out" in text
    assert len(ran) == 4


def test_a_failed_training_ends_it(joint, tmp_path, monkeypatch):
    monkeypatch.setattr(figure6, "run_child", lambda line: 7)
    with pytest.raises(SystemExit) as stopped:
        figure6.main(argv(joint, tmp_path / "f6"))
    assert stopped.value.code == 7


def test_dry_run_prints_the_commands(joint, tmp_path, capsys):
    figure6.main(argv(joint, tmp_path / "f6", dry_run=True, lr=1e-3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(lines) == 2 and all("--lr 0.001" in line and "--classifier_width 64" in line for line in lines)
    assert ["--resume_checkpoint" in line for line in lines] == [True, False]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        figure6.main(["--help"])
    assert "--joint" in capsys.readouterr().out


def complaint(words_typed: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        figure6.main(words_typed)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


BAD = [
    ({"joint": ""}, r"--joint is missing: the jointly trained model"),
    ({"joint": "nowhere"}, r"nowhere: no such file or folder"),
    ({"data_dir": ""}, r"--data_dir is missing"),
    ({"val_data_dir": "nowhere"}, r"nowhere: no such file or folder"),
    ({"seeds": "0,x"}, r"--seeds 0,x: write different whole numbers"),
    ({"seeds": "1,1"}, r"--seeds 1,1: write different whole numbers"),
    ({"save_interval": 5}, r"--save_interval is set by figure6"),
    ({"itrations": 5}, r"unknown flag --itrations \(did you mean iterations\?\)"),
    ({"iterations": 0}, r"--iterations must be at least 1"),
    ({"lr": "fast"}, r"--lr takes a number, not 'fast'"),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=[str(row[0]) for row in BAD])
def test_bad_input(values, expected, joint, tmp_path):
    assert re.search(expected, complaint(argv(joint, tmp_path / "f6", **values)))


def test_held_out_images_need_classes_of_the_model(joint, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pictures / "1.png")
    assert "has no classes" in complaint(argv(joint, tmp_path / "f6", val_data_dir=pictures))
    (pictures / "1.png").rename(pictures / "cat_1.png")
    assert "class 'cat' is not one of the 10 saved" in complaint(argv(joint, tmp_path / "f6", val_data_dir=pictures))


def test_curves():
    curve = common_curve([{0: 0.1, 5: 0.5, 10: 0.9}, {0: 0.3, 10: 0.7}])
    assert curve.steps == [0, 10]
    np.testing.assert_allclose(curve.mean, [0.2, 0.8])
    assert first_at_least(curve, 0.5) == 10 and first_at_least(curve, 0.85) is None
    assert describe("x", curve) == "x: 0.2000 at step 0, 0.8000 (0.7000 to 0.9000 over 2 seeds) at step 10"
    assert describe("x", Curve([1], np.array([[0.5]]))) == "x: 0.5000 at step 1, 0.5000 at step 1"
    with pytest.raises(EvaluationError, match="no training step in common"):
        common_curve([{1: 0.0}, {2: 0.0}])
