"""Every command that reads weights, given those of another architecture, files that are no weights, and runs of another kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import MODEL, PROCESS, TRAINING, adm_unet, flags, words
from tiny_latent import FIRST_STAGE, model_params, write_config, write_images
from torch import Tensor

from guided_mt.networks.classifier import create_classifier
from guided_mt.networks.dit import DiT
from guided_mt.runs.checkpoint import save_checkpoint
from guided_mt.runs.recognise import RUNS
from latent_mt.runs.targets import instantiate
from mt_diffusion import console

CLASSIFIER = {"classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "8"}
DEFAULTS = {
    "classifier_use_fp16": False,
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
LOSS = {
    "target": "ldm.modules.losses.LPIPSWithDiscriminator",
    "params": {"disc_start": 0, "disc_factor": 0.0, "perceptual_weight": 0.0},
}


class Place(NamedTuple):
    """A folder with what the commands need beside weights: YAML files of a latent model and of a first stage."""

    folder: Path
    latent: Path
    first_stage: Path


def entries(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1) for name in names}


def module(config: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in instantiate(config, "x").state_dict().items()}


LDM = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model_params(mt_sides=[])}
# {what is said of it: (its family where some command takes it, its entries)}
OTHERS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "a diffusers U-Net": ("", lambda: entries("down_blocks.0.x", "up_blocks.0.x", "time_embedding.linear_1.weight")),
    "a torchvision ResNet": ("", lambda: entries("layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight")),
    "an unconditional model of guided-diffusion": ("pixel", lambda: dict(adm_unet().state_dict())),
    "a noisy classifier of guided-diffusion": (
        "classifier",
        lambda: dict(create_classifier(8, **CLASSIFIER, **DEFAULTS, num_classes=10).state_dict()),
    ),
    "a latent-diffusion (LDM) model": ("latent", lambda: module(LDM)),
    "a latent-diffusion (LDM) KL autoencoder": ("first stage", lambda: module(FIRST_STAGE)),
    "a DiT transformer for pixels": ("pixel", lambda: dict(DiT(8, 2, 3, 32, 2, 2, num_classes=10).state_dict())),
    "nothing that is known": ("", lambda: entries("weight", "bias")),
}
NO_WEIGHTS = {
    "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2133074\n",
    "is a web page": b"<!DOCTYPE html><html></html>",
    "is empty": b"",
}
# What is said of another kind where a command is for one of two, or where nothing is known.
ALSO = {
    "a latent-diffusion (LDM) model": ("is a diffusion model's checkpoint, but an autoencoder's is expected",),
    "a latent-diffusion (LDM) KL autoencoder": ("is an autoencoder's checkpoint, but a diffusion model's is expected",),
    "an unconditional model of guided-diffusion": (
        "a diffusion model without a classifier inside",
        "holds no label head",
    ),
    "a DiT transformer for pixels": ("a diffusion model without a classifier inside", "holds no label head"),
    "nothing that is known": (
        "another architecture: it lacks",
        "holds no label head",
        "holds no network that is known here",
        "is no checkpoint of latent-diffusion",
    ),
}

DRAWN = {**MODEL, **PROCESS, "device": "cpu", "num_samples": 1}
DIGITS = {"data_dir": "builtin:digits-test"}
LATENT = {"device": "cpu", "num_samples": 1}
# {command and flag: (family that it takes, its words for a weights file)}
COMMANDS: dict[str, tuple[str, Callable[[Path, Place], list[str]]]] = {
    "train": (
        "pixel",
        lambda file, at: flags(resume_checkpoint=file, log_dir=at.folder / "run", total_steps=1),
    ),
    "sample": ("pixel", lambda file, at: words(**DRAWN, model_path=file)),
    "restore": ("pixel", lambda file, at: words(**DRAWN, **DIGITS, mt_task="masked", model_path=file)),
    "nll": ("pixel", lambda file, at: words(**DRAWN, **DIGITS, model_path=file)),
    "classify": ("", lambda file, at: words(**DRAWN, **DIGITS, mt_task="label", num_classes=10, model_path=file)),
    "classify --classifier_path": (
        "classifier",
        lambda file, at: words(**LATENT, **DIGITS, **CLASSIFIER, image_size=8, classifier_path=file),
    ),
    "classifier-train": (
        "classifier",
        lambda file, at: words(
            image_size=8,
            num_classes=10,
            **CLASSIFIER,
            **PROCESS,
            **TRAINING,
            resume_checkpoint=file,
            log_dir=at.folder / "r",
        ),
    ),
    "classifier-sample": (
        "pixel",
        lambda file, at: words(**DRAWN, **CLASSIFIER, model_path=file, classifier_path=at.folder / "classifier.pt"),
    ),
    "classifier-sample --classifier_path": (
        "classifier",
        lambda file, at: words(**DRAWN, **CLASSIFIER, model_path=at.folder / "pixel.pt", classifier_path=file),
    ),
    "export adm": ("pixel", lambda file, at: words(model_path=file, out=at.folder / "x.pt")),
    "latent-train": ("latent", lambda file, at: ["--config", str(at.latent), f"model.params.ckpt_path={file}"]),
    "latent-train first_stage_config": (
        "first stage",
        lambda file, at: ["--config", str(at.latent), f"model.params.first_stage_config.params.ckpt_path={file}"],
    ),
    "latent-sample --config": ("latent", lambda file, at: words(**LATENT, model_path=file, config=at.latent)),
    "latent-sample": ("latent", lambda file, at: words(**LATENT, model_path=file)),
    "latent-restore": ("latent", lambda file, at: words(**LATENT, **DIGITS, model_path=file)),
    "latent-classify": ("latent", lambda file, at: words(**LATENT, **DIGITS, model_path=file)),
    "autoencoder-train": (
        "first stage",
        lambda file, at: ["--config", str(at.first_stage), f"model.params.ckpt_path={file}"],
    ),
    "encode": (
        "first stage",
        lambda file, at: words(config=at.latent, first_stage=file, out=at.folder / "encoded"),
    ),
    "encode without first_stage_config": (
        "first stage",
        lambda file, at: words(config=at.first_stage, first_stage=file, out=at.folder / "encoded"),
    ),
    "export ldm": ("latent", lambda file, at: words(model_path=file, out=at.folder / "x.ckpt")),
    "export diffusers": ("latent", lambda file, at: words(model_path=file, out=at.folder / "x")),
    "show": ("any", lambda file, at: [str(file)]),
}
TWO_WORDS = ("export adm", "export ldm", "export diffusers")
ALSO_TAKEN = {"export adm": ("classifier",), "export ldm": ("first stage",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("weights")
    images = write_images(folder / "images")
    first_stage = {**FIRST_STAGE, "params": {**FIRST_STAGE["params"], "lossconfig": LOSS}}
    data = {"path": str(images), "image_size": 16, "batch_size": 2, "num_workers": 0}
    config = {
        "model": first_stage,
        "data": {"target": "latent_mt.data.ImageData", "params": data},
        "lightning": {"trainer": {"accelerator": "cpu"}},
        "run": {"log_dir": str(folder / "first_stage"), "total_steps": 1},
    }
    (folder / "first_stage.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    latent = write_config(folder / "latent.yaml", images, folder / "latent", mt_sides=[])
    for number, (family, made) in enumerate(OTHERS.values()):
        state = {key: value.contiguous() for key, value in made().items()}
        if number % 2:  # under a name of the other format
            save_file(state, folder / f"{number}.ckpt")
        else:
            torch.save({"state_dict": state}, folder / f"{number}.ckpt")
        torch.save(state, folder / f"{family or number}.pt")
    return Place(folder, latent, folder / "first_stage.yaml")


@pytest.fixture
def complaint(monkeypatch, capsys) -> Callable[..., str]:
    """The one line with which a command ends, exit code 2, without its beginning."""

    def read(row: str, file: Path, place: Place) -> str:
        name = row if row in TWO_WORDS else row.partition(" ")[0]
        monkeypatch.setattr(sys, "argv", ["mt-diffusion", *name.split(), *COMMANDS[row][1](file, place)])
        with pytest.raises(SystemExit) as ended:
            console.main()
        error = capsys.readouterr().err
        assert ended.value.code == 2, (row, file, error)
        line = error.strip().splitlines()[-1]
        assert line.startswith("error: ") and len(line) < 700, error
        assert "weights_only" not in line and "torch.load" not in line and "Traceback" not in error, error
        assert str(file) in line, error
        return line

    return read


@pytest.mark.parametrize("row", [row for row in COMMANDS if row != "show"])
def test_another_architecture_is_told_what_it_looks_like(row, place, complaint):
    taken = (COMMANDS[row][0], *ALSO_TAKEN.get(row, ()))
    for number, (name, (family, _)) in enumerate(OTHERS.items()):
        if family and family in taken:
            continue
        said = complaint(row, place.folder / f"{number}.ckpt", place)
        assert any(words in said for words in (f"has the keys of {name}", *ALSO.get(name, ()))), (row, name, said)


@pytest.mark.parametrize("row", COMMANDS)
def test_what_is_no_weights_file_is_told_what_it_is(row, place, complaint, tmp_path):
    for what, content in NO_WEIGHTS.items():
        (tmp_path / "x.pt").write_bytes(content)
        assert what in complaint(row, tmp_path / "x.pt", place), row
    (tmp_path / "x.pt").write_bytes((place.folder / "pixel.pt").read_bytes()[:5000])
    assert "is a truncated or damaged file" in complaint(row, tmp_path / "x.pt", place), row


@pytest.mark.parametrize("row", ["latent-sample", "latent-restore", "latent-classify"])
def test_a_latent_model_without_its_configuration_is_asked_for_it(row, place, complaint):
    said = complaint(row, place.folder / "latent.pt", place)
    assert "has no config.yaml beside it; copy the YAML file that describes it there" in said
    assert ("--config" in said) == (row == "latent-sample")


# ---------------------------------------------------------------- weights that hold NaN

# Entries of each family that are spoilt one after the other; of latent models, in which part.
SPOILT = {
    "pixel": (("", "time_embed.0.weight"),),
    "classifier": (("", "time_embed.0.weight"),),
    "latent": (("model.diffusion_model.", "time_embed.0.weight"), ("first_stage_model.", "decoder.conv_in.weight")),
    "first stage": (("", "decoder.conv_in.weight"),),
}


@pytest.mark.parametrize("row", [row for row, (family, _) in COMMANDS.items() if family in SPOILT])
def test_weights_with_nan_are_refused_by_name(row, place, complaint, tmp_path):
    family = COMMANDS[row][0]
    for number, (part, name) in enumerate(SPOILT[family]):
        state = torch.load(place.folder / f"{family}.pt", weights_only=True)
        state[part + name].view(-1)[number] = float("nan") if number == 0 else float("-inf")
        torch.save(state, tmp_path / "x.pt")
        if family in ("latent", "first stage"):
            beside = place.latent if family == "latent" else place.first_stage
            (tmp_path / "config.yaml").write_text(beside.read_text())
        said = complaint(row, tmp_path / "x.pt", place)
        assert "1 of " in said and f"hold NaN or infinity ('{name}')" in said
    assert not list(place.folder.glob("x.*"))


def test_a_condition_that_is_nan_is_not_exported(place, complaint, tmp_path):
    state = torch.load(place.folder / "latent.pt", weights_only=True)
    torch.save(state | {"cond_stage_model.embedding.weight": torch.full((2, 2), float("nan"))}, tmp_path / "x.pt")
    (tmp_path / "config.yaml").write_text(place.latent.read_text())
    assert "hold NaN or infinity ('embedding.weight')" in complaint("export ldm", tmp_path / "x.pt", place)


# ---------------------------------------------------------------- runs of another kind


@pytest.fixture(scope="module")
def runs(place) -> dict[str, Path]:
    """{family: a run folder with one checkpoint}."""
    configs = {
        "pixel": "num_channels: 32\nmt_task: none\n",
        "classifier": "classifier_width: 64\nval_data_dir: ''\n",
        "latent": place.latent.read_text(),
        "first stage": place.first_stage.read_text(),
    }
    for family, text in configs.items():
        state = torch.load(place.folder / f"{family}.pt", weights_only=True)
        save_checkpoint(
            place.folder / f"run of {family}",
            1,
            config_yaml=text,
            weights={"model": state},
            training_state={},
            classes=["a", "b"],
        )
    return {family: place.folder / f"run of {family}" for family in configs}


@pytest.mark.parametrize("row", [row for row in COMMANDS if row not in ("show", "classify")])
def test_a_run_of_another_kind_is_told_what_it_holds(row, place, runs, complaint):
    taken = (COMMANDS[row][0], *ALSO_TAKEN.get(row, ()))
    for family, run in runs.items():
        if family in taken:
            continue
        kind = next(name for name, (other, _) in OTHERS.items() if other == family)
        said = complaint(row, run, place)
        known = (f"is of a run that holds {RUNS[family][0]}; {RUNS[family][1]}", f"has the keys of {kind}")
        assert any(words in said for words in (*known, *ALSO.get(kind, ()))), (row, family, said)


@pytest.mark.parametrize(
    ("name", "family", "argv"),
    [
        ("train", "pixel", lambda run, at: flags(log_dir=run)),
        ("classifier-train", "classifier", lambda run, at: words(image_size=8, **PROCESS, **TRAINING, log_dir=run)),
        ("latent-train", "latent", lambda run, at: ["--config", str(at.latent), f"run.log_dir={run}"]),
        ("autoencoder-train", "first stage", lambda run, at: ["--config", str(at.first_stage), f"run.log_dir={run}"]),
    ],
)
def test_a_training_does_not_begin_in_the_run_of_another_kind(name, family, argv, place, runs, complaint, monkeypatch):
    monkeypatch.setitem(COMMANDS, name, (family, argv))
    for other, run in runs.items():
        if other != family:
            assert f"log_dir {run}: is the run of {RUNS[other][0]}; take another" in complaint(name, run, place)
