"""`mt-diffusion show` on each kind of thing, made tiny, and on broken ones."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import MODEL, PROCESS, TRAINING, adm_unet, step_folder, words
from tiny_latent import FIRST_STAGE, MAPS, write_config, write_images, write_labelled_pairs, write_run

from evaluations.errors import EvaluationError
from guided_mt.commands import classifier_train, train
from latent_mt.commands import encode_latents, export_ldm
from latent_mt.runs.targets import instantiate
from mt_diffusion import show
from mt_diffusion.commands import COMMANDS
from mt_diffusion.flags import usage_of


def facts(path: str | Path, capsys) -> dict[str, Any]:
    """What is found, after a look at what is printed: aligned, and commands that exist, with flags that exist."""
    capsys.readouterr()  # of what made it
    show.main([str(path)])
    printed = capsys.readouterr().out
    show.main([str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert printed.startswith(f"{path}: {found['kind']}\n")
    assert all(len(line) < 400 for line in printed.splitlines())
    for entry in found["commands"]:
        _, *typed = shlex.split(entry["command"])
        name = typed[0] if typed[0] in COMMANDS else " ".join(typed[:2])
        known = {word for flag in usage_of(name).flags() for word in flag.names} | {"--class"}
        assert {word for word in typed if word.startswith("--")} <= known, entry
        assert entry["command"] in printed
    return found


def commands(found: dict[str, Any]) -> str:
    return "\n".join(entry["command"] for entry in found["commands"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Images with masks and labels, two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    own = {"mt_task": "masked,label", "mt_variant": "any", "total_steps": 2, "save_interval": 1, "ema_rate": "0.5,0.9"}
    train.main(words(**MODEL, **PROCESS, **TRAINING, **own, data_workers=0, lr=0.003, log_dir=folder))
    return folder


def test_a_run(run, capsys):
    found = facts(run, capsys)
    assert found["kind"] == "a run: a model of images of 8 pixels with masked and label, form any"
    assert found["task"] == ["masked", "label"] and found["form"] == "any" and found["image size"] == 8
    assert found["steps trained"] == "2 of 2" and found["checkpoints"] == "2, 1" and found["averages"] == ["0.5", "0.9"]
    assert found["last losses"]["step"] == "2" and float(found["last losses"]["loss"]) > 0
    assert "--lr 0.003" in found["trained with"] and "--seed" not in found["trained with"]
    assert found["precision"] == "fp32" and found["classes"].startswith("0, 1, 2") and found["number of classes"] == 10
    assert found["parameters"].endswith(" M") and found["size on disk"].endswith("B")
    typed = commands(found)
    for expected in (
        "restore --model_path",
        "--given label=0",
        "classify --model_path",
        "export adm",
        "train --config",
    ):
        assert expected in typed


def test_a_checkpoint_and_its_files(run, capsys):
    folder = step_folder(run, 1)
    found = facts(folder, capsys)
    assert found["kind"].startswith("a checkpoint: a model of images") and found["steps trained"] == "1 of 2"
    assert found["last losses"]["step"] == "1"
    assert facts(folder / "ema_0.5.safetensors", capsys)["kind"].startswith(
        "averaged weights (0.5) of a checkpoint: a model"
    )
    assert "training state" in facts(folder / "training_state.pt", capsys)["kind"]
    assert facts(run / "progress.csv", capsys)["last losses"]["step"] == "2"
    assert facts(run / "config.yaml", capsys)["kind"].startswith("a configuration: a model of images of 8 pixels")


def test_a_run_without_a_checkpoint(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    found = facts(tmp_path, capsys)
    assert found["kind"].endswith("form any, without a checkpoint so far") and "sample" not in commands(found)


def test_a_folder_of_runs(run, capsys):
    found = facts(run.parent, capsys)
    assert found["kind"] == "a folder of runs" and found["both"].endswith("form any, 2 steps")


def test_a_classifier(tmp_path, capsys):
    network = {"image_size": 8, "num_classes": 10, "classifier_width": 64, "classifier_depth": 1}
    network |= {"classifier_attention_resolutions": "4", **PROCESS, "total_steps": 1, "batch_size": 4}
    network.pop("learn_sigma")
    classifier_train.main(words(**network, data_dir="builtin:digits", data_workers=0, device="cpu", log_dir=tmp_path))
    found = facts(tmp_path, capsys)
    assert found["kind"] == "a run: a classifier of noisy images" and found["number of classes"] == 10
    assert "classify --classifier_path" in commands(found)


def test_latent_runs_caches_and_configurations(tmp_path, capsys):
    pairs = write_labelled_pairs(tmp_path / "pairs")
    run = write_run(tmp_path / "run", pairs, **MAPS)
    found = facts(run, capsys)
    assert found["kind"] == "a run: a latent model of photo and map, form any" and found["latents"] == "4 x 8 x 8"
    assert found["steps trained"] == "4 of 4" and "first stage" in found["parameters"]
    assert "latent-sample --model_path" in commands(found) and "--given photo" in commands(found)

    file = write_config(tmp_path / "tiny.yaml", pairs, run, **MAPS)
    assert facts(file, capsys)["kind"] == "a configuration: a latent model of photo and map, form any"
    save_file(instantiate(FIRST_STAGE, "m").state_dict(), tmp_path / "stage.safetensors")
    words_typed = ["--config", str(file), "--first_stage", str(tmp_path / "stage.safetensors"), "--device", "cpu"]
    encode_latents.main([*words_typed, "--out", str(tmp_path / "latents"), "data.params.sides=[photo,map]"])
    assert facts(tmp_path / "stage.safetensors", capsys)["kind"] == "a latent-diffusion (LDM) KL autoencoder"
    for folder in (tmp_path / "latents", tmp_path / "latents" / "train"):
        found = facts(folder, capsys)
        assert found["kind"].startswith("latents of a data set") and found["items"]["train"] == 4
        assert found["sides"] == ["photo", "map"] and found["latents"] == "4 x 8 x 8, of images of 16 pixels"
    found = facts(pairs, capsys)
    assert found["pairs"] == "4 of photo and map in train; 3 of photo and map in val"

    export_ldm.main(words(model_path=run, out=tmp_path / "ldm.ckpt"))
    found = facts(tmp_path / "ldm.ckpt", capsys)
    assert found["kind"] == "a latent-diffusion (LDM) model" and found["stored under"] == "state_dict"
    assert found["channels in"] == 4 and "averages of the network" in found["parameters"]


def test_foreign_weights(tmp_path, capsys):
    state = {f"module.{key}": value for key, value in adm_unet().state_dict().items()}
    torch.save(state, tmp_path / "adm.pt")
    found = facts(tmp_path / "adm.pt", capsys)
    assert found["kind"] == "an unconditional model of guided-diffusion (ADM)"
    assert found["channels in"] == 3 and found["channels out"] == "6 (with learned variances)"
    assert "sample --model_path" in commands(found)
    torch.save(
        adm_unet(class_cond=True, num_classes=7).state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    assert facts(tmp_path / "old.pt", capsys)["number of classes"] == 7
    save_file({"some.weight": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    found = facts(tmp_path / "x.safetensors", capsys)
    assert found["kind"] == "weights of a network that is not known here" and found["stored in"] == ["bfloat16"]


IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
ARRAYS = {
    "3 images of 8 x 8 pixels with a label each (arr_1): samples": {"arr_0": IMAGES, "arr_1": np.array([0, 2, 2])},
    "3 images of 8 x 8 pixels, and of each masked: samples": {"arr_0": IMAGES, "masked": IMAGES},
    "3 images restored": dict.fromkeys(("original", "masked", "restored", "mask"), IMAGES),
    "a reference batch: statistics of Inception features, and 3 of": {
        "mu": np.zeros(4),
        "sigma": np.eye(4),
        "arr_0": IMAGES,
    },
    "class probabilities of 3 images for 5 classes": {"probabilities": np.ones((3, 5)) / 5, "labels": np.arange(3)},
    "bits per dimension of 3 images": {"total_bpd": np.ones(3), "L0_prior_bpd": np.ones(3)},
    "3 labels": {"labels": np.arange(3)},
    "3 vectors of 5 numbers": {"representation": np.zeros((3, 5), np.float32)},
    "arrays of no kind that is known here": {"a": np.zeros(3), "b": np.zeros((2, 2))},
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(kind, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **ARRAYS[kind])
    found = facts(tmp_path / "x.npz", capsys)
    assert found["kind"].startswith(kind)
    assert list(found["arrays"]) == list(ARRAYS[kind])


def test_single_array_and_pictures_and_data(tmp_path, capsys):
    np.save(tmp_path / "v.npy", np.zeros((3, 5), np.float32))
    assert facts(tmp_path / "v.npy", capsys)["kind"].startswith("3 vectors of 5 numbers")
    Image.new("L", (4, 6)).save(tmp_path / "holes.png")
    assert facts(tmp_path / "holes.png", capsys)["kind"] == "a PNG picture of 6 x 4 pixels (L)"
    found = facts(write_images(tmp_path / "animals"), capsys)
    assert found["kind"] == "a data set of 9 images" and found["classes"] == {"number": 3, "names": "ant, bee, cat"}
    assert found["images per class"] == "3 to 3" and "masked,label" in commands(found)
    assert facts("builtin:digits-test", capsys)["kind"].startswith("a data set of 360 images")


def test_broken_things_are_one_line(run, tmp_path):
    files: dict[str, bytes] = {
        "pointer.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "page.ckpt": b"<!DOCTYPE html><html></html>",
        "empty.safetensors": b"",
        "cut.safetensors": (step_folder(run, 1) / "model.safetensors").read_bytes()[:2000],
        "pickle.pkl": b"\x80\x04\x95" + b"\x00" * 40,
        "cut.npz": b"PK\x03\x04 and no more",
        "cut.png": b"\x89PNG and no more",
        "text.txt": b"hello",
        "table.csv": b"a,b\n1,2\n",
        "bad.yaml": b"a: [",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "nothing").mkdir()
    broken = tmp_path / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "config.yaml").write_text("mt_task: [")
    for name in [*files, "objects.npz", "nothing", "broken", "missing"]:
        with pytest.raises(EvaluationError) as caught:
            show.main([str(tmp_path / name)])
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value), name


def test_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(EvaluationError, match="refused"):
        show.main([str(tmp_path / "trap.ckpt")])
    assert not (tmp_path / "sprung").exists()


def test_folders_around_runs_and_data(run, tmp_path, capsys):
    """The folder of checkpoints is its run; of a folder of archives it says which there are; nothing is said twice."""
    show.main([str(run / "checkpoints")])
    assert capsys.readouterr().out.startswith(f"{run}: a run: ")
    np.savez(tmp_path / "some.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(EvaluationError, match=r"or one of what is in it: .*some\.npz"):
        show.main([str(tmp_path)])
    folder = tmp_path / "-pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"its first image, a\.png, is broken"):
        show.main([str(folder)])
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    commands = {entry["why"]: entry["command"] for entry in facts(folder, capsys)["commands"]}
    assert commands["crop it once, to be read faster"].endswith("-pictures pictures-8.zip --size 8")
