"""The experiment of transfer: its rows, all its stages once, what is measured on held-out images, and the gains of its picture."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
import warm
from omegaconf import OmegaConf
from PIL import Image
from tiny import MODEL, words

from evaluations.tables.seeds import Measured
from guided_mt.commands.console import with_saved_config
from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError
from guided_mt.generation.generate import Generator
from guided_mt.runs.config import SampleConfig
from reproduce.transfer import experiment, held_out, main
from reproduce.transfer.heat_map import gain
from reproduce.transfer.rows import ALL, IMAGE, METHODS, UNFRAMED, rows_of, unframed_images

COMMON = {**MODEL, "diffusion_steps": 40, "noise_schedule": "cosine", "mt_variant": "any", "mt_drop_prob": 0.5}
COMMON |= {"global_batch_size": 8, "log_interval": 1, "mt_conflict_interval": 1, "ema_rate": 0.5}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve digits to train on and eight that are held out."""
    folder, digits = tmp_path_factory.mktemp("images"), load_images(open_source("builtin:digits"), 8, 20)
    for name, part in (("train", slice(0, 12)), ("test", slice(12, 20))):
        pixels = digits.images[part].permute(0, 2, 3, 1).numpy()
        np.savez(folder / f"{name}.npz", arr_0=pixels, arr_1=digits.labels[part].numpy() % 2)
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The experiment's folder, and the words that made it."""
    out = tmp_path_factory.mktemp("transfer")
    argv = [
        "--data_dir",
        str(images / "train.npz"),
        "--val_data_dir",
        str(images / "test.npz"),
        "--out",
        str(out / "out"),
    ]
    argv += ["--tasks", "masked,label", "--rows", "alone,unframed,each,all", "--seeds", "0,1"]
    argv += ["--steps", "2", "--samples", "4"]
    argv += ["--judge_steps", "1", "--jobs", "2", "--device", "cpu", *words(**COMMON)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "run_child", warm.run_child)
        patch.setattr(experiment, "CALLS", 2)
        main(argv)
    return out / "out", argv


def test_all_stages(finished, monkeypatch):
    out, argv = finished
    with open(out / "seeds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["seed"]) for row in rows] == [
        (name, seed) for name in (IMAGE, UNFRAMED, "+ masked", "+ label", ALL) for seed in "01"
    ]
    for row in rows:
        assert all(np.isfinite(float(row[name])) for name in ("image", "image_q3", "FD", "KID x 1000"))
        assert bool(row["label accuracy"]) == ("label" in row["row"] or row["row"] == ALL)
        assert bool(row["restoration error"]) == ("masked" in row["row"] or row["row"] == ALL)
        assert bool(row["gradient cosine, denoising and masked"]) == bool(row["restoration error"])
    saved = [out / row.folder / "seed_0" / "config.yaml" for row in rows_of((), "alone,unframed", 4)]
    sizes = [OmegaConf.load(file).global_batch_size for file in saved]
    assert sizes == [8, 4]  # half of it, as --mt_drop_prob 0.5 has it
    table = (out / "table.md").read_text()
    assert f"| {ALL} |" in table and "denoising and label" in table
    with Image.open(out / "transfer.png") as picture:
        assert picture.width > 300
    monkeypatch.setattr(experiment, "run_child", lambda *words, **options: pytest.fail("all is there already"))
    main(argv)
    with pytest.raises(UserError, match=r"was begun with --mt_variant any, not U; repeat that"):
        main([*argv, "--mt_variant", "U"])


def test_the_plain_loss_is_that_of_the_network_alone(finished, images):
    """With an image alone it is the squared error of the noise, here computed anew; a joint model without frame and conditions
    has the same noise and the same timesteps."""
    out, _ = finished
    argv = ["--model_path", str(out / "image-alone" / "seed_0"), "--device", "cpu"]
    generator = Generator.load(with_saved_config(argv, (SampleConfig,), ""), torch.device("cpu"))
    loaded = load_images(open_source(str(images / "test.npz")), 8)
    x, process, total = from_uint8(loaded.images), generator.process, []
    for number in range(8):
        t = torch.full((len(x),), int((number + 0.5) * process.num_timesteps / 8))
        streams = held_out.SampleStreams(torch.arange(len(x)) + number * held_out.SPREAD, index=held_out.Stream.INPUT)
        noise = streams.normal(*x.shape[1:])
        with torch.no_grad():
            seen = generator.model(process.q_sample(x, t, noise), process.model_timesteps(t)).output[:, :3]
        total.append(float(((seen - noise) ** 2).mean()))
    found = json.loads(next((out / "image-alone" / "seed_0").glob("transfer_*.json")).read_text())
    assert found["image"] == pytest.approx(np.mean(total), rel=1e-5)
    assert found["image_q0"] == pytest.approx(np.mean(total[:2]), rel=1e-5)


def test_rows():
    tasks = ["masked", "label", "caption"]
    assert [row.name for row in rows_of(tasks, "alone,unframed,each,pairs,all,routing", 4)] == [
        *(IMAGE, UNFRAMED, "+ masked", "+ label", "+ caption"),
        *("+ masked, label", "+ masked, caption", "+ label, caption"),
        *(ALL, f"{ALL}, routing"),
    ]
    assert rows_of(tasks, "alone", 0)[0].words == ["--mt_task", "none"]
    assert rows_of(tasks, "nash", 0)[0].words == ["--mt_task", "masked,label,caption", *METHODS["nash"]]
    folders = [row.folder for row in rows_of(tasks, "alone,unframed,each,pairs,all,nash,min-snr", 4)]
    assert len(set(folders)) == len(folders) and all("/" not in folder and " " not in folder for folder in folders)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "alone,twice"], "'twice' is none of alone, unframed, each"),
        (["--rows", "all", "--tasks", "label"], "names no model of label"),
        (["--rows", "unframed"], "with --mt_drop_prob 0 no model with tasks sees an image without a frame"),
        (["--tasks", "masked,labels"], "'labels' is none of masked"),
        (["--mt_task", "label"], "--mt_task is set by transfer"),
        (["--seeds", "0,0"], "different whole numbers"),
        (["--imagesize", "8"], "unknown flag --imagesize"),
    ],
)
def test_bad_words(words, message, images):
    with pytest.raises(UserError, match=message):
        main(["--data_dir", str(images / "train.npz"), "--val_data_dir", str(images / "test.npz"), *words])


@pytest.mark.parametrize(
    ("batch", "drop_prob", "images"), [(64, 0.2, 13), (8, 0.5, 4), (2, 0.1, 1), (16, 0.0, 0), (16, 1.0, 16)]
)
def test_unframed_images(batch, drop_prob, images):
    assert unframed_images(batch, drop_prob) == images


def test_gain():
    """By seed: a smaller loss is a gain, a larger accuracy too; the error is that of the mean of the seeds' differences."""
    results = [Measured("a", seed, {"loss": 2.0, "label accuracy": 0.5}) for seed in (0, 1)]
    results += [Measured("b", seed, {"loss": 1.0 + seed, "label accuracy": 0.6}) for seed in (0, 1)]
    assert gain(results, "b", "a", "loss") == pytest.approx((25.0, 25.0))
    assert gain(results, "b", "a", "label accuracy") == pytest.approx((20.0, 0.0))
    assert gain(results, "b", "a", "none") is None
