"""What ADM's own flags, file names and environment variable mean here: as there (docs/from_guided_diffusion.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODEL, PROCESS, adm_unet, flags, words

from guided_mt.commands import classifier_sample, nll, sample, train
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.errors import UserError
from guided_mt.generation.generate import Generator
from guided_mt.generation.sharded import SAFE_BATCH
from guided_mt.networks.classifier import create_classifier
from guided_mt.runs.checkpoint import checkpoints, read_config, read_weights

GUIDE = {"classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("adm") / "model.pt"
    torch.save(adm_unet().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    network = create_classifier(8, False, 64, 1, "4", True, True, "attention", num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    file = tmp_path_factory.mktemp("adm") / "classifier.pt"
    torch.save(network.state_dict(), file)
    return file


def resolved(command, capsys, **values) -> dict[str, str]:
    """What a command says that it would do."""
    command.main(words(**{**MODEL, **PROCESS, "num_samples": 2, "dry_run": True, "device": "cpu", **values}))
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("#"))


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({}, "dpm++"),
        ({"timestep_respacing": "8"}, "ddpm"),
        ({"timestep_respacing": "ddim4"}, "ddpm"),  # as there: --use_ddim chooses the sampler, not the timesteps
        ({"timestep_respacing": "8", "use_ddim": False}, "ddpm"),
        ({"timestep_respacing": "8", "sampler": "dpm++"}, "dpm++"),
        ({"timestep_respacing": "solver8"}, "dpm++"),
    ],
    ids=str,
)
def test_adms_timesteps_mean_its_ancestral_steps(values, rule, model, classifier, capsys):
    assert resolved(sample, capsys, model_path=model, **values)["sampler"] == rule
    guided = {"model_path": model, "classifier_path": classifier, **GUIDE}
    assert resolved(classifier_sample, capsys, **guided, **values)["sampler"] == rule


def test_250_draws_what_adms_loop_draws(model, tmp_path):
    out = tmp_path / "adm.npz"
    argv = words(**MODEL, **PROCESS, num_samples=2, timestep_respacing="8", model_path=model, out=out, device="cpu")
    sample.main(argv)
    streams = SampleStreams(torch.arange(2))
    process = create_gaussian_diffusion(steps=40, noise_schedule="cosine", learn_sigma=True, timestep_respacing="8")
    x, network = streams.normal(3, 8, 8), adm_unet()
    with torch.no_grad():
        for step in reversed(range(8)):
            t = torch.full((2,), step)
            x = process.p_sample_step(process.p_mean_variance(network, x, t), t, streams.normal(3, 8, 8))
    expected = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with np.load(out) as file:
        assert np.abs(file["arr_0"].astype(int) - expected.astype(int)).max() <= 1


def test_openai_logdir_takes_what_is_drawn_under_adms_names(model, classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    common = words(**MODEL, **PROCESS, num_samples=1, model_path=model, device="cpu", timestep_respacing="2")
    plain = [*common, "--fill_batches", "False"]
    sample.main(plain)
    assert (tmp_path / "log" / "samples_1x8x8x3.npz").exists()
    (tmp_path / "log" / "samples_1x8x8x3.npz").unlink()
    classifier_sample.main([*plain, *words(classifier_path=classifier, **GUIDE)])
    with np.load(tmp_path / "log" / "samples_1x8x8x3.npz") as file:
        assert sorted(file) == ["arr_0", "arr_1"]
    nll.main([*common, "--data_dir", "builtin:digits-test"])
    assert {"nll.npz", "vb_terms.npz", "mse_terms.npz", "xstart_mse_terms.npz"} <= {
        file.name for file in (tmp_path / "log").iterdir()
    }


def test_terms_by_timestep_are_in_adms_order_and_keep_apart(model, tmp_path):
    """The largest timestep first: the decoder's term, by far the largest here, is the last."""
    for name in ("a", "b"):
        out = tmp_path / f"{name}.npz"
        nll.main(
            words(
                **{**MODEL, **PROCESS, "num_samples": 3, "model_path": model, "out": out, "device": "cpu"},
                data_dir="builtin:digits-test",
                timestep_respacing="4",
                batch_size=2,
            )
        )
    terms = {}
    for kind in ("vb", "mse", "xstart_mse"):
        with np.load(tmp_path / f"a_{kind}_terms.npz") as file:
            terms[kind] = file["arr_0"]
            assert terms[kind].shape == (4,)
        assert (tmp_path / f"b_{kind}_terms.npz").exists()
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(terms["vb"][-1], file["L3_decoder_bpd"].mean(), rtol=1e-5)
        np.testing.assert_allclose(terms["vb"][:-1].sum(), file["L1_denoising_bpd"].mean(), rtol=1e-5)


@pytest.mark.parametrize("fill", [True, False])
def test_filling_of_batches_can_be_switched_off(fill, model, tmp_path, monkeypatch):
    widths, draw = [], Generator.draw
    monkeypatch.setattr(Generator, "draw", lambda *a, **k: widths.append(len(a[1])) or draw(*a, **k))
    values = {"num_samples": 1, "model_path": model, "out": tmp_path / "s.npz", "steps": 2, "device": "cpu"}
    sample.main(words(**MODEL, **PROCESS, **values, fill_batches=fill))
    assert set(widths) == ({SAFE_BATCH} if fill else {1})


# ---------------------------------------------------------------- training


def test_training_on_respaced_timesteps(tmp_path, capsys):
    """As ADM, on the process of the timesteps kept; the run remembers them, and sampling stays on them."""
    run = tmp_path / "run"
    argv = flags(log_dir=run, total_steps=2, mt_variant="U", timestep_respacing="5")
    train.main(argv)
    newest = checkpoints(run)[-1]
    saved, weights = read_config(newest / "model.safetensors"), read_weights(newest / "model.safetensors")
    assert saved["trained_timesteps"] == "5" and saved["timestep_respacing"] == ""
    seen = weights["head_variance.masked.error_count"].nonzero().flatten().tolist()
    assert seen and set(seen) <= {0, 10, 20, 29, 39}  # heads are told the original timesteps
    capsys.readouterr()
    out = tmp_path / "s.npz"
    drawn = words(model_path=run, num_samples=1, steps=50, out=out, device="cpu", fill_batches=False)
    sample.main(drawn)
    assert "trained_timesteps: '5'" in capsys.readouterr().out
    with pytest.raises(UserError, match="can't take 6 steps"):
        sample.main([*drawn, "--timestep_respacing", "6"])
    with pytest.raises(UserError, match="trained_timesteps"):
        train.main(flags(log_dir=run, total_steps=4, mt_variant="U"))


def test_clipping_is_off_as_in_adm_but_a_run_keeps_its_own(tmp_path, capsys):
    argv = flags(log_dir=tmp_path / "run", total_steps=1)
    train.main([*argv, "--dry_run", "True"])
    assert "grad_clip: 0.0" in capsys.readouterr().out
    train.main([*argv, "--grad_clip", "1"])  # what the default was
    capsys.readouterr()
    train.main([*argv, "--dry_run", "True"])
    assert "grad_clip: 1.0" in capsys.readouterr().out
    train.main([*argv, "--dry_run", "True", "--grad_clip", "0.5"])
    assert "grad_clip: 0.5" in capsys.readouterr().out
