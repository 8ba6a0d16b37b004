"""Top-k, calibration and Figure 6's files: known values, slow implementations, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT, complaint_of
from PIL import Image

from evaluations import classification
from evaluations.classification import classification_scores, step_of

SCRIPT = ROOT / "evaluations" / "classification.py"


def random_probabilities(seed: int, count: int = 400, classes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, 0.4), count)
    return p, rng.integers(0, classes, count)


def save(path: Path, seed: int = 0, **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    p, labels = random_probabilities(seed)
    np.savez(path, **{"probabilities": p, "labels": labels, **more})
    return path


def results(tmp_path: Path, *argv: str | Path) -> list[dict]:
    out = tmp_path / "scores.json"
    classification.main([*map(str, argv), "--json", str(out)])
    return json.loads(out.read_text())["results"]


def complaint(*argv: str | Path) -> str:
    return complaint_of(classification.main, *argv)


# ---------------------------------------------------------------- the formulas


def test_by_hand():
    """Two bins: 0.5 belongs to the lower one, so confidences (0.5, 0.4) and (0.9, 0.7, 0.8)."""
    p = [[0.5, 0.3, 0.2], [0.3, 0.4, 0.3], [0.9, 0.1, 0.0], [0.1, 0.7, 0.2], [0.2, 0.0, 0.8]]
    labels = [0, 0, 0, 1, 0]  # right, wrong, right, right, wrong
    found = classification_scores(p, labels, bins=2)
    np.testing.assert_array_equal(found.bins.count, [2, 3])
    assert found.ece == pytest.approx(2 / 5 * abs(1 / 2 - 0.45) + 3 / 5 * abs(2 / 3 - 0.8))
    assert found.top1 == pytest.approx(3 / 5) and found.top5 == 1
    assert found.nll == pytest.approx(-math.log(0.5 * 0.3 * 0.9 * 0.7 * 0.2) / 5)
    assert (found.count, found.classes) == (5, 3)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_equals_a_slow_implementation(bins):
    p, labels = random_probabilities(3)
    expected, width = 0.0, 1 / bins
    for b in range(bins):
        inside = [i for i in range(len(p)) if b * width < max(p[i]) <= (b + 1) * width]
        if inside:
            accuracy = sum(int(p[i].argmax() == labels[i]) for i in inside) / len(inside)
            confidence = sum(max(p[i]) for i in inside) / len(inside)
            expected += len(inside) / len(p) * abs(accuracy - confidence)
    found = classification_scores(p, labels, bins)
    assert found.ece == pytest.approx(expected)
    assert found.bins.count.sum() == len(p)
    nll = -sum(math.log(max(row[label], 1e-12)) for row, label in zip(p, labels, strict=True)) / len(p)
    assert found.nll == pytest.approx(nll)


def test_a_calibrated_classifier_has_a_small_error_and_an_overconfident_one_has_not():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.7), 100_000)
    labels = (p.cumsum(axis=1) < rng.random((len(p), 1))).sum(axis=1).clip(0, 4)  # drawn from p itself
    assert classification_scores(p, labels).ece < 0.006
    sharp = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert classification_scores(sharp, labels).ece > 0.1
    certain = np.eye(4)[[0, 1, 2, 3]]
    assert classification_scores(certain, [0, 1, 2, 3]).ece == 0
    assert classification_scores(certain, [1, 2, 3, 0]).ece == 1


def test_top_k_equals_sorting():
    p, labels = random_probabilities(4)
    order = np.argsort(-p, axis=1)
    found = classification_scores(p, labels)
    assert found.top1 == pytest.approx((order[:, 0] == labels).mean())
    assert found.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())


def test_of_equal_probabilities_the_lower_class_comes_first():
    p = np.full((8, 8), 1 / 8)
    found = classification_scores(p, np.arange(8))
    assert (found.top1, found.top5) == (1 / 8, 5 / 8)
    assert classification_scores([[0.2, 0.4, 0.4]] * 2, [1, 2]).top1 == 1 / 2


def test_half_precision_and_a_label_without_probability():
    p, labels = random_probabilities(5)
    assert classification_scores(p.astype(np.float16), labels).top1 == classification_scores(p, labels).top1
    found = classification_scores([[1.0, 0.0], [1.0, 0.0]], np.array([0, 1], np.uint8))
    assert found.impossible == 1 and found.nll == pytest.approx(-math.log(1e-12) / 2)


GOOD, LABELS = np.full((4, 2), 0.5), np.zeros(4, int)
REFUSED = [
    (GOOD[0], LABELS, r"probabilities \[2\] and labels \[4\]: expected \[N, K\]"),
    (GOOD, LABELS[:3], r"\[4, 2\] and labels \[3\]"),
    (GOOD, LABELS[:, None], r"labels \[4, 1\]"),
    (np.ones((4, 1)), LABELS, "K at least 2"),
    (GOOD[:0], LABELS[:0], "empty"),
    (GOOD.astype(int), LABELS, "probabilities are int64"),
    (GOOD, LABELS.astype(float), "labels float64"),
    (GOOD * np.nan, LABELS, "8 probabilities are not finite"),
    (GOOD * 0.9, LABELS, r"4 of 4 rows don't sum to 1 \(row 0: 0\.9\)"),
    (GOOD + np.array([-2, 2]), LABELS, r"-1\.5\.\.2\.5, which looks like logits: save their softmax"),
    (GOOD * 8, LABELS, "looks like logits"),
    (np.log(GOOD), LABELS, "log-probabilities: save their exp"),
    (GOOD, LABELS + 2, r"labels lie in 2\.\.2, the 2 classes in 0\.\.1"),
    (GOOD, LABELS - 1, r"labels lie in -1\.\.-1"),
]


@pytest.mark.parametrize(("p", "labels", "expected"), REFUSED)
def test_refused_arrays(tmp_path, p, labels, expected):
    path = tmp_path / "x.npz"
    np.savez(path, probabilities=p, labels=labels)
    text = complaint(path)
    assert text.startswith(f"{path}: ") and re.search(expected, text)


# ---------------------------------------------------------------- one file


def test_one_file(tmp_path, capsys):
    found = results(tmp_path, save(tmp_path / "p.npz"))
    expected = classification_scores(*random_probabilities(0))
    assert [found[0][key] for key in ("top1", "top5", "ece", "nll")] == [
        expected.top1,
        expected.top5,
        expected.ece,
        expected.nll,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Top-1 accuracy: {expected.top1:.4f}" and lines[1] == f"Top-5 accuracy: {expected.top5:.4f}"
    assert lines[2] == f"Expected calibration error: {expected.ece:.4f}"
    assert lines[-1] == "Protocol: 400 samples, 12 classes; arrays probabilities and labels; 15 bins"
    assert found[0]["step"] is None and len(found[0]["calibration"]) == 15
    assert found[0]["calibration"][0]["accuracy"] is None  # the largest of 12 probabilities is over 1/15


@pytest.mark.parametrize(
    ("first", "second"), [("probs", "label"), ("label_probabilities", "labels"), ("arr_0", "arr_1")]
)
def test_other_names_of_the_arrays(tmp_path, capsys, first, second):
    p, labels = random_probabilities(0)
    np.savez(tmp_path / "p.npz", **{first: p, second: labels})
    results(tmp_path, tmp_path / "p.npz", "--bins", "10")
    assert f"arrays {first} and {second}; 10 bins" in capsys.readouterr().out


def test_few_classes_and_impossible_labels_are_said(tmp_path, capsys):
    np.savez(tmp_path / "p.npz", probabilities=np.eye(3), labels=[0, 1, 1])
    results(tmp_path, tmp_path / "p.npz")
    text = capsys.readouterr()
    assert "top-5 is top-3, there are no more classes" in text.out
    assert "1 labels have no probability" in text.err


def test_reliability_diagram(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "new" / "diagram.png"
    results(tmp_path, save(tmp_path / "p.npz"), "--reliability", picture)
    assert_is_picture(picture)
    two = [save(tmp_path / "p1.npz"), save(tmp_path / "p2.npz")]
    assert "--reliability draws one file, not 2" in complaint(*two, "--reliability", picture)


def assert_is_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_refused_files(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros(3), labels=LABELS)
    text = complaint(path)
    assert "no probabilities (probabilities, probs, label_probabilities, arr_0); it holds images, labels" in text
    np.savez(path, probs=GOOD)
    assert "no labels (labels, label, arr_1); it holds probs" in complaint(path)
    np.savez(path, probs=np.array([[None]]), labels=LABELS)
    assert "array probs holds Python objects" in complaint(path)
    np.savez(path, probs=GOOD, labels=LABELS, step=np.array([1.5, 2]))
    assert "array step is float64 [2], expected one integer" in complaint(path)
    np.savez(path, probs=GOOD, labels=LABELS)
    assert "0 bins" in complaint(path, "--bins", 0)
    assert "no training step" in complaint(path, "--plot", tmp_path / "plot.png")
    path.write_bytes(path.read_bytes()[:200])
    assert "not a readable .npz" in complaint(path)
    path.write_bytes(b"")
    assert "not a readable .npz" in complaint(path)
    np.save(tmp_path / "one.npy", GOOD)
    assert "a single array" in complaint(tmp_path / "one.npy")
    assert "no such file" in complaint(tmp_path / "none.npz")
    assert "no such file" in complaint(f"a={tmp_path}/none*.npz")
    assert "is a folder" in complaint(tmp_path)


# ---------------------------------------------------------------- several steps


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("run/step_00001000/probs.npz", 1000),
        ("step_5/probs_step_20.npz", 20),
        ("run_3/step_7/probs9.npz", 7),
        ("run_3/probs_0400.npz", 400),
        ("run/0400/probs.npz", 400),
        ("run_3/probs.npz", None),
    ],
)
def test_step_of_a_path(path, step):
    assert step_of(Path(path)) == step


def test_steps_are_ordered_by_number_and_series_by_folder(tmp_path, capsys):
    for seed, step in enumerate([1000, 200, 30]):
        save(tmp_path / "mt" / f"probs_{step}.npz", seed)
        save(tmp_path / "single" / f"step_{step:04d}" / "probs.npz", seed + 10)
    out = tmp_path / "new" / "steps.csv"
    files = [*(tmp_path / "mt").glob("*.npz"), *(tmp_path / "single").glob("*/*.npz")]
    found = results(tmp_path, *files, "--csv", out)
    assert [(row["series"], row["step"]) for row in found] == [
        (series, step) for series in ("mt", "single") for step in (30, 200, 1000)
    ]
    assert found[0]["top1"] == classification_scores(*random_probabilities(2)).top1
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["series", "step", "top1", "top5", "ece", "nll", "count"]
    assert [float(row["ece"]) for row in rows] == [row["ece"] for row in found]
    assert re.search(r"^mt +30 +0\.\d{4} ", capsys.readouterr().out, re.MULTILINE)


def test_names_patterns_and_the_step_array(tmp_path):
    for step in (1, 2):
        save(tmp_path / "x" / f"{step}.npz", step=step * 100)
        save(tmp_path / "y" / f"{step}.npz")
    found = results(tmp_path, f"ours={tmp_path}/x/*.npz", f"{tmp_path}/y/?.npz")
    assert [(row["series"], row["step"]) for row in found] == [("ours", 100), ("ours", 200), ("y", 1), ("y", 2)]
    odd = save(tmp_path / "a=b" / "7.npz")
    assert results(tmp_path, odd, tmp_path / "y" / "1.npz")[0]["series"] == "a=b"


def test_folders_of_one_name_stay_apart(tmp_path):
    files = [save(tmp_path / run / "probs" / "5.npz") for run in ("r1", "r2")]
    found = results(tmp_path, *files)
    assert [row["series"] for row in found] == [str(tmp_path / run / "probs") for run in ("r1", "r2")]


def test_plot_against_steps(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for step in (1, 20, 300):
        save(tmp_path / "mt" / f"{step}.npz", step)
    results(tmp_path, f"mt={tmp_path}/mt/*.npz", "--plot", tmp_path / "plot.png")
    assert_is_picture(tmp_path / "plot.png")
    results(tmp_path, tmp_path / "mt" / "1.npz", "--plot", tmp_path / "one.png")
    assert_is_picture(tmp_path / "one.png")


def test_refused_steps(tmp_path):
    a, b = save(tmp_path / "r" / "probs_5.npz"), save(tmp_path / "r" / "other_5.npz")
    assert "are both step 5 of r" in complaint(a, b)
    assert "are both step 5 of x" in complaint(f"x={a}", f"x={a}")
    assert "no training step; save an array `step`" in complaint(a, save(tmp_path / "r" / "probs.npz"))


def test_as_a_program_from_another_folder(tmp_path):
    save(tmp_path / "p.npz")
    done = warm.run(SCRIPT, ["p.npz"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("Top-1 accuracy: 0.")
    done = warm.run(SCRIPT, ["none.npz"], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: none.npz: ") and done.stderr.count("\n") == 1
