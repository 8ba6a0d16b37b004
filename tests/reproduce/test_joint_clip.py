"""The small experiment of image and CLIP representation: all its stages once, its small CLIP, and its scores."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from safetensors.torch import load_file

from guided_mt.errors import UserError
from guided_mt.runs.config import parse
from reproduce.joint_clip import experiment, main, scores, tiny_clip
from reproduce.seeds import training_seeds

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (120, 120, 120)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 pixel pictures of four colours with captions, sixteen to train and four held out."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = [("file", "caption")]
    for split, each in (("train", 4), ("test", 1)):
        (folder / split).mkdir()
        for k in range(each):
            for name, colour in COLOURS.items():
                pixels = np.clip(np.array(colour) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{name}_{k}.png")
                rows.append((f"{split}/{name}_{k}.png", f"a {name} square"))
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_all_stages(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "run_child", warm.run_child)
    monkeypatch.setattr(experiment, "CALLS", 2)
    words = ["--data_dir", str(data), "--out", str(tmp_path), "--seeds", "0", "--steps", "1", "--first_steps", "1"]
    words += ["--clip_steps", "2", "--draws", "1"]
    main(words)
    with open(tmp_path / "seeds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [*experiment.Experiment.REFERENCES, *experiment.KINDS]
    assert all(np.isfinite(float(row["kid"])) for row in rows)
    assert [bool(row["head"]) for row in rows] == [False, False, False, True]
    assert "| image and representation |" in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (12 * 66 + 2, 3 * 66 + 2)
    assert len(capsys.readouterr().out.split("$ mt-diffusion latent-train")) == 3

    monkeypatch.setattr(experiment, "run_child", lambda *words, **options: pytest.fail("all is there already"))
    main(words)
    for flag, value in (("clip_steps", 3), ("guidance_scale", 1), ("first_steps", 2)):
        with pytest.raises(
            UserError, match=rf"was begun with --{flag} [0-9.]+, not [0-9.]+; repeat that, or take another"
        ):
            main([*words, f"--{flag}", str(value)])


def test_a_model_that_was_trained_for_longer(data, tmp_path, monkeypatch):
    """Its newest weights would be taken for those of fewer steps."""
    config = parse(
        ["--data_dir", str(data), "--out", str(tmp_path), "--steps", "1"], (experiment.EmojiConfig,), description=""
    )
    model = experiment.Experiment(config, *(experiment.Split.of(str(data), name) for name in ("train", "test")))
    monkeypatch.setattr(model, "_run", lambda *words: None)
    with pytest.raises(UserError, match=r"image_alone_0: was trained for more than --steps 1 already; take more"):
        model.drawn("image alone", 0)


def test_a_stage_that_fails(data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "run_child", lambda words, **options: 7)
    with pytest.raises(UserError, match=r"autoencoder-train ended with exit code 7; .*log\.txt says why"):
        main(["--data_dir", str(data), "--out", str(tmp_path)])


@pytest.mark.parametrize("text", ["", "a", "0,0", "0-2", "-1"])
def test_seeds_that_are_none(text):
    with pytest.raises(UserError, match="write different whole numbers"):
        training_seeds(text)


def test_the_small_clip_learns_and_repeats(data, tmp_path):
    train, test = (experiment.Split.of(str(data), name) for name in ("train", "test"))
    assert test.captions == [f"a {name} square" for name in sorted(COLOURS)]
    for name in ("one", "two"):
        tiny_clip.train_clip(train.pictures, train.captions, 12, 0, tmp_path / f"{name}.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    clip = tiny_clip.TinyCLIP(tmp_path / "one.safetensors")
    similar = clip.images(test.pictures) @ clip.texts(test.captions).T
    assert (similar.argmax(dim=1) == torch.arange(4)).float().mean() >= 0.75


def test_scores():
    """The same set is at distance 0; a shift of the mean by d is at d^2; a caption that is drawn is the nearest."""
    vectors = torch.nn.functional.normalize(torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    found = scores.distances(vectors, vectors + 0.1)
    assert found["fd"] == pytest.approx(8 * 0.01, rel=1e-6) and found["kid"] > 0
    assert scores.distances(vectors, vectors)["fd"] == pytest.approx(0, abs=1e-9)
    same = scores.agreement(vectors[:20], vectors[:20], vectors[:20])
    assert same["agreement"] == pytest.approx(1, abs=1e-6) and same["top5"] == 1
    other = scores.agreement(-vectors[:20], vectors[:20], vectors[:20])
    assert other["agreement"] == pytest.approx(-1, abs=1e-6) and other["top5"] == 0
