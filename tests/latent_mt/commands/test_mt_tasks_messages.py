"""What is wrong in `mt_tasks`, in the data for it, or in what is asked of such a model: one line with key, value and way out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_latent import SIZE, random_model, train, write_run
from tiny_tasks import COUNT, SIDES, write_data, write_tasks

from guided_mt.errors import UserError
from guided_mt.networks.model import VARIANTS
from latent_mt.commands import latent_sample
from latent_mt.first_stage.latents import write_cache
from latent_mt.runs.configuration import load_config
from latent_mt.runs.targets import instantiate

TASKS = "model.params.mt_tasks"
LABEL = {"num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


# ---------------------------------------------------------------- the file alone

BAD = [
    ({"lable": LABEL}, rf"{TASKS}\.lable\.task: unknown 'lable' \(did you mean label\?\); choose from masked, label"),
    ({"map": {"task": "pared"}}, rf"{TASKS}\.map\.task: unknown 'pared' \(did you mean paired\?\)"),
    ({"map": {"task": ["paired"]}}, rf"{TASKS}\.map\.task: unknown"),
    ({"masked": 3}, rf"{TASKS}\.masked: write {{key: value}} pairs, not '3'"),
    (["masked"], rf"{TASKS}: write the modalities as NAME: {{key: value}}, as in masked: {{}}"),
    ({"mse": {"task": "masked"}}, r"modality 'mse': the name is that of a column of progress\.csv; choose another"),
    ({"a b": {"task": "masked"}}, r"modality 'a b': a name is made of letters"),
    ({"masked": {"mask_pach": 3}}, rf"{TASKS}\.masked: unknown key 'mask_pach' \(did you mean mask_patch\?\); it may"),
    ({"masked": {"mask_patch": "big"}}, rf"{TASKS}\.masked: mask_patch takes a whole number, not 'big'"),
    ({"masked": {"weights": "papre"}}, rf"{TASKS}\.masked\.weights 'papre' is none of paper, .*did you mean paper"),
    ({"masked": {"weights": ["paper"]}}, rf"{TASKS}\.masked\.weights '\['paper'\]' is none of paper, "),
    ({"masked": {"loss_weight": -1}}, rf"{TASKS}\.masked\.loss_weight must be at least 0, not -1"),
    ({"masked": {"loss_weight": "much"}}, rf"{TASKS}\.masked\.loss_weight must be at least 0, not much"),
    ({"masked": {"loss_weight": float("inf")}}, rf"{TASKS}\.masked\.loss_weight must be at least 0, not inf"),
    ({"masked": {"absent": "yes"}}, rf"{TASKS}\.masked\.absent takes true or false, not 'yes'"),
    ({"masked": {"swap_prob": 0.5}}, rf"{TASKS}\.masked\.swap_prob: only a side can be z_0"),
    ({"label": {}}, rf"{TASKS}\.label: has no num_classes, the number of the data's classes"),
    ({"label": {"num_classes": 0}}, rf"{TASKS}\.label: num_classes must be at least 1, not 0"),
    ({"label": {**LABEL, "mt_label_head": "Q"}}, rf"{TASKS}\.label: mt_label_head: 'Q' is none of M, E"),
    ({"label": {**LABEL, "mt_encoder_refresh": 0}}, rf"{TASKS}\.label: mt_encoder_refresh must be at least 1, not 0"),
    ({"representation": {}}, rf"{TASKS}\.representation\.representation_file is missing"),
    (
        {"representation": {"representation_file": "nowhere.npz"}},
        rf"{TASKS}\.representation\.representation_file nowhere\.npz: can't be read",
    ),
    ({"map": {"task": "paired", "paired_dir": "maps"}}, rf"{TASKS}\.map\.paired_dir: sides come with the data here"),
    (
        {"map": {"task": "paired"}, "also": {"task": "paired", "paired_side": "map"}},
        rf"{TASKS}\.also: the side 'map' is that of map; leave one out",
    ),
]


@pytest.mark.parametrize(("tasks", "expected"), BAD, ids=[str(tasks) for tasks, _ in BAD])
def test_bad_tasks(tasks, expected):
    with pytest.raises(UserError) as caught:
        random_model(mt_sides=[], mt_swap_prob=0.0, mt_tasks=tasks)
    assert re.search(expected, one_line(caught)), one_line(caught)


BAD_SIDES = [
    (
        {"mt_tasks": {"edge": {"task": "paired"}}},
        rf"{TASKS}\.edge: 'edge' is none of the sides map, edges beside photo",
    ),
    ({"mt_tasks": {"map": {"task": "masked"}}}, rf"{TASKS}\.map: is a side of mt_sides, so its task is paired, not"),
    ({"mt_tasks": {"photo": {"task": "masked"}}}, rf"{TASKS}\.photo: the images themselves are called photo"),
    ({"mt_sides": ["photo", 3]}, r"model\.params\.mt_sides \['photo', 3\]: name the sides of an item"),
    ({"mt_swap_prob": 1.2}, r"model\.params\.mt_swap_prob must be between 0 and 1, not 1\.2"),
    (
        {"mt_swap_prob": {"map": 0.6, "edges": 0.6}},
        r"mt_swap_prob: the sides' shares map=0\.6,edges=0\.6 are more than",
    ),
    ({"mt_swap_prob": 0.5, "mt_tasks": {"map": {"swap_prob": 0.9}}}, r"shares map=0\.9,edges=0\.25 are more than 1"),
    ({"mt_swap_prob": {"photo": 0.6}}, r"model\.params\.mt_swap_prob: 'photo' is none of map, edges"),
    ({"mt_swap_prob": {"map": "often"}}, r"model\.params\.mt_swap_prob of map must be between 0 and 1, not often"),
    ({"mt_context_dim": 0}, r"model\.params\.mt_context_dim must be at least 1, or -1, not 0"),
]


@pytest.mark.parametrize(("params", "expected"), BAD_SIDES, ids=[str(params) for params, _ in BAD_SIDES])
def test_bad_sides(params, expected):
    with pytest.raises(UserError) as caught:
        random_model(**{"mt_sides": SIDES, **params})
    assert re.search(expected, one_line(caught)), one_line(caught)


# ---------------------------------------------------------------- the data for it


def refused(folder: Path, tmp_path: Path, *overrides: str, **params) -> str:
    """What training says of these tasks on the data of `folder`; nothing is left behind."""
    file = write_tasks(tmp_path / "a.yaml", folder, tmp_path / "run", **params)
    with pytest.raises(UserError) as caught:
        train(file, *overrides)
    assert not (tmp_path / "run/checkpoints").exists()
    return one_line(caught)


def test_data_with_more_classes(folder, tmp_path):
    text = refused(folder, tmp_path, mt_tasks={"label": {"num_classes": 2}})
    assert f"{TASKS}.label.num_classes 2: the data have 3 classes; raise it" in text


def test_data_without_classes(folder, tmp_path):
    text = refused(folder, tmp_path, "data.params.labels=null", mt_sides=SIDES, mt_tasks={"label": LABEL})
    assert f"{TASKS}.label needs classes, and " in text and str(folder / "streets") in text


@pytest.mark.parametrize("sides", [["photo", "map", "depth"], ["photo", "edges", "map"], ["photo", "map"]])
def test_sides_that_the_data_lack_or_have_in_another_order(sides, folder, tmp_path):
    text = refused(folder, tmp_path, f"model.params.mt_sides=[{','.join(sides)}]", mt_sides=SIDES)
    assert f"mt_sides {sides}, but the data's sides are ['photo', 'map', 'edges']" in text


def test_a_side_of_images_that_have_no_other(folder, tmp_path):
    text = refused(folder, tmp_path, "data.params.paired=null", mt_tasks={"paired": {}})
    assert "needs data of as many images each" in text


def test_vectors_of_other_images(folder, tmp_path):
    np.savez(tmp_path / "few.npz", representation=np.zeros((COUNT - 1, 5), np.float32))
    text = refused(folder, tmp_path, mt_tasks={"representation": {"representation_file": str(tmp_path / "few.npz")}})
    assert f"representation_file {tmp_path / 'few.npz'}: has {COUNT - 1} vectors for the {COUNT} images" in text


@pytest.fixture(scope="module")
def partly(tmp_path_factory) -> Path:
    """`folder` with one negative less."""
    folder = write_data(tmp_path_factory.mktemp("partly"))
    next((folder / "negatives").rglob("*.png")).unlink()
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_ones_have_to_be_said(variant, partly, tmp_path):
    """Only then the network can be told, and only what was said can be drawn as absent."""
    text = refused(partly, tmp_path, mt_tasks={"paired": {}}, mt_variant=variant)
    assert f"{TASKS}.paired: some of the data have none of it; write absent: true there" in text
    told = {"mt_tasks": {"paired": {"absent": True}}, "mt_variant": variant}
    train(write_tasks(tmp_path / "b.yaml", partly, tmp_path / "b", {"total_steps": 1}, **told))


def test_items_that_lack_what_is_to_be_given_are_left_out(partly, tmp_path, capsys):
    """A grey picture in the place of one that is missing would be taken for it."""
    told = {"mt_tasks": {"paired": {"absent": True}}, "mt_variant": "any", "mt_swap_prob": 0.5}
    train(write_tasks(tmp_path / "a.yaml", partly, tmp_path / "a", {"total_steps": 1}, **told))
    words = ["--model_path", str(tmp_path / "a"), "--split", "train", "--steps", "1", "--device", "cpu"]
    for given, target, count in (("paired", "image", COUNT - 1), ("image", "paired", COUNT)):
        latent_sample.main([*words, "--given", given, "--route", "generate", "--out", str(tmp_path / given)])
        with np.load(tmp_path / given / f"{target}_of_{given}.npz") as file:
            assert len(file["arr_0"]) == count
        said = "# 1 items are left out, which lack some of paired"
        assert (said in capsys.readouterr().out) == (given == "paired")
        assert (tmp_path / given / f"{target}_truth.npz").exists() == (target == "image")


def test_stored_latents_hold_no_picture_to_mask(folder, tmp_path):
    file = write_tasks(tmp_path / "a.yaml", folder, tmp_path / "run", mt_tasks={"masked": {}})
    config = load_config(file)
    torch.manual_seed(0)
    first_stage = instantiate(config["model"]["params"]["first_stage_config"], "m")
    torch.save({"state_dict": first_stage.state_dict()}, tmp_path / "first.ckpt")
    source = instantiate(config["data"], "data").pixel_source("train")
    write_cache(source, first_stage, SIZE, tmp_path / "cache/train")
    words = (
        f"data.params.latents={tmp_path / 'cache'}",
        f"model.params.first_stage_config.params.ckpt_path={tmp_path / 'first.ckpt'}",
    )
    text = refused(folder, tmp_path, *words, mt_tasks={"masked": {}})
    assert "reads the images, but the data are stored latents; leave out data.params.latents" in text
    more = {"mt_tasks": {"label": LABEL}}
    train(write_tasks(tmp_path / "b.yaml", folder, tmp_path / "b", {"total_steps": 1}, **more), *words)


# ---------------------------------------------------------------- a run's settings, and what is asked of it


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """Three sides, of which the map may be absent, and a label, with random weights."""
    tasks = {"map": {"absent": True}, "label": LABEL}
    return write_run(tmp_path_factory.mktemp("run"), folder / "streets", mt_sides=SIDES, mt_tasks=tasks,
                     data={"sides": SIDES[:2], "computed": {"edges": "edges"}, "labels": "prefix"})  # fmt: skip


ASKED = [
    (
        ["--given", "foto"],
        r"'foto' is no side or modality of this model \(did you mean photo\?\); it has photo and map",
    ),
    (["--given", "lable=1"], r"'lable' is no side or modality of this model \(did you mean label\?\)"),
    (["--given", "label=7"], r"--given label=7: "),
    (["--target", "edge"], r"'edge' is no image of this model \(did you mean edges\?\); it has photo, map, edges"),
    (["--target", "label"], r"'label' is no image of this model; it has photo, map, edges"),
    (["--target", "map", "--given", "map"], r"'map' is given, so it can't be drawn"),
    (["--absent", "mpa"], r"--absent mpa: this model has no such modality \(did you mean map\?\); it has map, edges"),
    (["--absent", "edges"], r"--absent edges: no image lacked it in this model's training"),
    (["--absent", "map", "--target", "map"], r"'map' is to be absent, so it can't be drawn"),
    (["--absent", "map", "--given", "map"], r"'map' is to be absent, so it can't be given"),
    (
        ["--absent", "map", "--given", "photo,edges"],
        r"photo, map, edges are all given or absent; leave one of them out",
    ),
    (["--given", "photo,map,edges"], r"photo, map, edges are all given; leave one of them out"),
    (["--given", "photo,map", "--route", "read"], r"--route read: a head reads one side off another"),
]


@pytest.mark.parametrize(("words", "expected"), ASKED, ids=[" ".join(words) for words, _ in ASKED])
def test_what_cant_be_drawn(words, expected, run, tmp_path):
    with pytest.raises(UserError) as caught:
        latent_sample.main(["--model_path", str(run), "--out", str(tmp_path / "out"), "--steps", "2", *words])
    assert re.search(expected, one_line(caught)), one_line(caught)
    assert not list(tmp_path.rglob("*.npz"))


def test_an_absent_side_is_not_made(run, tmp_path):
    latent_sample.main(
        ["--model_path", str(run), "--out", str(tmp_path), "--steps", "2", "--given", "photo", "--absent", "map"]
    )
    with np.load(tmp_path / "edges_of_photo.npz") as file:
        assert set(file.files) == {"arr_0", "arr_1", "label_probabilities"}
    assert not (tmp_path / "map_truth.npz").exists() and (tmp_path / "edges_truth.npz").exists()


CHANGED = [
    ({"masked": {"mask_max_patches": 3}}, rf"{TASKS}\.masked\.mask_max_patches \(10 there, 3 here\)"),
    ({"masked": {"weights": "bridge"}}, rf"{TASKS}\.masked\.weights \(None there, bridge here\)"),
    ({"masked": {}, "label": LABEL}, rf"{TASKS}\.label\.num_classes \(None there, 3 here\)"),
    (None, rf"{TASKS}\.masked\.mask_patch \(-1 there, None here\)"),
]


def test_a_run_refuses_other_tasks(folder, tmp_path):
    """And goes on with the same, whatever of their defaults is written out."""
    written = {"masked": {"mask_max_patches": 10}}
    for steps, tasks in ((1, {"masked": {}}), (2, written)):
        train(write_tasks(tmp_path / "a.yaml", folder, tmp_path / "run", {"total_steps": steps}, mt_tasks=tasks))
    for tasks, expected in CHANGED:
        with pytest.raises(UserError, match=expected) as caught:
            train(write_tasks(tmp_path / "a.yaml", folder, tmp_path / "run", mt_tasks=tasks))
        assert str(caught.value).endswith("; repeat them to resume, or take another run.log_dir")
    saved = OmegaConf.load(tmp_path / "run/config.yaml").model.params.mt_tasks
    assert saved.masked.mask_full_prob == 0.1


def test_a_run_of_an_earlier_version_goes_on(folder, tmp_path):
    """Whose configuration says nothing of what was added since, but not with modalities that it didn't have."""
    pair = {"mt_sides": ["photo", "map"], "mt_swap_prob": 0.5}
    train(write_tasks(tmp_path / "a.yaml", folder, tmp_path / "run", {"total_steps": 1}, **pair))
    file = tmp_path / "run/checkpoints/step_00000001/config.yaml"
    config = OmegaConf.load(file)
    for key in ("mt_tasks", "mt_context_dim"):
        del config.model.params[key]
    file.write_text(OmegaConf.to_yaml(config))
    with pytest.raises(UserError, match=rf"{TASKS}\.masked\.mask_patch \(None there, -1 here\)"):
        train(write_tasks(tmp_path / "b.yaml", folder, tmp_path / "run", mt_tasks={"masked": {}}, **pair))
    train(write_tasks(tmp_path / "a.yaml", folder, tmp_path / "run", {"total_steps": 2}, **pair))
    assert (tmp_path / "run/checkpoints/step_00000002").exists()
