"""latent_sample.py through its main(): what is written, sides and routes, seeds, batches, processes, resuming, foreign files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from test_classify import arrays
from tiny import finish_group
from tiny_latent import (
    MAPS,
    SIZE,
    UNET,
    model_params,
    random_model,
    train,
    write_config,
    write_labelled_pairs,
    write_pairs,
    write_run,
)

from evaluations import segmentation
from evaluations.files.images import open_images
from guided_mt.errors import UserError
from guided_mt.generation.sharded import SAFE_BATCH
from latent_mt.commands import latent_sample
from latent_mt.data import open_pairs
from latent_mt.model.generate import LatentGenerator
from latent_mt.runs.ldm_checkpoint import LDMCheckpoint, schedule_buffers, write_ldm

COUNT = 3  # validation pairs
FEW = ["--steps", "2"]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return write_labelled_pairs(tmp_path_factory.mktemp("streets"), val=COUNT)


@pytest.fixture(scope="module")
def webcams(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("webcams"), val=COUNT)


@pytest.fixture(scope="module")
def trained(streets, tmp_path_factory):
    """A run of form any in both roles, trained by the real command on photos and label maps."""
    run = tmp_path_factory.mktemp("trained")
    file = write_config(run / "a.yaml", streets, run / "run", **MAPS)
    train(file, "data.params.sides=[photo,map]", "run.total_steps=2")
    return run / "run"


@pytest.fixture(scope="module")
def run(streets, tmp_path_factory):
    """The same with random weights, whose outputs are not all alike."""
    return write_run(tmp_path_factory.mktemp("random"), streets, **MAPS)


def draw(model, out, *words) -> dict[str, np.ndarray]:
    """Run the command; {name of an .npz: its arr_0}."""
    latent_sample.main(["--model_path", str(model), "--out", str(out), *FEW, *map(str, words)])
    return {file.stem: arrays(file)["arr_0"] for file in sorted(out.glob("*.npz"))}


def complaint(*words) -> str:
    with pytest.raises(UserError) as caught:
        latent_sample.main([*FEW, *map(str, words)])
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 500, text
    return text


def pngs(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


# ---------------------------------------------------------------- what is written


def test_maps_of_photos_are_scored(trained, streets, tmp_path, capsys):
    made = draw(trained, tmp_path / "out", "--given", "photo")
    assert "rows photo, map (truth), map (read)" in capsys.readouterr().out
    assert list(made) == ["map_of_photo", "map_of_photo_read", "map_truth"]
    assert all(images.shape == (COUNT, SIZE, SIZE, 3) and images.dtype == np.uint8 for images in made.values())
    assert (made["map_of_photo"] != made["map_of_photo_read"]).any()
    out, pairs = tmp_path / "out", open_pairs(streets, split="val")
    for name in ("map_of_photo", "map_of_photo_read"):
        np.testing.assert_array_equal(pngs(out / name), made[name])
        with Image.open(out / f"{name}.png") as grid:
            assert grid.size[1] > 3 * SIZE
    true = np.stack([pairs.label_map(k, SIZE) for k in range(COUNT)])
    np.testing.assert_array_equal(pngs(out / "map_truth"), true)
    painted = np.stack([pairs.decode(k, SIZE)[3:].transpose(1, 2, 0) for k in range(COUNT)])
    np.testing.assert_array_equal(made["map_truth"], painted)

    assert not list(out.glob("*.parts"))
    for name, exact in (("map_of_photo", False), ("map_of_photo_read.npz", False), ("map_truth.npz", True)):
        words = [out / name, out / "map_truth", "--classes", out / "classes.txt", "--json", tmp_path / "s.json"]
        segmentation.main([str(word) for word in words])
        scores = json.loads((tmp_path / "s.json").read_text())
        assert scores["images"] == COUNT and scores["void_pixels"] == 9 * COUNT and scores["void"] == ["Unlabelled"]
        assert (scores["per_pixel_accuracy"] == 1) == exact


def test_photos_of_maps(run, tmp_path):
    made = draw(run, tmp_path / "out", "--given", "map", "--num_samples", 2)
    assert list(made) == ["photo_of_map", "photo_of_map_read", "photo_truth"]
    assert len(made["photo_of_map"]) == 2
    assert not (tmp_path / "out/photo_truth").exists() and not (tmp_path / "out/classes.txt").exists()
    assert open_images(str(tmp_path / "out/photo_of_map.npz")).count == 2  # as the evaluator reads them
    assert open_images(str(tmp_path / "out/photo_of_map")).count == 2


def test_another_split_and_other_data(run, streets, tmp_path):
    made = draw(run, tmp_path / "a", "--given", "photo", "--split", "train", "--route", "read")
    assert list(made) == ["map_of_photo_read", "map_truth"] and len(made["map_truth"]) == 4
    other = write_labelled_pairs(tmp_path / "other", val=1)
    assert len(draw(run, tmp_path / "b", "--given", "photo", "--data_dir", other)["map_truth"]) == 1
    streets = write_labelled_pairs(tmp_path / "streets", val=1)
    unnamed = write_run(tmp_path / "unnamed", streets, data={"sides": None}, **MAPS)
    words = ["--model_path", unnamed, "--given", "photo", "--data_dir", write_pairs(tmp_path / "webcams")]
    assert "its sides are A and B, but the model's are photo and map" in complaint(*words)


def test_the_default_folder_is_the_runs(streets, tmp_path):
    run = write_run(tmp_path / "run", streets, **MAPS)
    latent_sample.main(["--model_path", str(run), "--num_samples", "1", *FEW, "--dry_run", "True"])
    assert not (run / "samples").exists()
    latent_sample.main(["--model_path", str(run), "--num_samples", "1", *FEW])
    assert sorted(file.name for file in (run / "samples").iterdir()) == ["pairs_1.npz", "pairs_1.png"]


def test_pairs_from_nothing(run, tmp_path):
    draw(run, tmp_path, "--num_samples", 3)
    both = arrays(tmp_path / "pairs_3.npz")
    assert list(both) == ["arr_0", "map"] and all(x.shape == (3, SIZE, SIZE, 3) for x in both.values())
    assert (both["arr_0"][0] != both["arr_0"][1]).any() and (both["map"] != both["arr_0"]).any()
    draw(run, tmp_path / "again", "--num_samples", 3, "--seeds", "2,0-1", "--batch_size", 2)
    other = arrays(tmp_path / "again/pairs_3.npz")
    for name, images in both.items():
        np.testing.assert_array_equal(other[name], images[[2, 0, 1]])


@pytest.mark.parametrize(
    "weights, sampler, warned", [("paper", "dpm++", 1), ("paper", "ddpm", 0), ("bridge", "dpm++", 0)]
)
def test_a_frame_that_is_large_at_the_start_is_warned_of(streets, tmp_path, caplog, weights, sampler, warned):
    """See test_latent_model: deterministic samplers end far from the data there."""
    model = write_run(tmp_path / "run", streets, **{**MAPS, "mt_weights": weights})
    draw(model, tmp_path, "--num_samples", 1, "--sampler", sampler)
    assert caplog.text.count("take --sampler sde-dpm++") == warned


# ---------------------------------------------------------------- seeds, batches, processes, resuming


def test_a_result_depends_on_its_seed_alone(run, tmp_path):
    """Not on the batch size, on what else is drawn, or on the number of processes."""
    first = draw(run, tmp_path / "16", "--given", "photo")
    for k, words in enumerate((["--batch_size", 1], ["--batch_size", 2, "--seeds", "0,1,2"], ["--seeds", "0-99"])):
        again = draw(run, tmp_path / str(k), "--given", "photo", *words)
        assert all((again[name] == first[name]).all() for name in first)
    few = draw(run, tmp_path / "few", "--given", "photo", "--num_samples", 2)
    assert all((few[name] == first[name][:2]).all() for name in first)
    other = draw(run, tmp_path / "other", "--given", "photo", "--seeds", "0,7,2")
    changed = (other["map_of_photo"] != first["map_of_photo"]).any(axis=(1, 2, 3))
    assert changed.tolist() == [False, True, False]

    out = tmp_path / "two"
    argv = ["--model_path", str(run), "--out", str(out), *FEW, "--given", "photo", "--batch_size", "1"]
    printed = finish_group("latent_sample.py", [*argv, "--device", "cpu"])
    assert printed.count("# writing to") == 1
    for name, images in first.items():
        np.testing.assert_array_equal(arrays(out / f"{name}.npz")["arr_0"], images)
    np.testing.assert_array_equal(pngs(out / "map_of_photo"), first["map_of_photo"])


def test_a_stopped_sampling_goes_on(run, tmp_path, monkeypatch):
    whole = draw(run, tmp_path / "whole", "--given", "photo", "--route", "generate")
    made_from, calls = LatentGenerator.made_from, []

    def mortal(self, *arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made_from(self, *arguments)

    monkeypatch.setattr(LatentGenerator, "made_from", mortal)
    words = ["--given", "photo", "--route", "generate", "--batch_size", 1]
    with pytest.raises(KeyboardInterrupt):
        draw(run, tmp_path / "parts", *words)
    out = ["--model_path", run, "--out", tmp_path / "parts"]
    assert "other settings (mt_condition_scale was 1.0)" in complaint(*out, *words, "--mt_condition_scale", 2)
    assert calls == [SAFE_BATCH] * 2
    parts = draw(run, tmp_path / "parts", *words)
    assert len(calls) == 4  # the first of three was kept
    assert all((parts[name] == whole[name]).all() for name in whole)


# ---------------------------------------------------------------- forms and roles

NEVER = "was not trained to generate {} from {} .mt_swap_prob {:g}.; "
ASKED = {"day": "night", "night": "day"}


@pytest.mark.parametrize("swap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["any", "U", "X"])
def test_what_each_form_can(webcams, tmp_path, variant, swap):
    """z_0 is the day at swap 0, the night at 1: what is z_0 is generated, what isn't is read off its head."""
    run = write_run(tmp_path / "run", webcams, mt_variant=variant, mt_swap_prob=swap)
    generated = {"day": swap > 0, "night": swap < 1}  # by what is given
    read = {"day": swap < 1 and variant != "X", "night": swap > 0 and variant != "X"}
    for given, made in ASKED.items():
        words = ["--model_path", run, "--given", given, "--num_samples", 1]
        routes = [
            name for name, can in ((f"{made}_of_{given}", generated), (f"{made}_of_{given}_read", read)) if can[given]
        ]
        if routes:
            found = draw(run, tmp_path / given, *words[2:])
            assert list(found) == sorted([*routes, f"{made}_truth"])
        else:
            assert f"to generate {made} from {given}" in complaint(*words, "--out", tmp_path / "none")
            assert not (tmp_path / "none").exists()
        if not generated[given]:
            text = complaint(*words, "--route", "generate")
            assert (f"(mt_swap_prob {swap:g})" in text) and ("--route read" in text) == read[given]
        if not read[given]:
            text = complaint(*words, "--route", "read")
            assert "form-X" in text if variant == "X" else "z_0 was never" in text
            assert ("--route generate" in text) == generated[given]
    if variant == "X":
        assert "name it with --given" in complaint("--model_path", run)
    else:
        draw(run, tmp_path / "pairs", "--num_samples", 1)
        assert list(arrays(tmp_path / "pairs/pairs_1.npz")) == ["arr_0", "night"]


@pytest.mark.parametrize("key, value", [("mt_loss_weight", 0.0), ("mt_given_prob", 1.0)])
def test_a_head_that_learned_nothing_is_not_read(webcams, tmp_path, key, value):
    run = write_run(tmp_path / "run", webcams, **{key: value})
    words = ["--model_path", run, "--given", "day"]
    text = complaint(*words, "--route", "read")
    assert "head was never trained" in text and f"{key} {value:g}" in text and "use --route generate" in text
    assert list(draw(run, tmp_path / "out", *words[2:])) == ["night_of_day", "night_truth"]


# ---------------------------------------------------------------- latent-diffusion's own files


def foreign(folder, averages: bool = True, **params):
    """(.ckpt of a plain model, its YAML file, the weights and the averages in it)."""
    folder.mkdir(exist_ok=True)
    params = {"mt_sides": [], "mt_swap_prob": 0.0, **params}
    one, other = (random_model(seed, **params) for seed in (0, 1))
    averages_of = other.network.state_dict() if averages else None
    content = LDMCheckpoint(
        one.network.state_dict(),
        one.first_stage_model.state_dict(),
        ema=averages_of,
        ema_decay=0.9999 if averages else None,
        scale_factor=1.0,
        buffers=schedule_buffers(one.diffusion.betas),
    )
    write_ldm(folder / "model.ckpt", content)
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model_params(**params)}
    file = folder / "model.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create({"model": {"base_learning_rate": 1e-4, **model}})))
    return folder / "model.ckpt", file


def test_a_checkpoint_of_latent_diffusion(tmp_path):
    """Its averages are what is sampled, as in LDM."""
    with_averages, file = foreign(tmp_path / "a")
    without, _ = foreign(tmp_path / "b", averages=False)
    found = {}
    for name, path, words in (
        ("averages", with_averages, []),
        ("weights", with_averages, ["--ema", "none"]),
        ("alone", without, []),
    ):
        found[name] = draw(path, tmp_path / name, "--config", file, "--num_samples", 2, *words)["samples_2"]
    assert found["averages"].shape == (2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(found["weights"], found["alone"])
    assert (found["averages"] != found["weights"]).any()
    assert (tmp_path / "averages/samples_2.png").exists()

    assert "has no config.yaml beside it; copy the YAML file" in complaint("--model_path", with_averages)
    known = ["--model_path", with_averages, "--config"]
    assert "can't be given: this model knows of single images only" in complaint(*known, file, "--given", "day")
    assert "knows of no classes; leave the flag out" in complaint(*known, file, "--class_id", 1)
    paired = OmegaConf.load(file)
    paired.model.params.mt_sides = ["day", "night"]
    (tmp_path / "paired.yaml").write_text(OmegaConf.to_yaml(paired))
    text = complaint(*known, tmp_path / "paired.yaml", "--given", "day")
    assert "has no heads or condition inputs" in text and "take mt_sides and mt_tasks out" in text


def test_classes(tmp_path):
    # With as many groups as channels, normalisation takes an embedding away that is only added.
    unet = {
        "target": "latent_mt.model.unet.UNetModel",
        "params": {**UNET, "num_classes": 4, "use_scale_shift_norm": True},
    }
    path, file = foreign(tmp_path / "a", unet_config=unet)
    words = ["--config", file, "--num_samples", 2]
    chosen = [draw(path, tmp_path / str(k), *words, "--class_id", k)["samples_2"] for k in (1, 2)]
    assert (chosen[0] != chosen[1]).any()
    assert len(draw(path, tmp_path / "any", *words)["samples_2"]) == 2
    assert "--class_id 4: this model has classes 0 to 3" in complaint("--model_path", path, *words, "--class_id", 4)


# ---------------------------------------------------------------- bad input

BAD = [
    (["--given", "foto"], r"'foto' is no side or modality of this model .did you mean photo\?.; it has photo and map"),
    (
        ["--given", "photo", "--route", "generat"],
        r"--route: 'generat' is none of generate, read .did you mean generate",
    ),
    (["--given", "photo", "--route", ","], r"--route ',': name generate or read, or both"),
    (["--given", "photo", "--split", "vall"], r"no split vall .did you mean val\?.; there is train, val"),
    (["--given", "photo", "--data_dir", "nowhere"], r"nowhere: no such file or folder"),
    (["--given", "photo", "--num_samples", "0"], r"--num_samples must be at least 1, or -1"),
    (["--given", "photo", "--route", "read", "--timesteps", "0,40"], r"'40' is no timestep .* 0 to 39"),
    (["--given", "photo", "--draws", "0"], r"--draws must be at least 1"),
    (["--given", "photo", "--class_id", "1"], r"--class_id is of class-conditional models"),
    (["--split", "val"], r"--split goes with --given"),
    (["--route", "read"], r"--route goes with --given"),
    (["--seeds", "3-1"], r"--seeds '3-1': write '0-99'"),
    (["--seeds", "0-3", "--num_samples", "5"], r"names 4 seeds for 5 samples"),
    (["--stepps", "3"], r"unknown flag --stepps .did you mean steps"),
    (["--steps", "many"], r"--steps takes a whole number"),
    (["--timestep_respacing", "ldm40"], r"ldm40: choose 1\.\.39 steps"),
    (
        ["--given", "photo", "--guidance_scale", "2"],
        r"--guidance_scale needs a model that also learned without its condition",
    ),
    (["--ema", "0.5"], r"has no averaged weights '0\.5'"),
    (["--out", "pairs.npz"], r"--out pairs\.npz: names a folder here"),
    (["--device", "gpu"], r"--device 'gpu': write cpu, cuda"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[" ".join(row[0]) for row in BAD])
def test_bad_flags(run, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    text = complaint("--model_path", run, "--out", tmp_path / "out", *words)
    assert re.search(expected, text), text
    assert not list(tmp_path.rglob("*.npz"))


def test_bad_files(run, streets, tmp_path):
    assert "--model_path is missing" in complaint()
    assert "nowhere: no such file or folder" in complaint("--model_path", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no complete checkpoint" in complaint("--model_path", tmp_path / "empty")
    broken = write_run(tmp_path / "broken", streets, **MAPS) / "checkpoints/step_00000004"
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated or no weights file" in complaint("--model_path", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(whole)
    config = OmegaConf.load(broken / "config.yaml")
    config.model.params.unet_config.params.model_channels = 64
    (tmp_path / "wide.yaml").write_text(OmegaConf.to_yaml(config))
    text = complaint("--model_path", tmp_path / "broken", "--config", tmp_path / "wide.yaml")
    assert "another architecture" in text and "model.params.unet_config" in text
    (broken / "config.yaml").unlink()
    assert "has no config.yaml beside it" in complaint("--model_path", tmp_path / "broken")
    assert "nowhere.yaml: can't be read" in complaint("--model_path", run, "--config", "nowhere.yaml")
    (streets / "val/images/003.png").write_bytes((streets / "val/images/000.png").read_bytes())
    try:
        assert "without a label map: val/images/003.png" in complaint("--model_path", run, "--given", "photo")
    finally:
        (streets / "val/images/003.png").unlink()


def test_two_images_of_one_name(tmp_path):
    assert latent_sample.unique_stems(["a/1.png", "b/2.png"], "x") == ["1", "2"]
    assert latent_sample.unique_stems(["a/1.png", "b/1.jpg"], "x") == ["a_1", "b_1"]
    with pytest.raises(UserError, match="x: two images are called a_1"):
        latent_sample.unique_stems(["a/1.png", "a/1.jpg"], "x")


def test_drawing_is_in_eval_mode_and_without_gradients(run):
    weights = run / "checkpoints/step_00000004/model.safetensors"
    model = latent_sample.load_model(latent_sample.read_saved(weights, ""), weights, torch.device("cpu"))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
