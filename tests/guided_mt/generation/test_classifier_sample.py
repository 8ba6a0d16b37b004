"""Classifier guidance with a separate network: the gradient, what it does to samples, and scripts/classifier_sample.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_classifier_training import NETWORK, NOISE, mt_run, tiny_classifier
from test_classifier_training import flags as classifier_flags
from tiny import MODEL, PROCESS, adm_unet, flags, start, wait_for, words

from guided_mt.commands import classifier_sample, classifier_train, train
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.sampling.guidance import classifier_guidance
from guided_mt.errors import UserError

COUNT = 5
TYPED = {key: value for key, value in NETWORK.items() if key.startswith("classifier_")}

# ---------------------------------------------------------------- the gradient


def test_gradient_is_that_of_log_p_by_finite_differences():
    torch.manual_seed(0)
    first, second = torch.randn(12, 7).double(), torch.randn(7, 4).double()

    def classifier(y_t, t):
        return torch.tanh(y_t.flatten(1) @ first * 0.3 + 0.01 * t[:, None]) @ second

    y_t, t, labels = torch.randn(3, 3, 2, 2).double(), torch.tensor([0, 10, 900]), torch.tensor([2, 0, 3])
    with torch.no_grad():  # as in a sampler
        gradient = classifier_guidance(classifier, labels, 2.5)(y_t, t)
    assert gradient.shape == y_t.shape and not gradient.requires_grad
    step = 1e-6
    for k in range(y_t[0].numel()):
        moved = torch.zeros(12).double()
        moved[k] = step
        moved = moved.view(1, 3, 2, 2)
        up, down = (torch.log_softmax(classifier(y_t + s * moved, t), 1)[range(3), labels] for s in (1, -1))
        torch.testing.assert_close(gradient.flatten(1)[:, k], 2.5 * (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_gradient_through_the_network_is_each_samples_own():
    model = tiny_classifier().eval().requires_grad_(False)
    y_t, t, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 5, 20, 39]), torch.tensor([1, 1, 7, 9])
    whole = classifier_guidance(model, labels)(y_t, t)
    assert (whole.flatten(1).norm(dim=1) > 0).all()
    for k in range(4):
        alone = classifier_guidance(model, labels[k : k + 1])(y_t[k : k + 1], t[k : k + 1])
        torch.testing.assert_close(alone[0], whole[k], rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- what it does


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_log_linear_classifier_moves_the_mean_exactly(sampler):
    """z_0 ~ N(0, s^2) and p(class 0 | z_0) ~ exp(b z_0): then z_0 | class 0 ~ N(s^2 b, s^2), and class 1 stays near 0.

    The classifier is asked on a respaced process, so it must be told the original timesteps.
    """
    variance, tilt, many = 0.25, 2.0, 3000
    full = create_gaussian_diffusion(steps=1000, noise_schedule="cosine", sigma_small=True)
    abar = torch.from_numpy(full.alphas_cumprod).float()

    def expected_x(y_t, t):
        a = abar[t].view(-1, 1, 1, 1)
        return variance * a.sqrt() / (a * variance + 1 - a) * y_t

    def network(y_t, t):
        a = abar[t].view(-1, 1, 1, 1)
        return (y_t - a.sqrt() * expected_x(y_t, t)) / (1 - a).sqrt()

    def classifier(y_t, t):  # class 1 is nearly certain, so that log p of class 0 is its own logit
        logit = tilt * expected_x(y_t, t).flatten(1).sum(1)
        return torch.stack([logit, torch.full_like(logit, 60.0)], dim=1)

    steps = "500" if sampler == "ddpm" else "100"  # algorithm 1 is of first order in the step
    process = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, timestep_respacing=steps)
    labels = torch.arange(many) % 2
    drawn = sample(
        network,
        process,
        {},
        (many, 1, 2, 2),
        sampler=sampler,
        seeds=range(many),
        clip_denoised=False,
        cond_fn=classifier_guidance(classifier, labels),
    ).x_start
    asked, other = drawn[labels == 0], drawn[labels == 1]
    assert float(asked.mean()) == pytest.approx(variance * tilt, abs=0.03)
    assert float(asked.std()) == pytest.approx(variance**0.5, abs=0.03)
    assert abs(float(other.mean())) < 0.03


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A few steps each: a plain and a class-conditional diffusion model, form U, a classifier; and classifiers made by hand."""
    folder = tmp_path_factory.mktemp("guided")
    kinds = {
        "plain": {"mt_task": "none"},
        "classes": {"mt_task": "none", "class_cond": True, "num_classes": 10},
        "U": {"mt_variant": "U"},
    }
    for name, values in kinds.items():
        train.main(flags(log_dir=folder / name, total_steps=2, lr=1e-2, ema_rate="0.5", **values))
    classifier_train.main(classifier_flags(log_dir=folder / "classifier", iterations=3, lr=1e-3))
    mt_run(folder / "E head", tiny_classifier(), classifier_pool="attention")
    torch.save(tiny_classifier().state_dict(), folder / "adm classifier.pt")
    torch.save(adm_unet().state_dict(), folder / "adm model.pt")
    return {path.stem if path.suffix else path.name: path for path in folder.iterdir()}


def draw(runs: dict[str, Path], out: Path, *more: str, **values) -> dict[str, np.ndarray]:
    settings = {"model_path": runs["plain"], "classifier_path": runs["classifier"], "num_samples": COUNT, "steps": 4}
    classifier_sample.main([*words(**{**settings, "out": out, "device": "cpu", **values}), *more])
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("model", ["plain", "classes"])
def test_samples_are_as_adm_writes_them(model, runs, tmp_path):
    out = tmp_path / "s.npz"
    found = draw(runs, out, model_path=runs[model])
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (COUNT, 8, 8, 3)
    assert found["arr_1"].shape == (COUNT,) and found["arr_1"].dtype == np.int64 and len(set(found["arr_1"])) > 1
    assert found["arr_1"].min() >= 0 and found["arr_1"].max() < 10
    with Image.open(out.with_suffix(".png")) as grid:
        assert grid.mode == "RGB"
    few = draw(runs, tmp_path / "few.npz", model_path=runs[model], batch_size=2, seeds="3,1", num_samples=2)
    np.testing.assert_array_equal(few["arr_1"], found["arr_1"][[3, 1]])
    np.testing.assert_array_equal(few["arr_0"], found["arr_0"][[3, 1]])


def test_the_class_and_the_scale_matter(runs, tmp_path):
    """Scale 0 is no guidance; every classifier, class and sampler then gives the same images of the model itself."""
    scales = [draw(runs, tmp_path / f"{s}.npz", "--class", "3", classifier_scale=s)["arr_0"] for s in (0, 1, 200)]
    other = draw(runs, tmp_path / "other.npz", "--class=7", classifier_scale=200)
    assert (other["arr_1"] == 7).all()
    assert (scales[0] != scales[2]).any() and (scales[2] != other["arr_0"]).any()
    none = draw(runs, tmp_path / "none.npz", "--class=7", classifier_scale=0)
    np.testing.assert_array_equal(none["arr_0"], scales[0])
    ancestral = draw(runs, tmp_path / "ddpm.npz", classifier_scale=200, sampler="ddpm")
    with pytest.raises(UserError, match=r"--class dog: no such class; this model has 10 classes"):
        draw(runs, tmp_path / "no.npz", "--class", "dog")
    assert ancestral["arr_0"].shape == (COUNT, 8, 8, 3) and not (tmp_path / "no.npz.parts").exists()


def test_the_three_kinds_of_classifier_files(runs, tmp_path, capsys):
    """An ADM .pt with its flags, and the E head of an MT run, hold the same weights here: the same images."""
    values = {"classifier_scale": 100}
    by_run = draw(runs, tmp_path / "run.npz", classifier_path=runs["E head"], class_name="4", **values)
    assert by_run["arr_1"].tolist() == [5] * COUNT  # a name goes before an id, and this run's are 9, 8, ... 0
    assert "classifier_width 64" in capsys.readouterr().out
    file = {"classifier_path": runs["adm classifier"], **TYPED}
    by_file = draw(runs, tmp_path / "file.npz", **file, class_name="5", **values)
    np.testing.assert_array_equal(by_file["arr_0"], by_run["arr_0"])
    adm = {"model_path": runs["adm model"], **file, **MODEL, **PROCESS, "use_ddim": True, "timestep_respacing": "ddim4"}
    found = draw(runs, tmp_path / "adm.npz", **adm, num_classes=10)  # guided-diffusion's command line on its files
    assert found["arr_0"].std() > 10 and found["arr_1"].max() < 10


def test_killed_sampling_goes_on_where_it_was(runs, tmp_path):
    values = {"model_path": runs["plain"], "classifier_path": runs["classifier"], "num_samples": 4, "steps": 30}
    out = tmp_path / "killed.npz"
    argv = words(**values, batch_size=1, sampler="ddpm", out=out, device="cpu")
    process = start("classifier_sample.py", argv)
    wait_for(lambda: (tmp_path / "killed.npz.parts" / "00000000.npz").exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(UserError, match=r"other settings.*classifier_scale was 1.0"):
        classifier_sample.main([*argv, "--classifier_scale", "2"])
    classifier_sample.main(argv)
    whole = draw(runs, tmp_path / "whole.npz", **values, batch_size=16, sampler="ddpm")
    with np.load(out) as file:
        np.testing.assert_array_equal(file["arr_0"], whole["arr_0"])


def test_dry_run(runs, tmp_path, capsys):
    argv = words(model_path=runs["plain"], classifier_path=runs["classifier"], out=tmp_path / "s.npz", dry_run=True)
    classifier_sample.main(argv)
    printed = capsys.readouterr().out
    assert "classifier_scale: 1.0" in printed and "10 classes, classifier_width 64" in printed
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"classifier_path": ""}, r"--classifier_path is missing"),
        ({"classifier_path": "gone"}, r"gone: no such file"),
        ({"classifier_path": "plain"}, r"a diffusion model without a classifier inside"),
        ({"classifier_path": "adm classifier"}, r"another classifier: .*compare the classifier flags"),
        ({"classifier_width": 128}, r"another classifier: .*compare classifier_width \(64 there, 128 here\)"),
        ({"classifier_widht": 128}, r"unknown flag --classifier_widht \(did you mean classifier_width"),
        ({"classifier_pool": "mean"}, r"--classifier_pool: 'mean' is none of"),
        ({"classifier_scale": -1}, r"--classifier_scale must be at least 0"),
        ({"classifier_ema": "0.5"}, r"has no averaged weights '0.5'"),
        ({"model_path": "U"}, r"never saw plain noisy images"),
        ({"model_path": "classes", "classifier_path": "E head"}, r"its class 0 is '9', that of .*classes.* '0'; take"),
        (
            {"num_classes": 12, "model_path": "adm model", **MODEL, **PROCESS},
            r"has 10 classes, and --num_classes is 12",
        ),
        ({"class_name": "10"}, r"--class 10: no such class; this model has 10 classes"),
    ],
    ids=str,
)
def test_bad_input(change, expected, runs, tmp_path):
    values = {key: runs.get(value, value) if key.endswith("_path") else value for key, value in change.items()}
    with pytest.raises(UserError, match=expected) as caught:
        draw(runs, tmp_path / "s.npz", **values)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_size": 16}, r"classifies images of size 16, and --model_path .*plain.* draws size 8"),
        ({"num_classes": 12}, r"has 12 classes, and .*classes.* has 10"),
        ({"diffusion_steps": 50}, r"another noise than the diffusion model: diffusion_steps \(50 there, 40 here\)"),
        ({"rescale_timesteps": True}, r"rescale_timesteps \(True there, False here\)"),
    ],
    ids=str,
)
def test_classifiers_of_other_things(change, expected, runs, tmp_path):
    settings = {**NETWORK, **NOISE, **change}
    shape = {key: value for key, value in settings.items() if key in ("image_size", "num_classes")}
    path = mt_run(tmp_path / "mt", tiny_classifier(**shape), **settings)
    model = runs["classes" if "num_classes" in change else "plain"]
    with pytest.raises(UserError, match=expected):
        draw(runs, tmp_path / "s.npz", model_path=model, classifier_path=path)
