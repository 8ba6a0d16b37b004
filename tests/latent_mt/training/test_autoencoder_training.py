"""First stages in training: LDM's losses, two optimisers under the real Trainer, exact resume, and what bad input says."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from test_autoencoder import DDCONFIG, VQ_DDCONFIG, complaint
from tiny import assert_same, column, contents, finish_group, progress, step_folder
from torch import Tensor, nn

from evaluations.files.palettes import LabelClass, palette_of
from guided_mt.data import Batch
from guided_mt.runs.checkpoint import read_weights
from latent_mt.commands.autoencoder_train import main
from latent_mt.first_stage import losses
from latent_mt.first_stage.first_stages import AutoencoderKL, VQModel
from latent_mt.first_stage.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from latent_mt.first_stage.posterior import DiagonalGaussian
from latent_mt.first_stage.reconstruction import Reconstruction, figure_names, measure
from latent_mt.runs.configuration import load_config
from latent_mt.training.first_stage import AutoencoderTraining

CONFIGS = ROOT / "latent_mt" / "configs"
CLASSES = [LabelClass(0, "Sky", (128, 128, 128)), LabelClass(1, "Wall", (128, 0, 0)), LabelClass(2, "Void", (0, 0, 0))]
PALETTE = palette_of(CLASSES, "the test")
PLAIN = {"disc_start": 0, "disc_factor": 0.0, "perceptual_weight": 0.0}
DISC = {"disc_start": 1, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0}
LOSS = {
    "kl": "ldm.modules.losses.LPIPSWithDiscriminator",
    "vq": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
}


def images(count: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def config(kind: str = "kl", loss: dict | None = None, **params) -> dict:
    """A tiny training, as a YAML file describes it."""
    sizes = {"embed_dim": 4} | ({"n_embed": 16} if kind == "vq" else {})
    return {
        "model": {
            "target": f"ldm.models.autoencoder.{'AutoencoderKL' if kind == 'kl' else 'VQModel'}",
            "base_learning_rate": 1e-3,
            "params": {
                "ddconfig": DDCONFIG if kind == "kl" else VQ_DDCONFIG,
                **sizes,
                "lossconfig": {"target": LOSS[kind], "params": DISC if loss is None else loss},
                **params,
            },
        },
        "data": {
            "target": "latent_mt.data.ImageData",
            "params": {
                "path": "builtin:digits",
                "val_path": "builtin:digits",
                "limit": 12,
                "image_size": 16,
                "batch_size": 4,
                "random_flip": True,
                "num_workers": 0,
            },
        },
        "lightning": {"trainer": {"accelerator": "cpu", "devices": 1}},
        "run": {
            "total_steps": 4,
            "log_interval": 1,
            "save_interval": 2,
            "sample_interval": 4,
            "val_interval": 4,
            "ema_rate": "0.9",
        },
    }


def train(values: dict, run: Path, *words: str) -> Path:
    file = run.parent / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(values))
    main(["--config", str(file), f"run.log_dir={run}", *words])
    return run


# ---------------------------------------------------------------- LDM's formulas


def made(image: Tensor, latent_loss: float | Tensor = 0.0) -> Reconstruction:
    return Reconstruction(image, torch.as_tensor(latent_loss), torch.zeros(0, dtype=torch.int64))


class Linear(nn.Module):
    """A discriminator whose gradients are known: logits = scale * mean over channels."""

    def __init__(self, scale: float = 3.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean(dim=1, keepdim=True)


def test_kl_loss():
    loss = LPIPSWithDiscriminator(**PLAIN | {"logvar_init": 0.3, "kl_weight": 0.01})
    x, reconstruction = images(seed=1), images(seed=2)
    posterior = DiagonalGaussian(torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4))
    kl = posterior.kl().mean()
    total, record = loss.generator(x, made(reconstruction, kl), 0, nn.Parameter(torch.ones(1)))
    nll = ((x - reconstruction).abs() / np.exp(0.3) + 0.3).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(record["nll_loss"], nll)
    torch.testing.assert_close(total, nll + 0.01 * kl)
    torch.testing.assert_close(record["rec_loss"], (x - reconstruction).abs().mean())
    assert loss.names() == ["loss", "nll_loss", "rec_loss", "kl_loss", "logvar"]
    assert set(loss.trained_state()) == {"logvar"} and not loss.logvar.requires_grad
    assert LPIPSWithDiscriminator(**PLAIN, learn_logvar=True).generator_parameters()


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
def test_vq_loss(pixel_loss):
    loss = VQLPIPSWithDiscriminator(**PLAIN, codebook_weight=0.7, pixel_loss=pixel_loss)
    x, reconstruction = images(seed=1), images(seed=2)
    total, _ = loss.generator(x, made(reconstruction, 0.4), 0, nn.Parameter(torch.ones(1)))
    error = (x - reconstruction).abs() if pixel_loss == "l1" else (x - reconstruction).square()
    torch.testing.assert_close(total, error.mean() + 0.7 * 0.4)


def test_adaptive_weight_balances_the_gradients_at_the_last_layer():
    loss = LPIPSWithDiscriminator(**DISC | {"disc_start": 2, "disc_weight": 0.5, "disc_factor": 2.0, "kl_weight": 0.0})
    loss.discriminator = Linear()
    x, last = images() + 0.5, nn.Parameter(torch.tensor(0.9))
    before, record = loss.generator(x, made(last * x), 1, last)  # step 1: not yet
    torch.testing.assert_close(before.detach(), record["nll_loss"])
    assert record["d_weight"] == record["g_loss"] == 0
    total, record = loss.generator(x, made(last * x), 2, last)
    nll_gradient = -x.abs().sum() / 2
    g_gradient = -3.0 * x.mean()
    weight = 0.5 * nll_gradient.abs() / (g_gradient.abs() + 1e-4)
    torch.testing.assert_close(record["d_weight"], weight)
    torch.testing.assert_close(record["g_loss"], -3.0 * 0.9 * x.mean())
    torch.testing.assert_close(total.detach(), record["nll_loss"] + weight * 2.0 * record["g_loss"])
    total.backward()
    torch.testing.assert_close(last.grad, nll_gradient + weight * 2.0 * g_gradient)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator_loss(kind):
    loss = LPIPSWithDiscriminator(**DISC, disc_loss=kind)
    loss.discriminator = Linear()
    x, reconstruction = images(seed=1), images(seed=2).requires_grad_()
    value, record = loss.discriminate(x, reconstruction)
    real, fake = 3 * x.mean(dim=1), 3 * reconstruction.mean(dim=1)
    one, other = (real, fake) if kind == "hinge" else (torch.sigmoid(real).log(), torch.sigmoid(-fake).log())
    expected = (1 - one).relu().mean() + (1 + other).relu().mean() if kind == "hinge" else -one.mean() - other.mean()
    torch.testing.assert_close(value, 0.5 * expected)
    value.backward()
    assert reconstruction.grad is None and loss.discriminator.scale.grad is not None
    torch.testing.assert_close(record["logits_real"], real.mean().detach())


def test_without_vgg_the_perceptual_term_is_left_out_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="latent_mt"):
        loss = LPIPSWithDiscriminator(disc_start=0, disc_factor=0.0)
    assert len(caplog.records) == 1 and "vgg16-397923af.pth" in caplog.text
    assert loss.perceptual_weight == 0 and "perceptual" not in loss.names()


def test_perceptual_term(tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips", reason="needs the extra 'eval'")
    with torch.device("meta"):
        trunk = lpips.pretrained_networks.tv.vgg16().features.state_dict()
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / losses.VGG
    torch.save({f"features.{key}": torch.randn(value.shape) * 0.05 for key, value in trunk.items()}, file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path / "none"))
    loss = LPIPSWithDiscriminator(**PLAIN | {"perceptual_weight": 2.0})
    x, reconstruction = images(seed=1, size=32), images(seed=2, size=32).requires_grad_()
    total, _ = loss.generator(x, made(reconstruction), 0, nn.Parameter(torch.ones(1)))
    distance = loss.train().perceptual_loss(x, reconstruction)
    assert distance.shape == (2, 1, 1, 1) and distance.min() > 0
    expected = ((x - reconstruction).abs() + 2 * distance).sum() / 2
    torch.testing.assert_close(total, expected)
    total.backward()
    assert reconstruction.grad.abs().max() > 0
    assert not any(p.requires_grad for p in loss.perceptual_loss.parameters())
    assert set(loss.trained_state()) == {"logvar"} and "perceptual" in loss.names()
    torch.save({"features.0.weight": torch.zeros(1)}, file)
    assert "not torchvision's VGG-16" in complaint(lambda: LPIPSWithDiscriminator(disc_start=0, disc_factor=0.0))


# ---------------------------------------------------------------- figures


def test_figures():
    sides = (SimpleNamespace(name="photo", palette=None), SimpleNamespace(name="map", palette=PALETTE))
    pairs = SimpleNamespace(sides=sides, side_names=("photo", "map"))
    assert figure_names(pairs) == [
        "val_psnr_photo",
        "val_ssim_photo",
        "val_psnr_map",
        "val_ssim_map",
        "val_accuracy_map",
    ]
    photo = torch.randint(20, 200, (2, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor(PALETTE.colours)[torch.randint(3, (2, 16, 16))].permute(0, 3, 1, 2)
    same = measure(torch.cat([photo, labels], 1), torch.cat([photo, labels], 1), pairs)
    means = (same[:, 0] / same[:, 1]).tolist()
    assert means == pytest.approx([78.13, 1, 78.13, 1, 1], abs=0.01)
    changed = labels.clone()
    changed[0, :, :4] = labels[0, :, :4].flip(-1)
    off = measure(torch.cat([photo, labels], 1), torch.cat([photo + 5, changed], 1), pairs)
    assert off[0, 0] / off[0, 1] == pytest.approx(20 * np.log10(255 / 5)) and off[1, 0] / off[1, 1] < 1
    scored = (labels.int().sum(1) > 0).sum()
    right = ((labels == changed).all(1) & (labels.int().sum(1) > 0)).sum()
    assert off[4].tolist() == [right, scored]
    single = SimpleNamespace(side_names=())
    assert figure_names(single) == ["val_psnr", "val_ssim"]
    assert measure(photo, photo, single).shape == (2, 2)


# ---------------------------------------------------------------- a step


def training(kind: str = "kl", microbatches: int = 1, loss: dict = PLAIN) -> AutoencoderTraining:
    torch.manual_seed(0)
    lossconfig = {"target": LOSS[kind], "params": loss}
    if kind == "kl":
        return AutoencoderTraining(AutoencoderKL(DDCONFIG, 4, lossconfig), microbatches)
    return AutoencoderTraining(VQModel(VQ_DDCONFIG, 16, 4, lossconfig), microbatches)


def test_draw_belongs_to_the_sample():
    module = training()
    module.random_flip = True
    pairs = torch.randint(0, 256, (4, 6, 16, 16), dtype=torch.uint8)
    positions = torch.arange(4) + 10
    x, noise = module.draw(Batch(pairs, None, positions, positions))
    assert x.shape == (8, 3, 16, 16) and noise.shape == (8, 4, 8, 8)
    alone, its_noise = module.draw(Batch(pairs[2:3], None, positions[2:3], positions[2:3]))
    assert torch.equal(x[4:6], alone) and torch.equal(noise[4:6], its_noise)
    sides = pairs.float().view(8, 3, 16, 16) / 127.5 - 1
    flipped = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(x, sides, strict=True)]
    assert flipped[::2] == flipped[1::2] and len(set(flipped)) == 2  # both sides alike, some and some not


def test_batch_resize_range():
    module = training("vq")
    module.resize_range = (8, 40)
    x, sizes = images(), []
    for step in range(40):
        module.steps_done = step
        sizes.append(module._resized(x).shape[-1])
    assert sizes[:5] == [40] * 5 and set(sizes[5:]) == {8, 24, 40}


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_run_and_exact_resume(tmp_path, kind):
    scheduler = {
        "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 2, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.5, "max_decay_steps": 4},
    }
    ddconfig = {**(DDCONFIG if kind == "kl" else VQ_DDCONFIG), "dropout": 0.1}
    values = config(
        kind, ddconfig=ddconfig, scheduler_config=scheduler, **({} if kind == "kl" else {"lr_g_factor": 0.5})
    )
    whole = train(values, tmp_path / "whole")
    parts = train(values, tmp_path / "parts", "run.total_steps=2")
    train(values, parts)
    assert_same(progress(parts)[2:], progress(whole)[2:])
    ours, theirs = contents(step_folder(parts, 4)), contents(step_folder(whole, 4))
    for state in (ours, theirs):
        del state["config.yaml"]  # names the folder
    assert_same(ours, theirs)
    assert set(ours) == {"classes.json", "model.safetensors", "ema_0.9.safetensors", "training_state.pt"}
    assert len(ours["training_state.pt"]["optimizers"]) == 2

    model = ours["model.safetensors"]
    own = (AutoencoderKL(ddconfig, 4) if kind == "kl" else VQModel(ddconfig, 16, 4)).state_dict()
    extra = set(model) - set(own)
    assert set(own) <= set(model) and extra and all(key.startswith("loss.") for key in extra)
    assert "loss.discriminator.main.0.weight" in extra and ("loss.logvar" in extra) == (kind == "kl")
    assert set(ours["ema_0.9.safetensors"]) == set(own)
    start = contents(step_folder(parts, 2))["model.safetensors"]
    for key in ("encoder.conv_in.weight", "decoder.conv_out.bias", "loss.discriminator.main.0.weight"):
        assert not torch.equal(start[key], model[key]), key

    assert column(whole, "lr") == pytest.approx([0.5 * 4e-3, 0.75 * 4e-3, 4e-3, 0.55 * 4e-3])
    rows = progress(whole)
    assert rows[0]["d_loss"] == "" and float(rows[1]["d_loss"]) > 0  # disc_start 1
    assert float(rows[3]["val_psnr"]) > 0 and -1 < float(rows[3]["val_ssim"]) < 1
    if kind == "vq":
        assert 1 / 16 <= float(rows[3]["codes_used"]) <= 1 and 1 <= float(rows[3]["code_perplexity"]) <= 16
    grid = np.asarray(Image.open(whole / "grids" / "step_00000004.png"))
    assert grid.shape == (2 * 66 + 2, 8 * 66 + 2, 3)

    cls, extra_args = (AutoencoderKL, {}) if kind == "kl" else (VQModel, {"n_embed": 16})
    other = {**ddconfig, "norm_groups": 8}  # of the same shapes
    assert "norm_groups (32 there, 8 here)" in complaint(
        lambda: cls(other, embed_dim=4, ckpt_path=str(whole), **extra_args)
    )
    loaded = cls(ddconfig, embed_dim=4, ckpt_path=str(whole), **extra_args)  # the averaged weights
    assert_same(dict(loaded.state_dict()), ours["ema_0.9.safetensors"])


def test_adam_of_the_first_step_moves_by_the_learning_rate(tmp_path):
    run = train(config(loss=PLAIN), tmp_path / "run", "run.total_steps=1")
    torch.manual_seed(0)
    start = AutoencoderKL(DDCONFIG, 4).state_dict()
    moved = read_weights(step_folder(run, 1) / "model.safetensors")
    step = (moved["decoder.conv_out.weight"] - start["decoder.conv_out.weight"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 4e-3), rtol=1e-3, atol=0)
    assert [float(row["samples"]) for row in progress(run)] == [4]


def test_accumulated_batches_are_one_batch(tmp_path):
    whole, parts = config(loss=PLAIN), config(loss=PLAIN)
    parts["lightning"]["trainer"]["accumulate_grad_batches"] = 2
    parts["data"]["params"]["batch_size"] = 2
    one, two = train(whole, tmp_path / "one"), train(parts, tmp_path / "two")
    for name in ("samples", "lr"):
        assert column(one, name) == column(two, name)
    assert column(one, "loss") == pytest.approx(column(two, "loss"), rel=2e-3)
    assert column(one, "grad_norm") == pytest.approx(column(two, "grad_norm"), rel=2e-3)


def test_pairs_and_label_accuracy(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for side in ("images", "labels"):
            (tmp_path / "data" / split / side).mkdir(parents=True)
        for i in range(count):
            classes = generator.integers(0, 3, (16, 16), dtype=np.uint8)
            photo = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(photo).save(tmp_path / "data" / split / "images" / f"{i}.png")
            Image.fromarray(classes).save(tmp_path / "data" / split / "labels" / f"{i}.png")
    lines = [" ".join(map(str, (entry.index, entry.name, *entry.colour))) for entry in CLASSES]
    (tmp_path / "data" / "classes.txt").write_text("\n".join(lines))
    values = config(loss=PLAIN)
    pairs = {"path": str(tmp_path / "data"), "val_split": "val", "image_size": 16, "batch_size": 2, "num_workers": 0}
    values["data"] = {"target": "latent_mt.data.PairData", "params": pairs}
    row = progress(train(values, tmp_path / "run"))[-1]
    assert float(row["val_psnr_photo"]) > 0
    accuracies = [float(value) for key, value in row.items() if key.startswith("val_accuracy")]
    assert len(accuracies) == 1 and 0.2 < accuracies[0] < 0.8  # two colours at random
    grid = np.asarray(Image.open(tmp_path / "run" / "grids" / "step_00000004.png"))
    assert grid.shape == (4 * 66 + 2, 3 * 66 + 2, 3)


def test_start_from_a_checkpoint_takes_its_discriminator(tmp_path):
    run = train(config(), tmp_path / "run", "run.total_steps=2")
    path = str(step_folder(run, 2) / "model.safetensors")
    module = AutoencoderTraining(AutoencoderKL(DDCONFIG, 4, {"target": LOSS["kl"], "params": DISC}, ckpt_path=path))
    state = read_weights(Path(path))
    assert_same(dict(module.loss.discriminator.state_dict()), _part(state, "loss.discriminator."))
    wide = {"target": LOSS["kl"], "params": {**DISC, "disc_ndf": 16}}
    text = complaint(lambda: AutoencoderTraining(AutoencoderKL(DDCONFIG, 4, wide, ckpt_path=path)))
    assert path in text and "lossconfig" in text
    AutoencoderTraining(AutoencoderKL(DDCONFIG, 4, wide, ckpt_path=path, ignore_keys=["loss."]))


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# ---------------------------------------------------------------- configurations and bad input


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("autoencoder_*.yaml")), ids=lambda file: file.stem)
def test_configurations(file, tmp_path, capsys):
    main(["--config", str(file), "--dry_run", "data.params.path=builtin:digits", f"run.log_dir={tmp_path}/run"])
    printed = capsys.readouterr().out
    assert "M parameters" in printed and not (tmp_path / "run").exists()
    assert load_config(file, ["data.params.path=x"])["model"]["params"]["embed_dim"] == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.params.lossconfig": {"target": "torch.nn.Identity"}}, "trained with LPIPSWithDiscriminator"),
        ({"model.params.lossconfig": None}, "lossconfig is missing"),
        ({"model.params.lossconfig.target": LOSS["vq"]}, "not VQLPIPSWithDiscriminator"),
        ({"model.params.lossconfig.params.disc_loss": "wgan"}, "disc_loss 'wgan'"),
        ({"model.params.lossconfig.params.disc_conditional": True}, "disc_conditional"),
        ({"model.params.lossconfig.params.disc_in_channels": 4}, "disc_in_channels"),
        ({"model.params.lossconfig.params.disc_weight": -1.0}, "disc_weight"),
        ({"model.params.lossconfig.params.kl_wight": 1.0}, "kl_weight"),
        ({"data.params.image_size": 17}, "17 x 17"),
        (
            {"model.params.lossconfig.params.disc_num_layers": 3},
            "images of 16 pixels are too small for this discriminator, which needs 24",
        ),
        ({"data.params.latents": "cache"}, "latents"),
        ({"lightning.trainer.precision": "16-mixed"}, "16-mixed"),
        ({"lightning.trainer.strategy": "fsdp"}, "strategy fsdp: a first stage is small"),
        ({"lightning.trainer.accumulate_grad_batches": 0}, "accumulate_grad_batches 0"),
        ({"run.weight_decay": 0.1}, "weight_decay"),
        ({"model.params.ddconfig.attn_type": "linear"}, "attn_type"),
        ({"model.params.scheduler_config": {"target": "torch.nn.Adam"}}, "torch.nn.Adam"),
    ],
    ids=lambda value: next(iter(value)).rpartition(".")[2] if isinstance(value, dict) else "",
)
def test_bad_configuration(tmp_path, change, words):
    values = config()
    for key, value in change.items():
        *parents, last = key.split(".")
        place = values
        for name in parents:
            place[name] = dict(place[name])  # DDCONFIG and its like are shared
            place = place[name]
        place[last] = value
    assert words in complaint(lambda: train(values, tmp_path / "run"))


def test_a_run_keeps_its_settings(tmp_path):
    values = config(loss=PLAIN)
    run = train(values, tmp_path / "run", "run.total_steps=1")
    values["model"]["params"]["lossconfig"]["params"]["kl_weight"] = 0.5
    assert "kl_weight" in complaint(lambda: train(values, run))
    del values["model"]["params"]["lossconfig"]["params"]["kl_weight"]
    (step_folder(run, 1) / "ema_0.9.safetensors").unlink()
    assert "ema_rate" in complaint(lambda: train(values, run, "run.total_steps=2"))


def test_diverged_loss_changes_nothing_and_stops(tmp_path):
    values = config(loss={**PLAIN, "logvar_init": -200.0})  # exp(200) overflows
    text = complaint(lambda: train(values, tmp_path / "run", "run.total_steps=30"))
    assert "not finite" in text
    torch.manual_seed(0)
    start = AutoencoderKL(DDCONFIG, 4).state_dict()
    saved = step_folder(tmp_path / "run", 2)
    assert not saved.exists() or torch.equal(
        read_weights(saved / "model.safetensors")["decoder.conv_in.weight"], start["decoder.conv_in.weight"]
    )


def test_two_processes_are_one_batch(tmp_path):
    """With a discriminator, whose batch norm sees one process's part, the first step's figures are the same all the same."""
    values = config()
    values["run"]["total_steps"] = 2
    one = train(values, tmp_path / "one")
    values["data"]["params"]["batch_size"] = 2
    values["lightning"]["trainer"]["devices"] = 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    words = ["--config", str(tmp_path / "two.yaml"), f"run.log_dir={tmp_path / 'two'}"]
    finish_group("autoencoder_train.py", words)
    assert column(one, "samples") == column(tmp_path / "two", "samples")
    assert progress(one)[-1].keys() == progress(tmp_path / "two")[-1].keys()
    for name in ("loss", "kl_loss", "grad_norm"):
        assert column(one, name)[0] == pytest.approx(column(tmp_path / "two", name)[0], rel=1e-4), name
