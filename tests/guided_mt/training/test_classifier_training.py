"""Training the noisy classifier, through scripts/classifier_train.py: resuming, processes, learning, where it starts from."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_unet import fill, golden
from tiny import (
    TRAINING,
    adm_unet,
    assert_same,
    column,
    contents,
    finish_group,
    progress,
    start,
    step_folder,
    wait_for,
    words,
)

from guided_mt.commands.classifier_train import main, resolve
from guided_mt.data import ImageStream
from guided_mt.errors import UserError
from guided_mt.generation.noisy_classifier import load_classifier
from guided_mt.networks.classifier import create_classifier
from guided_mt.runs import checkpoint
from guided_mt.training import classifier_loop, loop

NETWORK = {
    "image_size": 8,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "4",
    "num_classes": 10,
}
NOISE = {"diffusion_steps": 40, "noise_schedule": "cosine"}
# Everything that has a state. An interval of the log, with a validation batch in it, is unfinished when step 2 is saved.
STATEFUL = {
    "val_data_dir": "builtin:digits-test",
    "eval_interval": 2,
    "log_interval": 3,
    "schedule_sampler": "loss-second-moment",
    "anneal_lr": True,
    "ema_rate": "0.9",
    "iterations": 4,
    "save_interval": 2,
}


def flags(**values) -> list[str]:
    return words(**{**NETWORK, **NOISE, **TRAINING, **values})


def few_steps(run: Path, steps: int = 2, **values) -> Path:
    main(flags(log_dir=run, iterations=steps, **values))
    return run


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return contents(step_folder(run, step))["model.safetensors"]


def tiny_classifier(seed: int = 1, **values) -> torch.nn.Module:
    settings = {key: value for key, value in NETWORK.items() if key.startswith("classifier_")}
    shape = {
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }
    options = {"image_size": 8, "num_classes": 10, "classifier_use_fp16": False, **shape, **settings, **values}
    return fill(create_classifier(**options), seed)


def mt_run(folder: Path, classifier: torch.nn.Module | None, **config) -> Path:
    """A checkpoint as a run with `--mt_label_head` writes it: the classifier, if any, among a diffusion model's weights."""
    place = step_folder(folder, 7)
    place.mkdir(parents=True)
    state = {
        f"heads.label.classifier.{key}": value for key, value in (classifier.state_dict() if classifier else {}).items()
    }
    save_file({**adm_unet().state_dict(), **state}, str(place / "model.safetensors"))
    saved = {**NETWORK, **NOISE, "mt_task": "label", "num_channels": 32, "lr": 0.5, "data_dir": "nowhere", **config}
    (place / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in saved.items()))
    (place / "classes.json").write_text(json.dumps([str(digit) for digit in reversed(range(10))]))
    return folder


# ---------------------------------------------------------------- crops


def test_training_crops_at_random_and_validation_in_the_centre(tmp_path, monkeypatch):
    """As in ADM's classifier_train.py, where nothing is said; a run goes on with the crops that it began with."""
    cropped = {}

    def stream(source, *args, **values):
        cropped[source.path] = values.get("random_crop", False)
        return ImageStream(source, *args, **values)

    for module in (loop, classifier_loop):
        monkeypatch.setattr(module, "ImageStream", stream)
    few_steps(tmp_path / "run", 1, val_data_dir="builtin:digits-test", data_workers=0)
    assert cropped == {"builtin:digits": True, "builtin:digits-test": False}
    config = step_folder(tmp_path / "run", 1) / "config.yaml"
    assert "random_crop: true" in config.read_text()
    for text, crops in (
        ("random_crop: true", True),
        ("random_crop: false", False),
        ("", False),
    ):  # "": a run of version 0.1
        config.write_text(config.read_text().replace("random_crop: true", text))
        assert resolve(flags(log_dir=tmp_path / "run", iterations=2))[0].random_crop is crops
        config.write_text(config.read_text().replace(text, "random_crop: true") if text else config.read_text())
    typed, _ = resolve(flags(log_dir=tmp_path / "run", iterations=2, random_crop=True))
    assert typed.random_crop is True


# ---------------------------------------------------------------- resuming and processes


def test_kill_9_and_the_same_command_again_change_nothing(tmp_path):
    """4 steps == 2 steps + kill -9 + the same command: weights, averages, optimiser, losses, validation, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(flags(log_dir=whole, **STATEFUL))
    command = flags(log_dir=killed, **STATEFUL)
    process = start("classifier_train.py", command)
    wait_for(lambda: step_folder(killed, 2).exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for step in (3, 4):  # fast machines may have come that far
        for file in step_folder(killed, step).glob("*"):
            file.unlink()
        if step_folder(killed, step).exists():
            step_folder(killed, step).rmdir()
    main(command)
    for step in (2, 4):
        expected, found = contents(step_folder(whole, step)), contents(step_folder(killed, step))
        assert {"model.safetensors", "ema_0.9.safetensors", "training_state.pt", "classes.json"} < set(found)
        for one in (expected, found):
            del one["config.yaml"]  # names its own folder
        assert_same(expected, found)
    rows = progress(killed)
    assert rows == progress(whole) and [row["step"] for row in rows] == ["3", "4"]
    assert all(0 < float(row["val_loss"]) < 10 for row in rows)
    assert [float(row["lr"]) for row in rows] == pytest.approx([3e-4 * 2 / 4, 3e-4 / 4])


def test_two_processes_are_as_one(tmp_path):
    """Losses, accuracies and validation to 1e-6, with micro-batches on one side."""
    values = {"val_data_dir": "builtin:digits-test", "eval_interval": 2}
    one = few_steps(tmp_path / "one", 4, **values, microbatch=3)
    two = tmp_path / "two"
    finish_group("classifier_train.py", flags(log_dir=two, iterations=4, **values))
    assert len(progress(two)) == 4
    assert [row["val_loss"] == "" for row in progress(two)] == [True, False, True, False]
    for row, wanted in zip(progress(two), progress(one), strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (row[name] == "") == (value == "")
            if value:
                assert float(row[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9, nan_ok=True), name


def test_batch_size_is_that_of_each_process(tmp_path, capsys):
    main(flags(log_dir=tmp_path / "run", global_batch_size=-1, batch_size=4, dry_run=True, total_steps=3))
    printed = capsys.readouterr().out
    assert "# 4 images per step: 4 per process, 4 per pass" in printed and "total_steps: 3" in printed
    assert "lr: 0.0003" in printed and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is learned, and what is written


def test_it_learns_the_digits(tmp_path):
    values = {"val_data_dir": "builtin:digits-test", "global_batch_size": 32, "log_interval": 20, "random_flip": False}
    run = few_steps(tmp_path, 60, lr=1e-3, random_crop=False, **values)
    assert column(run, "loss")[-1] < 0.8 * np.log(10)
    assert column(run, "acc@1")[-1] > 0.35 and column(run, "val_acc@1")[-1] > 0.25  # by chance 0.1
    assert column(run, "acc@1_q0")[-1] > column(run, "acc@1_q3")[-1]  # little noise is easier
    assert column(run, "acc@5")[-1] > column(run, "acc@1")[-1]
    model, classes, config = load_classifier(str(run))
    assert classes == [str(digit) for digit in range(10)] and config.diffusion_steps == 40
    assert_same(dict(model.state_dict()), weights_of(run, 60))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_clean_images_are_told_timestep_0(tmp_path):
    run = few_steps(tmp_path, 2, noised=False, val_data_dir="builtin:digits-test", eval_interval=1)
    (_, row) = progress(run)
    assert row["loss_q0"] == row["loss"] and row["loss_q3"] == "nan"
    assert row["val_loss_q0"] == row["val_loss"] and row["val_loss_q3"] == ""
    with pytest.raises(UserError, match=r"noised \(False there, True here\)"):
        few_steps(run, 3)


def test_run_folder(tmp_path):
    run = few_steps(tmp_path / "run", 2)
    assert {p.name for p in run.iterdir() if not p.name.startswith("events.")} == {
        "config.yaml",
        "progress.csv",
        "checkpoints",
    }
    found = contents(step_folder(run, 2))
    assert set(found) == {
        "config.yaml",
        "classes.json",
        "model.safetensors",
        "training_state.pt",
    }  # no average, as in ADM
    assert found["model.safetensors"].keys() == tiny_classifier().state_dict().keys()
    assert b"total_steps: 2" in found["config.yaml"] and b"sample_interval" not in found["config.yaml"]


# ---------------------------------------------------------------- where it starts from


def test_adm_file_is_loaded_exactly(tmp_path):
    """The reference classifier of guided-diffusion, as its .pt with its flags."""
    spec, arrays = golden("adm_classifier_attention")
    model = fill(create_classifier(**spec["constructor"]), spec["fill_seed"])
    torch.save(model.state_dict(), tmp_path / "64x64_classifier.pt")
    found, classes, config = load_classifier(str(tmp_path / "64x64_classifier.pt"), settings=spec["constructor"])
    assert classes is None and config.num_classes == 1000  # read off the weights
    with torch.no_grad():
        assert (found(arrays["x"], arrays["timesteps"]) - arrays["output"]).abs().max() <= 1e-4
    with pytest.raises(UserError, match=r"another classifier: it lacks .* compare the classifier flags"):
        load_classifier(str(tmp_path / "64x64_classifier.pt"), settings={"classifier_depth": 4})


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_training_starts_from_adm_file(half, tmp_path):
    state = {key: value.half() if half else value for key, value in tiny_classifier().state_dict().items()}
    torch.save(state, tmp_path / "adm.pt")
    run = few_steps(tmp_path / "run", 1, lr=0, resume_checkpoint=tmp_path / "adm.pt")
    assert_same(weights_of(run, 1), {key: value.float() for key, value in state.items()})


@pytest.mark.parametrize("what", ["run", "checkpoint", "file", "classifier run"])
def test_training_starts_from_a_run(what, tmp_path):
    """The E head of an MT run (the paper's E*): its flags, process and class ids are taken over; and a classifier's own run."""
    classifier = tiny_classifier(classifier_pool="adaptive")
    source = mt_run(tmp_path / "mt", classifier, classifier_pool="adaptive")
    places = {"run": source, "checkpoint": step_folder(source, 7), "file": step_folder(source, 7) / "model.safetensors"}
    if what == "classifier run":
        places[what] = tmp_path / "first"
        main(words(**TRAINING, log_dir=places[what], iterations=1, lr=0, resume_checkpoint=source))
    run = tmp_path / "run"
    command = words(
        **TRAINING, log_dir=run, iterations=1, lr=0, resume_checkpoint=places[what]
    )  # no flag of the network
    main(command)
    assert_same(weights_of(run, 1), dict(classifier.state_dict()))
    config, classes = checkpoint.read_config(step_folder(run, 1) / "model.safetensors"), step_folder(run, 1)
    assert (config["classifier_pool"], config["noise_schedule"], config["num_classes"]) == ("adaptive", "cosine", 10)
    assert (config["lr"], config["data_dir"]) == (0, "builtin:digits")
    assert checkpoint.read_classes(classes)[0] == "9"
    # resumed, the run's own checkpoint has the last word
    main([*command, "--resume_checkpoint", str(tmp_path / "gone"), "--iterations", "2"])
    assert load_classifier(str(source)).model.state_dict().keys() == classifier.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"classifier_pool": "spatial"},
            r"another classifier: .* compare classifier_pool \(attention there, spatial here\)",
        ),
        ({"classifier_depth": 2}, r"compare classifier_depth \(1 there, 2 here\)"),
        ({"num_classes": 11}, r"compare num_classes \(10 there, 11 here\)"),
    ],
    ids=str,
)
def test_flags_that_contradict_the_weights(change, expected, tmp_path):
    source = mt_run(tmp_path / "mt", tiny_classifier(), classifier_pool="attention")
    with pytest.raises(UserError, match=expected):
        main(words(**TRAINING, log_dir=tmp_path / "run", iterations=1, resume_checkpoint=source, **change))


def test_a_model_without_a_classifier(tmp_path):
    source = mt_run(tmp_path / "mt", None)
    for path in (source, step_folder(source, 7) / "model.safetensors"):
        with pytest.raises(UserError, match=r"a diffusion model without a classifier inside; .*--mt_label_head E"):
            few_steps(tmp_path / "run", 1, resume_checkpoint=path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"num_classes": 4}, "has 10 classes; raise --num_classes 4 to 10"),
        ({"data_dir": "{pictures}"}, "a classifier needs classes"),
        ({"val_data_dir": "{pictures}"}, "a classifier needs classes"),
        ({"val_data_dir": "{animals}"}, "class 'ant' and 1 more is not one of the 10"),
        ({"val_data_dir": "gone"}, "gone: no such file"),
        ({"resume_checkpoint": "gone.pt"}, "gone.pt: no such file"),
        ({"ema_rate": "2"}, "--ema_rate '2': write rates"),
        ({"timestep_respacing": "x"}, "timestep_respacing 'x': write"),
        ({"eval_interval": 0}, "--eval_interval must be at least 1"),
        ({"iteration": 3}, r"unknown flag --iteration"),
        ({"sample_interval": 3}, "unknown flag --sample_interval"),
        ({"image_size": 10}, "image size 10"),
        ({"classifier_pool": "mean"}, "--classifier_pool: 'mean' is none of"),
        ({"diffusion_steps": 10, "noise_schedule": "linear"}, "--diffusion_steps 10 is too small"),
    ],
    ids=str,
)
def test_bad_input(change, expected, tmp_path):
    for folder, names in (("pictures", ["1.png", "2.png"]), ("animals", ["ant/1.png", "bee/2.png"])):
        for name in names:
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
    values = {
        key: str(value).format(pictures=tmp_path / "pictures", animals=tmp_path / "animals")
        for key, value in change.items()
    }
    with pytest.raises(UserError, match=expected) as caught:
        main(flags(log_dir=tmp_path / "run", **{"iterations": 1, "global_batch_size": 2, **values}))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_resuming_with_other_settings_names_them(tmp_path):
    run = few_steps(tmp_path / "run", 1)
    with pytest.raises(UserError, match=r"classifier_width \(64 there, 128 here\); repeat them"):
        few_steps(run, 2, classifier_width=128)
