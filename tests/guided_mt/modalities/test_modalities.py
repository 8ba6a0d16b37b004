"""Vectors, random labels, and several modalities in one model: trained in each variant, and drawn with any of them given."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import adm_unet, assert_same, column, contents, flags, progress, step_folder, task_flags, words

from guided_mt.commands import export, nll, restore, sample, train
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.generation.generate import Generator
from guided_mt.modalities import Images, RandomLabel
from guided_mt.networks.model import VARIANTS
from guided_mt.training.objective import multi_task_losses

COUNT = 4
TWO, THREE = "masked,label", "masked,label,representation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("modalities")


def trained(run: Path, folder: Path, tasks: str, steps: int = 6, **values: Any) -> Path:
    """A few steps on digits, long enough that what is given changes the images; returns the run."""
    settings = {"mt_task": tasks, "lr": 5e-3, "predict_xstart": True, "ema_rate": "0", "log_interval": steps}
    train.main(flags(**{**settings, **task_flags(tasks, folder), "log_dir": run, "total_steps": steps, **values}))
    return run


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Path]:
    """Two and three modalities in each variant; those with three also learned without any."""
    return {
        f"{tasks} {variant}": trained(
            folder / f"{tasks} {variant}", folder, tasks, mt_variant=variant, mt_drop_prob=0.2 if tasks == THREE else 0
        )
        for tasks in (TWO, THREE)
        for variant in VARIANTS
    }


@pytest.fixture(scope="module")
def picture(folder) -> Path:
    """One image file: white, with its lower half masked (mid grey)."""
    pixels = np.full((8, 8, 3), 255, np.uint8)
    pixels[4:] = 127
    Image.fromarray(pixels).save(folder / "half.png")
    return folder / "half.png"


@pytest.fixture(scope="module")
def vectors(folder) -> Path:
    """One vector for each of COUNT samples."""
    np.savez(folder / "given.npz", representation=np.random.default_rng(1).normal(size=(COUNT, 5)))
    return folder / "given.npz"


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def draw(run: Path, out: Path, *more: str, **values: Any) -> dict[str, np.ndarray]:
    settings = {"model_path": run, "out": out, "num_samples": COUNT, "steps": 3, "device": "cpu", **values}
    sample.main([*words(**settings), *more])
    return arrays(out)


# ---------------------------------------------------------------- every subset given


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tasks", [TWO, THREE])
def test_any_subset_can_be_given(tasks, variant, runs, picture, vectors, tmp_path):
    """What is given comes back as it was, the rest is drawn; the images depend on it, and each subset gives other ones."""
    given = {"masked": f"masked={picture}", "label": "label=3", "representation": f"representation={vectors}"}
    names, images = tasks.split(","), []
    for subset in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)):
        found = draw(
            runs[f"{tasks} {variant}"], tmp_path / "s.npz", *(w for n in subset for w in ("--given", given[n]))
        )
        known = {*subset, "label"} if variant == "X" else set(names)  # X draws nothing but images; its labels are given
        expected = {"arr_0"} | {"arr_1" if name == "label" else name for name in known}
        if variant != "X" and "label" not in subset:
            expected.add("label_probabilities")
        assert set(found) == expected, subset
        assert all(len(array) == COUNT for array in found.values())
        assert found["arr_0"].dtype == np.uint8 and found["arr_1"].dtype == np.int64
        if "label" in subset:
            assert (found["arr_1"] == 3).all()
        else:
            assert set(found["arr_1"]) <= set(range(10))
        if "label_probabilities" in found:
            np.testing.assert_allclose(found["label_probabilities"].sum(1), 1, rtol=1e-5)
            np.testing.assert_array_equal(found["label_probabilities"].argmax(1), found["arr_1"])
        if "masked" in subset:
            np.testing.assert_array_equal(found["masked"][2], np.asarray(Image.open(picture)))
        elif "masked" in found:
            assert found["masked"].dtype == np.uint8 and found["masked"].shape == (COUNT, 8, 8, 3)
        if "representation" in subset:
            np.testing.assert_array_equal(found["representation"], arrays(vectors)["representation"].astype(np.float32))
        elif "representation" in found:
            assert np.isfinite(found["representation"]).all() and found["representation"].shape == (COUNT, 5)
        images.append(found["arr_0"])
    assert all((a != b).any() for a, b in itertools.combinations(images, 2))


def test_the_ways_to_write_given(runs, picture, tmp_path):
    run = runs[f"{TWO} any"]
    repeated = draw(run, tmp_path / "a.npz", "--given", "label=7", "--given", f"masked={picture}")
    joined = draw(run, tmp_path / "b.npz", "--given", f"label=7,masked={picture}")
    equals = draw(run, tmp_path / "c.npz", f"--given=masked={picture}", "--given=label=7")
    assert_arrays(repeated, joined)
    assert_arrays(repeated, equals)


def assert_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_labels_by_name_and_from_files(folder, tmp_path):
    data = tmp_path / "animals"
    for number, name in enumerate(("ant", "bee", "cow")):
        (data / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 80 * number + i, np.uint8)).save(data / name / f"{i}.png")
    run = trained(tmp_path / "run", folder, "label", 1, mt_variant="X", data_dir=data, num_classes=3)
    assert (draw(run, tmp_path / "s.npz", "--given", "label=cow")["arr_1"] == 2).all()
    assert (draw(run, tmp_path / "s.npz", "--given", "label=1")["arr_1"] == 1).all()
    earlier = draw(run, tmp_path / "earlier.npz", num_samples=16)["arr_1"]
    assert set(earlier) == {0, 1, 2}
    again = draw(run, tmp_path / "s.npz", "--given", f"label={tmp_path / 'earlier.npz'}", num_samples=16)
    np.testing.assert_array_equal(again["arr_1"], earlier)
    np.testing.assert_array_equal(again["arr_0"], arrays(tmp_path / "earlier.npz")["arr_0"])  # X had drawn these labels
    sample.main([*words(model_path=run, out=tmp_path / "s.npz", num_samples=2, steps=2), "--class", "bee"])
    assert arrays(tmp_path / "s.npz")["arr_1"].tolist() == [1, 1]
    for key in ("labels", "label"):
        np.savez(tmp_path / "ids.npz", **{key: np.array([2, 0, 1, 1], np.int32)})
        assert draw(run, tmp_path / "s.npz", "--given", f"label={tmp_path / 'ids.npz'}")["arr_1"].tolist() == [
            2,
            0,
            1,
            1,
        ]


@pytest.mark.parametrize("variant", ["X", "U"])
def test_only_classes_that_the_images_had_are_drawn(variant, folder, tmp_path):
    """--num_classes may be larger than what the data has, as with ADM's default of 1000; the rest was never trained."""
    run = trained(tmp_path / "run", folder, "label", 1, mt_variant=variant, num_classes=1000)
    generator = load(run)
    streams = SampleStreams(torch.arange(64))
    assert generator.modalities["label"].default(streams).max() < 10
    assert generator.modalities["label"].prior((3, 8, 8), streams)[:, 10:].sum() == 0
    if variant == "X":
        assert draw(run, tmp_path / "s.npz", num_samples=32, steps=1)["arr_1"].max() < 10


def test_masked_images_from_every_kind_of_file(runs, picture, tmp_path):
    """One image file for all samples; a folder, an .npz, what image_restore and image_sample wrote, for one each."""
    run = runs[f"{TWO} X"]
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "four").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "four" / f"{i}.png")
    np.savez(tmp_path / "arr.npz", arr_0=pixels)
    np.savez(tmp_path / "named.npz", arr_0=255 - pixels, masked=pixels)
    for name in ("four", "arr.npz", "named.npz"):
        found = draw(run, tmp_path / "s.npz", "--given", f"masked={tmp_path / name}")
        np.testing.assert_array_equal(found["masked"], pixels, err_msg=name)
    Image.fromarray(np.asarray(Image.open(picture)).repeat(3, 0).repeat(3, 1)).save(tmp_path / "large, with comma.png")
    large = draw(run, tmp_path / "s.npz", "--given", f"masked={tmp_path / 'large, with comma.png'},label=3")["masked"]
    assert (large[:, :3] > 240).all() and (abs(large[:, 5:].astype(int) - 127) < 15).all()

    out = tmp_path / "restored.npz"
    restore.main(words(model_path=run, out=out, data_dir="builtin:digits-test", num_samples=COUNT, steps=2))
    given = draw(run, tmp_path / "s.npz", "--given", f"masked={out}")["masked"]
    np.testing.assert_array_equal(given, arrays(out)["masked"])


def test_label_draw_follows_the_probabilities(runs, tmp_path):
    number = 200
    found = draw(
        runs[f"{TWO} U"], tmp_path / "s.npz", "--label_draw", "True", num_samples=number, steps=1, batch_size=number
    )
    drawn, probabilities = found["label_draw"], found["label_probabilities"]
    assert drawn.dtype == np.int64 and drawn.min() >= 0 and drawn.max() < 10
    expected, spread = probabilities.mean(0), np.sqrt((probabilities * (1 - probabilities)).sum(0)) / number
    assert (np.abs(np.bincount(drawn, minlength=10) / number - expected) < 4 * spread + 1e-9).all()
    given = draw(runs[f"{TWO} U"], tmp_path / "g.npz", "--label_draw", "True", "--given", "label=3")
    assert "label_draw" not in given  # nothing to draw


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("variant", ["X", "any"])
def test_guidance_strengthens_what_is_given(variant, runs, tmp_path):
    """1 is off, 0 is the model without its condition, more goes further; the same in every batch."""
    run = runs[f"{THREE} {variant}"]
    words_given = ("--given", "label=3")
    images = {
        scale: draw(run, tmp_path / f"{scale}.npz", *words_given, guidance_scale=scale)["arr_0"].astype(float)
        for scale in (0, 1, 2, 4)
    }
    np.testing.assert_array_equal(images[1], draw(run, tmp_path / "off.npz", *words_given)["arr_0"])
    if variant == "X":  # in form any, what is unknown depends on what is given, and stands in the frame
        other = draw(run, tmp_path / "other.npz", "--given", "label=8", guidance_scale=0)["arr_0"]
        np.testing.assert_array_equal(images[0], other)
    distance = [np.abs(images[scale] - images[0]).mean() for scale in (1, 2, 4)]
    assert 0 < distance[0] < distance[1] < distance[2]
    few = draw(run, tmp_path / "few.npz", *words_given, guidance_scale=4, batch_size=3)["arr_0"]
    np.testing.assert_array_equal(few, images[4])


def test_guidance_of_classes(folder, tmp_path):
    """--class_cond True with --mt_drop_prob; a model that never learned without its classes warns."""
    for drop, name in ((0.3, "dropped"), (0, "always")):
        run = trained(tmp_path / name, folder, "none", class_cond=True, num_classes=10, mt_drop_prob=drop)
        plain = draw(run, tmp_path / "plain.npz", "--class", "3")["arr_0"]
        guided = draw(run, tmp_path / "guided.npz", "--class", "3", guidance_scale=3)["arr_0"]
        assert (plain != guided).any()


# ---------------------------------------------------------------- the other commands


@pytest.mark.parametrize("variant", VARIANTS)
def test_restoration_and_likelihood_with_several_modalities(variant, runs, tmp_path):
    run = runs[f"{TWO} {variant}"]
    common = {"model_path": run, "data_dir": "builtin:digits-test", "num_samples": COUNT, "device": "cpu"}
    found = []
    for size in (16, 3):
        restore.main(words(**common, out=tmp_path / "r.npz", mask="half", steps=3, batch_size=size))
        found.append(arrays(tmp_path / "r.npz"))
    assert_arrays(*found)
    assert (found[0]["restored"][:, :, 4:] != found[0]["masked"][:, :, 4:]).any()

    nll.main(words(**common, out=tmp_path / "n.npz", timestep_respacing="4"))
    terms = arrays(tmp_path / "n.npz")
    assert {"L2_masked", "L2_label", "total_bpd", "L0_prior_bpd", "L1_denoising_bpd", "L3_decoder_bpd"} == set(terms)
    assert all(np.isfinite(values).all() and len(values) == COUNT for values in terms.values())


def test_restoration_asks_for_no_classes(runs, tmp_path):
    """A model of images, masked images and labels restores photos of any name: it reads no label of them."""
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 90 * i, np.uint8)).save(tmp_path / f"IMG_{i}.png")
    run = runs[f"{TWO} U"]
    restore.main(words(model_path=run, data_dir=tmp_path, out=tmp_path / "r.npz", steps=2, num_samples=2))
    assert len(arrays(tmp_path / "r.npz")["restored"]) == 2


def test_likelihood_with_vectors_beside_the_test_images(runs, tmp_path):
    run = runs[f"{THREE} U"]
    common = {"model_path": run, "data_dir": "builtin:digits-test", "num_samples": 3, "out": tmp_path / "n.npz"}
    with pytest.raises(UserError, match=r"has 1437 vectors for the 360 images of builtin:digits-test"):
        nll.main(words(**common, timestep_respacing="2"))
    np.save(tmp_path / "test.npy", np.zeros((360, 5), np.float32))
    nll.main(words(**common, timestep_respacing="2", representation_file=tmp_path / "test.npy"))
    assert np.isfinite(arrays(tmp_path / "n.npz")["L2_representation"]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_preview_grids_show_every_modality(variant, folder, tmp_path):
    """A row of samples; per modality the images, it as far as it can be shown, and what the model draws given it."""
    run = trained(tmp_path, folder, TWO, 1, mt_variant=variant, sample_interval=1, diffusion_steps=4)
    with Image.open(run / "grids" / "step_00000001.png") as grid:
        width, height = grid.size
        pixels = np.asarray(grid)
    assert (width, height) == (16 * 66 + 2, 6 * 66 + 2)
    rows = [pixels[2 + 66 * i : 66 + 66 * i] for i in range(6)]
    np.testing.assert_array_equal(rows[1], rows[4])  # the originals
    assert (rows[1] != rows[2]).any() and (rows[3] != rows[5]).any()


# ---------------------------------------------------------------- ADM's checkpoints in and out, M* and E*


@pytest.mark.parametrize("variant", VARIANTS)
def test_adm_weights_in_and_out(variant, folder, tmp_path, capsys):
    """An ADM .pt starts a label model; exported, the U-Net has exactly ADM's keys and, with a rate of zero, its weights."""
    state = adm_unet().state_dict()
    torch.save(state, tmp_path / "adm.pt")
    run = trained(tmp_path / "run", folder, "label", 1, lr=0, mt_variant=variant, resume_checkpoint=tmp_path / "adm.pt")
    own = contents(step_folder(run, 1))["model.safetensors"]
    assert any(".encoder_kv." in key for key in own) and "context_in.label.weight" in own
    export.main(words(model_path=run, out=tmp_path / "back.pt"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same(back, dict(state))
    adm_unet().load_state_dict(back)
    assert "left out: context_in, heads" in capsys.readouterr().out


def test_the_loaded_adm_model_is_the_pure_pass(folder, tmp_path):
    """What a label model says without any modality is what ADM's model says, to the bit."""
    unet = adm_unet()
    torch.save(unet.state_dict(), tmp_path / "adm.pt")
    run = trained(tmp_path / "run", folder, "label", 1, lr=0, mt_variant="U", resume_checkpoint=tmp_path / "adm.pt")
    generator = load(run)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 30])
    with torch.no_grad():
        assert torch.equal(generator.model(x, t, unconditional=True).output, unet(x, t))


def load(run: Path) -> Generator:
    from guided_mt.commands.console import with_saved_config

    return Generator.load(with_saved_config(words(model_path=run), sample.SECTIONS, ""), torch.device("cpu"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_joint_run_continues_as_a_generator(variant, runs, folder, tmp_path):
    """M*: --mt_task none from a joint run takes its U-Net to the bit and leaves the rest."""
    joint = contents(step_folder(runs[f"{TWO} {variant}"], 6))["model.safetensors"]
    run = trained(tmp_path, folder, "none", 1, lr=0, resume_checkpoint=runs[f"{TWO} {variant}"])
    alone = contents(step_folder(run, 1))["model.safetensors"]
    assert alone.keys() == adm_unet().state_dict().keys()
    assert_same({key: joint[key] for key in alone}, alone)
    assert draw(run, tmp_path / "s.npz").keys() == {"arr_0"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_every_modality_is_adms_training(variant, folder, tmp_path):
    """--mt_drop_prob 1: the losses of every step are those of --mt_task none."""
    joint = trained(
        tmp_path / "joint", folder, "label,representation", 3, mt_variant=variant, mt_drop_prob=1, log_interval=1
    )
    alone = trained(tmp_path / "alone", folder, "none", 3, log_interval=1)
    assert column(joint, "mse") == column(alone, "mse") and column(joint, "vb") == column(alone, "vb")


def test_measuring_conflict_changes_nothing(folder, tmp_path):
    seen = {}
    for interval in (0, 2):
        run = trained(tmp_path / str(interval), folder, TWO, 3, mt_conflict_interval=interval, dropout=0.1)
        seen[interval] = contents(step_folder(run, 3))["model.safetensors"]
    assert_same(seen[0], seen[2])
    assert "grad_cos_denoising_label" in progress(tmp_path / "2")[-1]


# ---------------------------------------------------------------- vectors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["representation", "random-label"])
def test_other_modalities_train_and_sample(task, variant, folder, tmp_path):
    run = trained(tmp_path / "run", folder, task, 2, mt_variant=variant, mt_weights="bridge", mt_encoding_norm="rms")
    assert all(np.isfinite(column(run, task)))
    found = draw(run, tmp_path / "s.npz")
    if task == "representation":
        assert found.keys() == {"arr_0"} | ({"representation"} if variant != "X" else set())
        given = draw(run, tmp_path / "g.npz", "--given", f"representation={folder / 'vectors.npz'}")["representation"]
        np.testing.assert_array_equal(given, arrays(folder / "vectors.npz")["representation"][:COUNT])
        np.savez(tmp_path / "one.npz", np.arange(5, dtype=np.float64)[None])  # arr_0, float64
        one = draw(run, tmp_path / "g.npz", "--given", f"representation={tmp_path / 'one.npz'}")["representation"]
        np.testing.assert_array_equal(one, np.tile(np.arange(5, dtype=np.float32), (COUNT, 1)))
    else:
        assert found["random-label"].dtype == np.int64 and "arr_1" not in found
        assert (draw(run, tmp_path / "g.npz", "--given", "random-label=3")["random-label"] == 3).all()


def test_random_labels_know_nothing_of_the_image(folder, tmp_path):
    """Every image gets all labels alike, whatever its class, and it needs no class."""
    count = 20_000
    classes = torch.arange(count) % 10
    drawn = RandomLabel(10).from_batch(Images(torch.zeros(count, 3, 1, 1), classes), SampleStreams(torch.arange(count)))
    table = torch.zeros(10, 10).index_put_((classes, drawn), torch.ones(count), accumulate=True)
    assert (table - count / 100).abs().max() < 5 * (count / 100) ** 0.5
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8))
    run = trained(tmp_path / "run", folder, "random-label", 1, data_dir=tmp_path / "plain.npz")
    assert np.isfinite(column(run, "random-label")[0])


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_vector_i_belongs_to_image_i(kind, folder, tmp_path, monkeypatch):
    """Through the shuffled order, worker processes, and the image that takes the place of a broken one."""
    count = 24
    vectors = np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] * 10, (count, 8, 8, 3))
    data = tmp_path / ("data.npz" if kind == "npz" else "data")
    if kind == "npz":
        np.savez(data, arr_0=pixels)
    else:
        data.mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(data / f"{i:02d}.png")
        (data / "07.png").write_bytes(b"broken")
    true_losses, seen = multi_task_losses, []

    def watching(network, diffusion, modalities, images, *args, **kwargs):
        number = ((images.x_start[:, 0, 0, 0] + 1) * 127.5 / 10).round()
        seen.append((number, images.loaded["representation"]))
        return true_losses(network, diffusion, modalities, images, *args, **kwargs)

    monkeypatch.setattr("guided_mt.training.step.multi_task_losses", watching)
    values = {"data_dir": data, "representation_file": tmp_path / "v.npy", "data_workers": 1, "microbatch": 3}
    trained(tmp_path / "run", folder, "representation", 6, mt_variant="any", **values)
    numbers = torch.cat([number for number, _ in seen])
    assert torch.equal(numbers, torch.cat([vector[:, 0] for _, vector in seen]))
    assert len(numbers) == 48 and numbers[:24].tolist() != sorted(numbers[:24].tolist())
    assert sorted(set(numbers.int().tolist())) == [i for i in range(count) if kind == "npz" or i != 7]


def test_the_file_is_not_needed_to_sample(folder, tmp_path):
    """The width of the vectors is saved with the model."""
    np.save(tmp_path / "v.npy", np.zeros((1437, 3), np.float16))
    run = trained(tmp_path / "run", folder, "representation", 1, mt_variant="U", representation_file=tmp_path / "v.npy")
    (tmp_path / "v.npy").unlink()
    assert "representation_size: 3" in (run / "config.yaml").read_text()
    assert draw(run, tmp_path / "s.npz")["representation"].shape == (COUNT, 3)
