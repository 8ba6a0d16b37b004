"""Sampling, restoration, likelihood and export on tiny trained runs, through the commands themselves."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import BIN, MODEL, PROCESS, adm_unet, finish_group, flags, start, wait_for, words

from guided_mt.commands import export, nll, restore, sample, train
from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.errors import UserError
from guided_mt.generation import sharded
from guided_mt.generation.restoration import METHODS
from guided_mt.runs.checkpoint import checkpoints

COUNT = 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Trained a little: X (class-conditional), U, and the single-task model."""
    folder = tmp_path_factory.mktemp("runs")
    values = {"total_steps": 30, "lr": 2e-3, "ema_rate": "0.5,0.9", "global_batch_size": 16}
    rows = {
        "X": {"mt_variant": "X"},
        "U": {"mt_variant": "U"},
        "none": {"mt_task": "none"},
        "classes": {"mt_variant": "X", "class_cond": True, "num_classes": 10},
    }
    for name, row in rows.items():
        train.main(flags(log_dir=folder / name, **values, **row))
    return {name: folder / name for name in rows}


@pytest.fixture(scope="module")
def adm_file(tmp_path_factory) -> Path:
    """A checkpoint as ADM releases them: half precision, no configuration beside it."""
    file = tmp_path_factory.mktemp("adm") / "8x8_diffusion.pt"
    torch.save({key: value.half() for key, value in adm_unet().state_dict().items()}, file)
    return file


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def draw(run: Path, out: Path, **values) -> dict[str, np.ndarray]:
    settings = {"model_path": run, "out": out, "num_samples": COUNT, "steps": 3, "device": "cpu", **values}
    sample.main(words(**settings))
    return arrays(out)


def restored(run: Path, out: Path, *more: str, **values) -> dict[str, np.ndarray]:
    settings = {"model_path": run, "out": out, "data_dir": "builtin:digits-test", "num_samples": COUNT, "steps": 3}
    restore.main([*words(**{**settings, "device": "cpu", **values}), *more])
    return arrays(out)


def likelihood(run: Path, out: Path, **values) -> dict[str, np.ndarray]:
    settings = {"model_path": run, "out": out, "data_dir": "builtin:digits-test", "num_samples": COUNT}
    nll.main(words(**{**settings, "timestep_respacing": "8", "device": "cpu", **values}))
    return arrays(out)


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", ["X", "U", "none", "classes"])
def test_samples_are_as_adm_writes_them(name, runs, tmp_path):
    out = tmp_path / "s.npz"
    found = draw(runs[name], out)
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (COUNT, 8, 8, 3)
    assert found["arr_0"].std() > 10
    assert ("arr_1" in found) == (name == "classes")
    assert ("masked" in found) == (name == "U")  # X was given the complete mask, which is no result
    if name == "U":
        assert found["masked"].dtype == np.uint8 and found["masked"].shape == (COUNT, 8, 8, 3)
    if name == "classes":
        assert found["arr_1"].shape == (COUNT,) and found["arr_1"].dtype == np.int64
        assert found["arr_1"].min() >= 0 and found["arr_1"].max() < 10 and len(set(found["arr_1"])) > 1
    with Image.open(out.with_suffix(".png")) as grid:
        assert grid.mode == "RGB"
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["classes", "U"])
def test_sample_k_is_the_same_in_every_batch(name, sampler, runs, tmp_path):
    values = {"sampler": sampler, "eta": 0.5}
    whole = draw(runs[name], tmp_path / "whole.npz", batch_size=16, **values)
    assert_equal(whole, draw(runs[name], tmp_path / "few.npz", batch_size=3, **values))
    chosen = draw(runs[name], tmp_path / "seeds.npz", seeds="7,2-4", num_samples=4, **values)
    assert_equal({key: value[[7, 2, 3, 4]] for key, value in whole.items()}, chosen)
    assert (whole["arr_0"][0] != whole["arr_0"][1]).any()


@pytest.mark.parametrize("script", ["image_sample.py", "image_nll.py"])
def test_two_processes_write_the_same_file(script, runs, tmp_path):
    """Sampling and likelihood; an odd number of batches, so that one process has fewer."""
    if script == "image_sample.py":
        one = draw(runs["U"], tmp_path / "one.npz", batch_size=4)
        argv = {"num_samples": COUNT, "steps": 3, "batch_size": 4}
    else:
        one = likelihood(runs["U"], tmp_path / "one.npz", batch_size=4)
        argv = {"num_samples": COUNT, "batch_size": 4, "data_dir": "builtin:digits-test", "timestep_respacing": "8"}
    out = tmp_path / "two.npz"
    finish_group(script, words(model_path=runs["U"], out=out, device="cpu", **argv))
    two = arrays(out)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=0 if one[name].dtype == np.uint8 else 1e-6, err_msg=name)


def test_killed_sampling_goes_on_where_it_was(runs, tmp_path, monkeypatch):
    """kill -9 after the first part: the same command finishes the same file, other settings are refused."""
    values = {"num_samples": 6, "steps": 40, "sampler": "ddpm", "batch_size": 1}
    out, parts = tmp_path / "killed.npz", tmp_path / "killed.npz.parts"
    process = start("image_sample.py", words(model_path=runs["X"], out=out, device="cpu", **values))
    wait_for(lambda: (parts / "00000000.npz").exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert not (parts / "00000005.npz").exists(), "killed too late to show anything"

    with pytest.raises(UserError, match=r"other settings.*steps was 40.*remove the folder"):
        draw(runs["X"], out, **{**values, "steps": 30})
    written = []
    save_npz = sharded.save_npz
    monkeypatch.setattr(sharded, "save_npz", lambda path, made: written.append(path.name) or save_npz(path, made))
    resumed = draw(runs["X"], out, **values)
    assert "00000000.npz" not in written and "00000005.npz" in written
    assert_equal(resumed, draw(runs["X"], tmp_path / "whole.npz", **values))


def test_damaged_part_is_made_again(runs, tmp_path, monkeypatch):
    values = {"batch_size": 4}
    whole = draw(runs["X"], tmp_path / "whole.npz", **values)
    out = tmp_path / "broken.npz"
    with monkeypatch.context() as patch:
        patch.setattr(sample.Generator, "draw", _stop_at_second(sample.Generator.draw))
        with pytest.raises(KeyboardInterrupt):
            draw(runs["X"], out, **values)
    part = tmp_path / "broken.npz.parts" / "00000000.npz"
    part.write_bytes(part.read_bytes()[:-50])
    assert_equal(whole, draw(runs["X"], out, **values))


def _stop_at_second(true_draw):
    calls = []

    def draw_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_draw(*args, **kwargs)

    return draw_once


def test_refused_command_does_not_block_the_next(runs, tmp_path):
    out = tmp_path / "s.npz"
    with pytest.raises(UserError, match="this model has 10 classes"):
        draw(runs["classes"], out, class_name="11")
    found = draw(runs["classes"], out, class_name="3")
    assert (found["arr_1"] == 3).all()


def test_chosen_class_average_and_output_place(runs, capsys):
    run = runs["classes"]
    sample.main(
        [*words(model_path=run, num_samples=2, steps=2, device="cpu", ema="none"), "--class", "7", "--use_ddim", "True"]
    )
    found = arrays(run / "samples" / "samples_2x8x8x3.npz")
    assert found["arr_1"].tolist() == [7, 7]
    assert "samples_2x8x8x3.npz: arr_0 uint8 [2, 8, 8, 3], arr_1 int64 [2]" in capsys.readouterr().out
    averages = [
        draw(run, run / f"average{ema}.npz", ema=ema, num_samples=2)["arr_0"] for ema in ("none", "0.5", "0.9", "")
    ]
    assert (averages[0] != averages[1]).any() and (averages[1] != averages[2]).any()
    np.testing.assert_array_equal(averages[2], averages[3])  # the slowest is the default
    newest = checkpoints(run)[-1]
    for path in (newest, newest / "ema_0.9.safetensors"):  # a checkpoint, or a file, is as good as the run
        np.testing.assert_array_equal(draw(path, run / "path.npz", num_samples=2)["arr_0"], averages[2])


def test_adm_file_with_adm_flags(adm_file, tmp_path):
    """guided-diffusion's image_sample.py command line on its kind of file."""
    argv = words(**MODEL, **PROCESS, num_samples=2, batch_size=2, timestep_respacing="ddim4", use_ddim=True)
    out = tmp_path / "adm.npz"
    sample.main([*argv, *words(model_path=adm_file, out=out, device="cpu")])
    found = arrays(out)["arr_0"]
    unet = adm_unet()
    unet.load_state_dict({key: value.half().float() for key, value in unet.state_dict().items()})
    from guided_mt.diffusion.random import SampleStreams
    from guided_mt.diffusion.respacing import create_gaussian_diffusion

    process = create_gaussian_diffusion(steps=40, noise_schedule="cosine", learn_sigma=True, timestep_respacing="ddim4")
    noise = SampleStreams(torch.arange(2)).normal(3, 8, 8)
    expected = process.ddim_sample_loop(unet, (2, 3, 8, 8), noise=noise)
    expected = ((expected + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # rounding down of values at a border
    with pytest.raises(UserError, match="another architecture"):
        sample.main(words(**{**MODEL, "num_channels": 64}, **PROCESS, model_path=adm_file, out=out))


# ---------------------------------------------------------------- restoration


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory) -> Path:
    """A picture with spaces in its name, white (masked) in the lower left quarter."""
    picture = np.zeros((32, 32), np.uint8)
    picture[16:, :16] = 255
    file = tmp_path_factory.mktemp("mask") / "my mask.png"
    Image.fromarray(picture).save(file)
    return file


@pytest.mark.parametrize("kind", ["patches:3", "half", "full", "image"])
def test_masks(kind, runs, mask_file, tmp_path, capsys):
    mask = ["--mask", kind, *([str(mask_file)] if kind == "image" else [])]
    found = restored(runs["X"], tmp_path / "r.npz", *mask, method="none")
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {
        **dict.fromkeys(("arr_0", "original", "masked", "restored"), (np.uint8, (COUNT, 8, 8, 3))),
        "mask": (np.uint8, (COUNT, 8, 8)),
    }
    masked = found["mask"] == 255
    assert set(np.unique(found["mask"])) <= {0, 255}
    expected = np.zeros((8, 8), bool)
    if kind == "half":
        expected[:, 4:] = True
    elif kind == "full":
        expected[:] = True
    elif kind == "image":
        expected[4:, :4] = True
    if kind == "patches:3":
        assert (masked.sum((1, 2)) <= 3 * 2 * 2).all() and (masked.sum((1, 2)) > 0).all()
        assert (masked[0] != masked[1]).any()
    else:
        assert (masked == expected).all()
    assert (found["masked"][masked] == 127).all()  # mid grey
    assert (found["masked"][~masked] == found["original"][~masked]).all()
    np.testing.assert_array_equal(found["restored"], found["masked"])  # --method none is Clean-Masked
    printed = capsys.readouterr().out
    assert "masked region: mean squared error" in printed
    assert ("unmasked region: mean absolute error 0.0000" in printed) == (kind != "full")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["X", "U", "none", "classes"])
def test_methods(method, name, runs, tmp_path):
    values = {"method": method, "mask": "half", "repaint_resamples": 2, "num_samples": 3, "strength": 0.7}
    refused = {("mt", "none"): "--mt_task masked", ("sdedit", "U"): "never saw", ("repaint", "U"): "never saw"}
    if (method, name) in refused:
        with pytest.raises(UserError, match=refused[method, name]):
            restored(runs[name], tmp_path / "r.npz", **values)
        return
    found = restored(runs[name], tmp_path / "r.npz", **values)
    same = restored(runs[name], tmp_path / "same.npz", **{**values, "batch_size": 2})
    assert_equal(found, same)
    hidden = found["mask"] == 255
    assert (found["restored"][hidden] != found["masked"][hidden]).any() == (method != "none")
    pasted = restored(runs[name], tmp_path / "pasted.npz", **values, exact_known=True)
    np.testing.assert_array_equal(pasted["restored"][~hidden], found["original"][~hidden])
    np.testing.assert_array_equal(pasted["restored"][hidden], found["restored"][hidden])
    if method == "mt":  # the model keeps known pixels only roughly, so that pasting is a visible difference
        assert (found["restored"][~hidden] != found["original"][~hidden]).any()


def test_form_u_conditions_and_their_strength_matter(runs, tmp_path):
    values = {"mask": "half", "num_samples": 3}
    found = [
        restored(runs["U"], tmp_path / f"{i}.npz", **values, **more)["restored"]
        for i, more in enumerate([{}, {"mt_condition_scale": 0.5}, {"mt_condition": "algorithm1"}])
    ]
    assert (found[0] != found[1]).any() and (found[0] != found[2]).any() and (found[1] != found[2]).any()
    scale_one = restored(runs["U"], tmp_path / "one.npz", **values, mt_condition_scale=1, mt_condition="own-head")
    np.testing.assert_array_equal(scale_one["restored"], found[0])


# ---------------------------------------------------------------- likelihood


@pytest.mark.parametrize("name", ["X", "U", "none", "classes"])
def test_theorem_1s_terms_sum_to_the_total_in_every_batch(name, runs, tmp_path):
    found = likelihood(runs[name], tmp_path / "nll.npz")
    single_task = {"total_bpd", "L0_prior_bpd", "L1_denoising_bpd", "L3_decoder_bpd"}
    assert found.keys() == single_task | (set() if name == "none" else {"L2_masked"})
    assert all(values.shape == (COUNT,) and np.isfinite(values).all() for values in found.values())
    parts = found["L0_prior_bpd"] + found["L1_denoising_bpd"] + found["L3_decoder_bpd"]
    np.testing.assert_allclose(parts, found["total_bpd"], rtol=1e-5)
    assert (found["L1_denoising_bpd"] > 0).all() and (found["L3_decoder_bpd"] > 0).all()
    few = likelihood(runs[name], tmp_path / "few.npz", batch_size=3)
    for key, values in found.items():
        np.testing.assert_allclose(few[key], values, rtol=1e-5, err_msg=key)
    if name != "none":  # the modality term is the head's squared error, so it must depend on what is hidden
        full = likelihood(runs[name], tmp_path / "full.npz", mask="full")
        assert (full["L2_masked"] != found["L2_masked"]).any()


# ---------------------------------------------------------------- export, dry run, installed commands


def test_export_is_the_averaged_unet(runs, tmp_path, capsys):
    export.main(words(model_path=runs["X"], out=tmp_path / "x.pt", ema="0.9"))
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state.keys() == adm_unet().state_dict().keys()
    assert "left out: condition_in, head_variance, heads" in capsys.readouterr().out
    unet = adm_unet()
    unet.load_state_dict(state)  # as ADM does, strictly


def test_dry_run_stops_before_anything_is_made(runs, tmp_path, capsys):
    out = tmp_path / "no.npz"
    train.main([*flags(log_dir=tmp_path / "run", data_dir="nowhere"), "--dry_run", "True"])
    printed = capsys.readouterr().out
    assert "num_channels: 32" in printed and "# 0.20 M parameters" in printed and "8 images per step" in printed
    sample.main(words(model_path=runs["X"], out=out, dry_run=True))
    restore.main(words(model_path=runs["X"], out=out, dry_run=True))
    nll.main(words(model_path=runs["X"], out=out, dry_run=True))
    printed = capsys.readouterr().out
    assert printed.count(f"# writing {out}") == 3 and printed.count("mt_variant: X") == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [train, sample, restore, nll, export], ids=lambda m: m.__name__.rpartition(".")[2])
def test_help_names_every_flag_with_its_default(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "default:" in text or module is export  # whose flags have none
    wanted = {"train": "--mask_full_prob", "sample": "--num_samples", "restore": "--exact_known", "nll": "--mask"}
    assert wanted.get(module.__name__.rpartition(".")[2], "--model_path") in text


@pytest.mark.parametrize("command", ["mt-train", "mt-sample", "mt-restore"])
def test_installed_commands(command):
    if not (BIN / command).exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and "--image_size" in done.stdout, done.stderr


def test_a_model_without_classes_takes_images_of_any_name(runs, tmp_path):
    """Class names of the training set bind class-conditional models alone."""
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(pictures / f"IMG_{i:04d}.png")
    restore.main(words(model_path=runs["X"], data_dir=pictures, out=tmp_path / "r.npz", steps=2, num_samples=2))
    assert (tmp_path / "r.npz").exists()
