"""Weights with NaN, and networks that become NaN while they draw: one line, and no black pictures."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PROCESS, TRAINING, flags, step_folder, words

from guided_mt.commands import classifier_sample, classifier_train, classify, export, nll, restore, sample, train
from guided_mt.errors import UserError
from guided_mt.generation import drawing
from guided_mt.networks.model import ModelOutput, MTUNet

LABELS = {"mt_task": "masked,label", "mt_variant": "any", "mt_drop_prob": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("not_finite") / "run"
    train.main(flags(log_dir=folder, total_steps=1, ema_rate="0.9", **LABELS))
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def spoil(file, name="time_embed.0.weight"):
    state = load_file(file)
    state[name].view(-1)[0] = float("nan")
    save_file(state, file)


def complaint(main, argv) -> str:
    with pytest.raises(UserError) as caught:
        main(argv)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def commands(run):
    drawn = {"device": "cpu", "num_samples": 2, "model_path": run}
    digits = {**drawn, "data_dir": "builtin:digits-test"}
    return {
        "sample": (sample.main, words(**drawn, steps=2)),
        "restore": (restore.main, words(**digits, steps=2)),
        "repaint": (
            restore.main,
            words(**digits, steps=2, method="repaint", timestep_respacing=4, repaint_resamples=1),
        ),
        "classify": (classify.main, words(**digits, draws=1)),
        "nll": (nll.main, words(**digits, timestep_respacing=2)),
    }


@pytest.mark.parametrize("name", ["sample", "restore", "classify", "nll"])
def test_weights_with_nan_are_refused_by_name(name, copied):
    spoil(step_folder(copied, 1) / "ema_0.9.safetensors")
    main, argv = commands(copied)[name]
    text = complaint(main, argv)
    assert "ema_0.9.safetensors: 1 of " in text and "hold NaN or infinity ('time_embed.0.weight')" in text
    assert not (copied / "samples").exists() or not list((copied / "samples").glob("*.npz"))


def test_only_the_weights_that_are_used_count(copied, tmp_path):
    """The averages may be bad where the weights themselves are asked for, and the other way round."""
    main, argv = commands(copied)["sample"]
    spoil(step_folder(copied, 1) / "ema_0.9.safetensors")
    main([*argv, "--ema", "none", "--out", str(tmp_path / "a.npz")])
    assert (tmp_path / "a.npz").exists()
    assert "1 of " in complaint(export.main, words(model_path=copied, out=tmp_path / "x.pt"))
    export.main(words(model_path=copied, ema="none", out=tmp_path / "x.pt"))


@pytest.mark.parametrize("what", ["model", "ema_0.9", "optimiser"])
def test_a_run_does_not_go_on_from_nan(what, copied):
    folder = step_folder(copied, 1)
    if what == "optimiser":
        state = torch.load(folder / "training_state.pt", weights_only=True)
        state["optimizer"]["adamw"]["state"][3]["exp_avg"].view(-1)[0] = float("inf")
        torch.save(state, folder / "training_state.pt")
        expected = "1 of the optimiser's moments hold NaN or infinity (first 3.exp_avg)"
    else:
        spoil(folder / f"{what}.safetensors")
        expected = "hold NaN or infinity"
    text = complaint(train.main, flags(log_dir=copied, total_steps=2, ema_rate="0.9", **LABELS))
    assert expected in text and str(folder) in text


@pytest.mark.parametrize("name", ["sample", "restore", "repaint", "classify", "nll"])
def test_what_becomes_nan_on_the_way_is_not_written(name, run, tmp_path, monkeypatch):
    """Finite weights that overflow."""
    real = MTUNet.forward

    def overflows(self, *arguments, **options):
        seen = real(self, *arguments, **options)
        return ModelOutput(seen.output * float("inf"), {n: x * float("nan") for n, x in seen.predictions.items()})

    monkeypatch.setattr(MTUNet, "forward", overflows)
    main, argv = commands(run)[name]
    assert "NaN or infinite" in complaint(main, [*argv, "--out", str(tmp_path / "x.npz")])
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob("*.png"))


def test_a_classifier_with_nan(run, tmp_path):
    size = {"image_size": 8, "classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "8"}
    settings = {**size, **PROCESS, **TRAINING, "total_steps": 1, "log_dir": tmp_path / "c"}
    classifier_train.main(words(**settings))
    spoil(step_folder(tmp_path / "c", 1) / "model.safetensors")
    drawn = {"model_path": run, "classifier_path": tmp_path / "c", "num_samples": 1, "steps": 2, "device": "cpu"}
    text = complaint(classifier_sample.main, words(**drawn))
    assert "model.safetensors: 1 of" in text and str(tmp_path / "c") in text


def test_only_what_can_be_infinite_is_looked_at():
    drawing.refuse_not_finite("x", torch.tensor([1, 2]), torch.zeros(0), torch.zeros(2))
    with pytest.raises(drawing.NotFinite, match="x became NaN"):
        drawing.refuse_not_finite("x", torch.zeros(1), torch.tensor([float("-inf")]))
