"""Classification by a label head and by a separate classifier: a posterior known in closed form, and the command on tiny runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import finish_group, flags, step_folder, words

from evaluations import classification as scoring
from guided_mt.commands import classifier_train, classify, train
from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8
from guided_mt.data.subset import spread
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.errors import UserError
from guided_mt.generation.classification import classifier_probabilities, head_estimates, read_timesteps
from guided_mt.generation.noisy_classifier import build_process, load_classifier
from guided_mt.modalities import ImageModality, LabelModality
from reproduce import classify as image_classify

COUNT = 20
STEP = 3


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Models with a label head and without, trained for STEP steps, and two classifiers."""
    folder = tmp_path_factory.mktemp("runs")
    rows = {
        "U": {"mt_task": "label", "mt_variant": "U"},
        "any": {"mt_task": "masked,label", "mt_variant": "any", "mt_weights": "bridge"},
        "X": {"mt_task": "label", "mt_variant": "X"},
        "masked": {"mt_task": "masked", "mt_variant": "U"},
        "untrained": {"mt_task": "masked,label", "mt_variant": "U", "mt_loss_weight": "label=0"},
    }
    for name, row in rows.items():
        train.main(
            flags(
                log_dir=folder / name, total_steps=STEP, num_classes=10, ema_rate="0.5", lr=1e-2, data_workers=0, **row
            )
        )
    network = {"image_size": 8, "num_classes": 10, "classifier_width": 64, "classifier_depth": 1}
    network |= {"classifier_attention_resolutions": "4", "diffusion_steps": 40, "noise_schedule": "cosine"}
    data = {"data_dir": "builtin:digits", "global_batch_size": 8, "data_workers": 0, "device": "cpu", "lr": 1e-2}
    for name, noised in (("noisy", True), ("clean", False)):
        argv = words(**network, **data, log_dir=folder / name, total_steps=STEP, noised=noised)
        classifier_train.main(argv)
    return {name: folder / name for name in [*rows, "noisy", "clean"]}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """COUNT held-out digits."""
    source = open_source("builtin:digits-test")
    loaded = load_images(source, 8, COUNT)
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, arr_0=loaded.images.permute(0, 2, 3, 1).numpy(), arr_1=loaded.labels.numpy())
    return file


def classified(run: Path, out: Path, data: Path | str, flag: str = "model_path", **values) -> dict[str, np.ndarray]:
    settings = {flag: run, "data_dir": data, "out": out, "draws": 2, "timesteps": "0,4,9", "device": "cpu"}
    classify.main(words(**{**settings, **values}))
    return arrays(out)


def complaint(**values) -> str:
    with pytest.raises(UserError) as caught:
        classify.main(words(**{"device": "cpu", **values}))
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


# ---------------------------------------------------------------- a posterior known in closed form


class Oracle:
    """Constant images of brightness MEANS[k] for class k, each class's encoding a constant CODES[k] in the frame: the best head."""

    MEANS = torch.tensor([-0.6, 0.0, 0.5])
    CODES = torch.tensor([0.3, -0.2, 0.4])

    def __init__(self):
        self.diffusion = create_gaussian_diffusion(
            steps=100, noise_schedule="cosine", mt_weights={"label": "bridge", "other": "paper"}
        )
        self.label = LabelModality(3)
        self.label.encoder = lambda p: (p @ self.CODES).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        self.other = ImageModality("other")
        self.seen: list[torch.Tensor] = []

    def log_p(self, z: torch.Tensor, t: int) -> torch.Tensor:
        """log p(z_t, k) [B, 3] up to a constant, the other modality taken as zero."""
        abar = self.diffusion.alphas_cumprod[t]
        mean = abar**0.5 * self.MEANS + self.diffusion.aggregation.coefficients["label"][t] * self.CODES
        return -((z[:, None] - mean.view(1, 3, 1, 1, 1)) ** 2).sum(dim=(2, 3, 4)) / (2 * (1 - abar))

    def __call__(self, z, t, modalities):
        assert not modalities
        self.seen.append(z)
        return ModelOutput(z, {"label": self.log_p(z, int(t[0])), "other": z - z})


def test_head_estimates_are_the_posteriors_mean_and_the_estimate_stands_in_the_next_frame():
    oracle, labels = Oracle(), torch.tensor([0, 1, 2, 2])
    x_start = oracle.MEANS[labels].view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    modalities = {"label": oracle.label, "other": oracle.other}
    streams = SampleStreams(5, torch.arange(4))
    found = head_estimates(oracle, oracle.diffusion, modalities, x_start, [10, 90], 2, streams)

    again = SampleStreams(5, torch.arange(4))
    estimate, total = oracle.label.prior((3, 4, 4), again), 0
    for i, step in enumerate((90, 10)):  # Algorithm 1 goes down
        t = torch.full((4,), step)
        frame = oracle.diffusion.aggregation.shift({"label": oracle.label.encode(estimate)}, t)
        draws = [oracle.diffusion.q_sample(x_start, t, again.normal(3, 4, 4)) + frame for _ in range(2)]
        for k, z in enumerate(draws):
            torch.testing.assert_close(oracle.seen[2 * i + k], z)
        estimate = torch.stack([oracle.log_p(z, step).softmax(1) for z in draws]).mean(0)
        total = total + estimate / 2
    torch.testing.assert_close(found, total)
    sure = head_estimates(oracle, oracle.diffusion, modalities, x_start, [0, 1], 1, streams)
    assert (sure.argmax(1) == labels).all() and sure.max(1).values.min() > 0.99


def test_timesteps():
    assert read_timesteps("", 1000) == [120, 80, 40, 0]
    assert read_timesteps("", 10) == [1, 0] and read_timesteps("3, 9,3", 10) == [9, 3]
    for text in ("10", "-1", "1,x", "1,,2", "0.5"):
        with pytest.raises(UserError, match=r"--timesteps .* is no timestep of this network; write some of 0 to 9"):
            read_timesteps(text, 10)


def test_images_are_spread_over_the_data():
    source = open_source("builtin:digits-test")
    assert spread(source, 3).numbers.tolist() == [0, 120, 240] and len(spread(source, 10**6)) == len(source)
    part = spread(source, 7)
    assert part.labels.tolist() == source.labels[part.numbers].tolist()
    np.testing.assert_array_equal(load_images(part, 8).images[2], load_images(source, 8).images[part.numbers[2]])


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["U", "any"])
def test_an_image_is_classified_alike_in_every_batch_and_choice(name, runs, digits, tmp_path):
    whole = classified(runs[name], tmp_path / "whole.npz", digits)
    assert whole["probabilities"].dtype == np.float32 and whole["probabilities"].shape == (COUNT, 10)
    assert whole["labels"].dtype == np.int64 and int(whole["step"]) == STEP and len(whole["classes"]) == 10
    np.testing.assert_allclose(whole["probabilities"].sum(1), 1, rtol=1e-5)
    for size in (3, 17):
        few = classified(runs[name], tmp_path / "few.npz", digits, batch_size=size)
        np.testing.assert_array_equal(few["probabilities"], whole["probabilities"])
    half = classified(runs[name], tmp_path / "half.npz", digits, num_samples=COUNT // 2)
    np.testing.assert_array_equal(half["probabilities"], whole["probabilities"][::2])
    np.testing.assert_array_equal(half["labels"], whole["labels"][::2])
    other = classified(runs[name], tmp_path / "other.npz", digits, seed=1)
    assert (other["probabilities"] != whole["probabilities"]).any()


def test_two_processes_write_the_same_file_and_score_it(runs, digits, tmp_path):
    values = {"draws": 2, "timesteps": "0,4,9", "batch_size": 7, "device": "cpu"}
    one = classified(runs["any"], tmp_path / "one.npz", digits, **values)
    out = tmp_path / "two.npz"
    argv = words(model_path=runs["any"], data_dir=digits, out=out, **values)
    printed = finish_group("image_classify.py", argv)
    two = arrays(out)
    assert one.keys() == two.keys()
    np.testing.assert_allclose(two["probabilities"], one["probabilities"], atol=1e-6)
    scores = scoring.score_file("x", out).scores
    assert printed.count("Top-1 accuracy") == 1 and f"Top-1 accuracy: {scores.top1:.4f}" in printed
    for name in ("confusion", "reliability"):
        with Image.open(tmp_path / f"two_{name}.png") as picture:
            assert min(picture.size) > 200


def test_the_file_is_what_the_evaluation_reads(runs, tmp_path, capsys):
    """Without --out it is named after the step, so that the files of a run's checkpoints make a curve."""
    values = {"data_dir": "builtin:digits-test", "num_samples": 16, "draws": 1, "timesteps": "0", "device": "cpu"}
    image_classify.main(words(model_path=step_folder(runs["U"], STEP), ema="none", **values))
    file = runs["U"] / "samples" / f"classified_{STEP:08d}.npz"
    assert "Expected calibration error" in capsys.readouterr().out
    table = tmp_path / "scores.csv"
    scoring.main(
        [str(file), "--csv", str(table), "--plot", str(tmp_path / "plot.png"), "--confusion", str(tmp_path / "c.png")]
    )
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert row["step"] == str(STEP) and row["count"] == "16" and (tmp_path / "c.png").exists()


def test_data_without_classes_and_with_others(runs, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(pictures / f"{i}.png")
    found = classified(runs["U"], tmp_path / "bare.npz", pictures)
    assert found.keys() == {"probabilities", "classes", "step"} and len(found["probabilities"]) == 3
    image_classify.main(words(model_path=runs["U"], data_dir=pictures, out=tmp_path / "s.npz", draws=1))
    assert "Top-1" not in capsys.readouterr().out and not (tmp_path / "s_confusion.png").exists()

    for i in range(3):
        (pictures / f"{i}.png").rename(pictures / f"cat_{i}.png")
    text = complaint(model_path=runs["U"], data_dir=pictures, out=tmp_path / "o.npz")
    assert "class 'cat' is not one of the 10 saved classes" in text and "--labelled False" in text
    same = classified(runs["U"], tmp_path / "same.npz", pictures, labelled=False)
    np.testing.assert_array_equal(same["probabilities"], found["probabilities"])
    np.savez(tmp_path / "ids.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([0, 10]))
    text = complaint(model_path=runs["U"], data_dir=tmp_path / "ids.npz", out=tmp_path / "o.npz")
    assert "class id 10 in arr_1" in text and "--labelled False" in text
    text = complaint(model_path=runs["U"], data_dir=tmp_path / "all saved classes", out=tmp_path / "o.npz")
    assert "--labelled" not in text


def test_a_diverged_model_is_one_line(runs, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        classify, "head_estimates", lambda network, process, modalities, x, *_: torch.full((len(x), 10), torch.nan)
    )
    with pytest.raises(UserError, match=r"o.npz: 200 probabilities are not finite"):
        image_classify.main(words(model_path=runs["U"], data_dir=digits, out=tmp_path / "o.npz", device="cpu"))


def test_separate_classifiers(runs, digits, tmp_path):
    """By noised images, and by clean ones where it was trained on these."""
    x_start = from_uint8(load_images(open_source(digits), 8).images)
    network = load_classifier(str(runs["noisy"]))
    streams = SampleStreams(0, torch.arange(COUNT))
    expected = classifier_probabilities(
        network.model, build_process(network.config), x_start, [9, 4, 0], 2, streams=streams
    )
    found = classified(runs["noisy"], tmp_path / "noisy.npz", digits, flag="classifier_path")
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)
    clean = classified(runs["clean"], tmp_path / "clean.npz", digits, flag="classifier_path", timesteps="")
    logits = load_classifier(str(runs["clean"])).model(x_start, torch.zeros(COUNT, dtype=torch.long))
    np.testing.assert_allclose(clean["probabilities"], logits.softmax(1), atol=1e-6)
    assert "was trained on clean images" in complaint(classifier_path=runs["clean"], data_dir=digits, timesteps="0,5")


def test_dry_run_and_help(runs, tmp_path, capsys):
    for flag, name in (("model_path", "U"), ("classifier_path", "noisy")):
        classify.main(words(**{flag: runs[name]}, out=tmp_path / "no.npz", dry_run=True))
        printed = capsys.readouterr().out
        assert "draws: 4" in printed and "# timesteps 4, 3, 1, 0, 4 draws each" in printed
    with pytest.raises(SystemExit):
        classify.main(["--help"])
    assert "--timesteps" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


BAD = [
    ({"model_path": "X"}, r"form X is told the label, so it can't classify; train with --mt_variant U or any"),
    ({"model_path": "masked"}, r"was trained with --mt_task masked, so it has no label head; train with label"),
    ({"model_path": "untrained"}, r"was trained with --mt_loss_weight label=0, so its label head learned nothing"),
    ({"model_path": "noisy"}, r"holds a classifier; classifier-sample and classify take it as --classifier_path"),
    ({"model_path": "U", "classifier_path": "noisy"}, r"--model_path and --classifier_path are both given"),
    ({"classifier_path": "U"}, r"without a classifier inside"),
    ({}, r"--model_path is missing"),
    ({"model_path": "U", "data_dir": ""}, r"--data_dir is missing"),
    ({"model_path": "U", "timesteps": "40"}, r"--timesteps 40: '40' is no timestep .* 0 to 39"),
    ({"model_path": "U", "draws": 0}, r"--draws must be at least 1"),
    ({"model_path": "U", "drawz": 2}, r"unknown flag --drawz \(did you mean draws\?\)"),
    ({"model_path": "U", "num_classes": 20}, r"was trained with other settings: num_classes"),
    ({"model_path": "U", "out": "x.txt"}, r"--out .*must end in .npz"),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=[json.dumps(row[0]) for row in BAD])
def test_bad_input(values, expected, runs, tmp_path):
    paths = {key: runs[value] for key, value in values.items() if key.endswith("_path")}
    settings = {"data_dir": "builtin:digits-test", "out": tmp_path / "o.npz", **values, **paths}
    assert re.search(expected, complaint(**settings))


def test_more_classes_than_the_network_has(tmp_path, runs):
    """A foreign file has no class names: the ids of the data are its own."""
    file = tmp_path / "classifier.pt"
    torch.save(load_file(str(step_folder(runs["noisy"], STEP) / "model.safetensors")), file)
    data = tmp_path / "data.npz"
    np.savez(data, arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([0, 10]))
    network = {"image_size": 8, "classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "4"}
    network |= {"diffusion_steps": 40, "noise_schedule": "cosine"}
    text = complaint(classifier_path=file, data_dir=data, out=tmp_path / "o.npz", **network)
    assert "has 11 classes, the network 10; --labelled False" in text
    found = classified(file, tmp_path / "o.npz", data, flag="classifier_path", labelled=False, **network)
    assert found.keys() == {"probabilities"}
