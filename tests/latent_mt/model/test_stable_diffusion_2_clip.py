"""The configurations of the paper's joint model of image and representation: the whole one's parts, and a run of the small one."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import progress

from guided_mt.errors import UserError
from guided_mt.modalities.tokens import VectorAsToken
from latent_mt.commands import latent_classify, latent_sample, latent_train
from latent_mt.runs.configuration import load_config
from latent_mt.runs.targets import instantiate


def test_the_papers_run_on_stable_diffusion_2():
    """Appendix E.4: SD 2's U-Net and its text stage, a head of 1024, ReLU, 1024, rate 1e-5, and 2048 images a step."""
    config = load_config("stable_diffusion_2_clip")
    params = {key: value for key, value in config["model"]["params"].items() if key != "ckpt_path"}
    with torch.device("meta"):
        model = instantiate({"target": config["model"]["target"], "params": params}, "model")
    network = model.network
    head = sum(p.numel() for p in network.heads.parameters())
    assert (
        sum(p.numel() for p in network.parameters()) - head == 865_910_724
    )  # SD 2's own: tokens and units learn nothing
    assert [str(layer) for layer in network.heads["representation"].mlp] == [
        "Linear(in_features=1280, out_features=1024, bias=True)",
        "ReLU()",
        "Linear(in_features=1024, out_features=1024, bias=True)",
    ]
    assert isinstance(network.context_in["representation"], VectorAsToken) and not network.null_token
    assert network.variant == "U" and network.image_size == 96
    assert model.cond_stage_model.layer == "penultimate" and not any(
        p.requires_grad for p in model.cond_stage_model.parameters()
    )
    trainer, data = config["lightning"]["trainer"], config["data"]["params"]
    sizes = (data["batch_size"], trainer["devices"], trainer["accumulate_grad_batches"])
    assert math.prod(sizes) == config["run"]["images_per_step"] == 2048
    assert config["model"]["learning_rate"] == 1e-5 and params["parameterization"] == "v"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for k, name in enumerate(("red", "green", "blue", "grey")):
        pixels = (rng.integers(0, 80, (64, 64, 3)) + 175 * np.eye(4)[k][:3]).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture")
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    words = [
        f"data.params.path={folder}",
        "data.params.captions=txt",
        "data.params.batch_size=2",
        "data.params.num_workers=0",
    ]
    words += [
        f"run.log_dir={run}",
        "run.total_steps=2",
        "run.sample_interval=2",
        "run.log_interval=1",
        "lightning.trainer.accelerator=cpu",
    ]
    latent_train.main(["--config", "stable_diffusion_2_clip_small", *words])
    return run


def test_the_small_one_trains_with_captions(run):
    rows = progress(run)
    assert len(rows) == 2 and all(np.isfinite(float(row["representation"])) for row in rows)
    assert "cos_representation_q3" in rows[0] and all(0 < abs(float(row["cos_representation"])) <= 1 for row in rows)
    assert list((run / "grids").glob("*.png"))


def test_what_is_drawn_says_its_text_and_what_it_was_given(run, folder, tmp_path, capsys):
    words = [
        "--model_path",
        str(run),
        "--prompt",
        "a red picture",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--fill_batches",
        "False",
    ]
    latent_sample.main([*words, "--out", str(tmp_path / "a"), "--given", f"representation={folder}"])
    assert f"# --given representation={folder}: the first 1 of 4 are taken; --num_samples" in capsys.readouterr().out
    latent_sample.main([*words, "--out", str(tmp_path / "b"), "--given", "representation", "--num_samples", "2"])
    for file, count in (("a/samples_of_representation_1.npz", 1), ("b/image_of_representation.npz", 2)):
        with np.load(tmp_path / file) as found:
            assert found["prompt"].tolist() == ["a red picture"] * count and len(found["arr_0"]) == count
    with pytest.raises(UserError, match=r"--given representation=x,representation=y: names representation twice"):
        latent_sample.main([*words, "--given", "representation=x", "--given", "representation=y"])
    with pytest.raises(
        UserError, match=r"has no label head, but one that says CLIP's vectors; write the classes by --texts"
    ):
        latent_classify.main(["--model_path", str(run), "--data_dir", str(folder)])


def test_it_classifies_by_texts(run, folder, capsys):
    out = folder / "found.npz"
    words = ["--model_path", str(run), "--data_dir", str(folder), "--texts", "red;green;blue", "--draws", "1"]
    latent_classify.main([*words, "--labelled", "False", "--timesteps", "0", "--device", "cpu", "--out", str(out)])
    with np.load(out) as found:
        assert found["probabilities"].shape == found["encoder_probabilities"].shape == (4, 3)
        assert found["representation"].shape == (4, 64) and np.abs(found["cosine"]).max() <= 1
    assert "head and encoder: the same class for" in capsys.readouterr().out


def test_it_trains_on_shards(folder, tmp_path):
    files = sorted(folder.glob("*.png"))
    for number in range(2):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w") as shard:
            for k, file in enumerate(files[2 * number : 2 * number + 2]):
                for source in (file, file.with_suffix(".txt")):
                    shard.add(source, f"{number}{k:04d}{source.suffix}")
    words = ["data.target=latent_mt.data.ShardData", f"data.params.path={tmp_path}/{{00000..00001}}.tar"]
    words += ["data.params.image_size=64", "data.params.batch_size=2", "data.params.num_workers=0"]
    words += [
        f"run.log_dir={tmp_path / 'run'}",
        "run.total_steps=1",
        "run.log_interval=1",
        "lightning.trainer.accelerator=cpu",
    ]
    latent_train.main(["--config", "stable_diffusion_2_clip_small", *words])
    (row,) = progress(tmp_path / "run")
    assert np.isfinite(float(row["representation"])) and -1 <= float(row["cos_representation"]) <= 1
