"""Runs with weights over time and tasks: they begin as eq. 6, resume to the bit, and leave the model's own files alone."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_near, assert_same, column, contents, flags, progress, step_folder

from guided_mt.commands import train
from guided_mt.errors import UserError
from guided_mt.modalities.weighting.over_tasks import TASK_WEIGHTINGS
from guided_mt.networks.backbone import Backbone
from guided_mt.networks.unet import UNetModel

COMMON = {
    "mt_task": "masked,label",
    "mt_variant": "U",
    "num_classes": 10,
    "lr": 1e-3,
    "ema_rate": "0.5",
    "dropout": 0.1,
}
ROWS: dict[str, dict[str, Any]] = {
    "learned": {"timestep_weights": "learned", "mt_timestep_weights": "masked=learned,label=min-snr"},
    "uncertainty": {"mt_task_weighting": "uncertainty", "schedule_sampler": "stratified", "mt_interval_rule": "snr"},
    "pcgrad": {"mt_task_weighting": "pcgrad", "mt_task_weighting_interval": 3},
    "nash": {"mt_task_weighting": "nash", "mt_task_weighting_interval": 3, "mt_variant": "any"},
}
PACKAGES = {"pcgrad": ("torchjd",), "nash": ("torchjd", "cvxpy", "ecos")}


def needs(row: str) -> None:
    for package in PACKAGES.get(row, ()):
        pytest.importorskip(package, reason="needs the extra 'tasks'")


def complaint(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        train.main(argv)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


def run_of(folder: Path, row: str, steps: int = 4, **values: Any) -> Path:
    needs(row)
    train.main(
        flags(**{**COMMON, **ROWS.get(row, {}), "log_dir": folder, "total_steps": steps, "save_interval": 2, **values})
    )
    return folder


def test_every_weighting_is_run():
    assert {"fixed", *ROWS} - {"learned"} == set(TASK_WEIGHTINGS)


@pytest.mark.parametrize("row", ROWS)
def test_a_weighted_run(row, tmp_path):
    """4 steps == 2 steps + the same command from there; measured, learned and logged; nothing new in the model's own files."""
    whole = run_of(tmp_path / "whole", row)
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    shutil.rmtree(step_folder(halves, 4))  # as if stopped between steps 2 and 4
    run_of(halves, row)
    expected, found = contents(step_folder(whole, 4)), contents(step_folder(halves, 4))
    for one in (expected, found):
        del one["config.yaml"]  # names its own folder
    assert_same(expected, found)
    assert progress(whole) == progress(halves)

    plain = contents(
        step_folder(run_of(tmp_path / "plain", "fixed", 2, mt_variant=ROWS[row].get("mt_variant", "U")), 2)
    )
    for name in ("model.safetensors", "ema_0.5.safetensors"):
        assert {k: v.shape for k, v in found[name].items()} == {k: v.shape for k, v in plain[name].items()}
    assert "weighting" not in plain["training_state.pt"]
    state = found["training_state.pt"]["weighting"]
    neutral = 1 if row in PACKAGES else 0
    assert state and all((value != neutral).any() for value in state.values())
    factors = [name for name in progress(whole)[0] if name.startswith("task_weight_")]
    assert len(factors) == (0 if row == "learned" else 3)
    if row in PACKAGES:  # measured at steps 0, where output layers are zero, and 3
        assert column(whole, "task_weight_masked")[1] == column(whole, "task_weight_masked")[2]


@pytest.mark.parametrize("row", ["learned", "uncertainty", "pcgrad"])
def test_the_first_step_is_that_of_eq_6(row, tmp_path):
    """u = s = 0, and gradients that meet an output layer of zeros do not conflict."""
    sampler = {"mt_timestep_weights": "uniform" if row != "learned" else "learned", "schedule_sampler": "uniform"}
    weighted, plain = run_of(tmp_path / "w", row, 1, **sampler), run_of(tmp_path / "p", "fixed", 1)
    for name in ("loss", "mse", "masked", "label"):
        assert column(weighted, name) == column(plain, name)


@pytest.mark.parametrize("row", ROWS)
def test_parts_of_a_batch_change_nothing(row, tmp_path):
    """Not even what is measured of the gradients: PCGrad under accumulation is PCGrad."""
    whole, parts = (
        run_of(tmp_path / str(n), row, microbatch=n, dropout=0, mt_task_weighting_interval=1) for n in (8, 3)
    )
    assert_near(
        progress(whole), progress(parts), rel=1e-5, loose=("grad_", "rms_", "spread_", "task_weight"), loose_rel=1e-3
    )


def test_measuring_leaves_the_step_alone(tmp_path, monkeypatch):
    """Without a conflict PCGrad is the sum: with weights of 1, as measured here, the run is the fixed one to the bit."""
    needs("pcgrad")
    taken = []
    monkeypatch.setattr(
        "guided_mt.modalities.weighting.on_gradients.solved", lambda solve, gramian, seed: taken.append(gramian) or None
    )
    weighted = run_of(tmp_path / "w", "pcgrad", 3, mt_task_weighting_interval=1)
    plain = run_of(tmp_path / "p", "fixed", 3)
    names = progress(plain)[0].keys()
    assert [{name: row[name] for name in names} for row in progress(weighted)] == progress(plain)
    assert len(taken) == 3 and all((g - g.T).abs().max() < 1e-9 and (g.diagonal() >= 0).all() for g in taken)
    assert taken[2].diagonal().min() > 0 and torch.linalg.eigvalsh(taken[2]).min() > -1e-9 * taken[2].max()


def test_fp16_scales_and_unscales_what_is_measured(tmp_path, monkeypatch):
    """The Gramian of a run with the loss scale of fp16 is that of float32, to the arithmetic."""
    needs("pcgrad")
    taken: dict[str, list[torch.Tensor]] = {"fp32": [], "fp16": []}
    for precision, kept in taken.items():
        monkeypatch.setattr(
            "guided_mt.modalities.weighting.on_gradients.solved",
            lambda solve, gramian, seed, kept=kept: kept.append(gramian) or None,
        )
        run_of(tmp_path / precision, "pcgrad", 3, mt_task_weighting_interval=2, precision=precision, lr=1e-4, dropout=0)
    torch.testing.assert_close(taken["fp16"][1], taken["fp32"][1], rtol=0.2, atol=float(0.05 * taken["fp32"][1].max()))


REFUSED = [
    (
        {"mt_timestep_weights": "masked=min-snrr"},
        r"--mt_timestep_weights: 'min-snrr' is none of .*did you mean min-snr\?",
    ),
    ({"mt_timestep_weights": "mask=p2"}, r"--mt_timestep_weights mask=p2: .*has no 'mask' \(did you mean masked\?\)"),
    ({"mt_task_weighting": "pcgard"}, r"--mt_task_weighting: 'pcgard' is none of .*did you mean pcgrad\?"),
    ({"mt_task_weighting": "pcgrad", "mt_task": "none"}, r"at least 2 tasks .* these settings train the image alone"),
    ({"mt_task_weighting": "nash", "mt_loss_weight": 0}, r"at least 2 tasks .* these settings train the image alone"),
    ({"mt_task_weighting": "nash", "mt_drop_prob": 1}, r"at least 2 tasks .* --mt_drop_prob 1 teaches the image alone"),
    (
        {"mt_task_weighting": "uncertainty", "mt_task": "none", "mt_timestep_intervals": 1},
        r"one task and one interval leave nothing to weigh; raise --mt_timestep_intervals",
    ),
    (
        {"mt_task_weighting": "uncertainty", "schedule_sampler": "loss-second-moment"},
        r"--mt_task_weighting uncertainty with --schedule_sampler loss-second-moment: .*take uniform or stratified",
    ),
    (
        {"mt_timestep_weights": "learned", "schedule_sampler": "loss-second-moment"},
        r"--mt_timestep_weights learned with --schedule_sampler loss-second-moment",
    ),
    ({"timestep_weights": "learned", "use_kl": True}, r"timestep weights 'learned' weigh a squared error"),
    (
        {"schedule_sampler": "stratified", "mt_timestep_intervals": 41},
        r"--mt_timestep_intervals 41: there are 40 timesteps",
    ),
    (
        {"mt_task_weighting": "uncertainty", "trained_timesteps": "4"},
        r"mt_timestep_intervals: 5 intervals of 4 timesteps",
    ),
    ({"mt_task_weighting_interval": 0}, r"--mt_task_weighting_interval must be at least 1"),
]


@pytest.mark.parametrize(("values", "expected"), REFUSED, ids=str)
def test_what_cannot_be(values, expected, tmp_path):
    text = complaint(flags(**{**COMMON, "log_dir": tmp_path / "run", "total_steps": 1, **values}))
    assert re.search(expected, text), text


@pytest.mark.parametrize("package", ["torchjd", "cvxpy"])
def test_a_missing_package_is_named_with_the_way_to_it(package, tmp_path, monkeypatch):
    needs("nash")
    monkeypatch.setitem(sys.modules, package, None)
    text = complaint(flags(**{**COMMON, **ROWS["nash"], "log_dir": tmp_path / "run", "total_steps": 1}))
    assert f"mt_task_weighting nash: the package {package} is missing: pip install" in text and "[tasks]" in text
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_names_no_trunk_is_refused(tmp_path, monkeypatch):
    needs("pcgrad")
    monkeypatch.setattr(UNetModel, "trunk", Backbone.trunk)
    text = complaint(flags(**{**COMMON, **ROWS["pcgrad"], "log_dir": tmp_path / "run", "total_steps": 1}))
    assert "MTUNet does not say which module makes its middle features" in text


def test_a_run_does_not_change_its_weighting_on_the_way(tmp_path):
    run = run_of(tmp_path / "run", "fixed", 2)
    for changed in ({"mt_task_weighting": "uncertainty"}, {"mt_timestep_weights": "p2"}):
        text = complaint(flags(**{**COMMON, "log_dir": run, "total_steps": 3, **changed}))
        (name,) = changed
        assert f"{name} (" in text and "repeat them to resume" in text


def test_only_gradient_methods_measure(tmp_path, monkeypatch):
    monkeypatch.setattr("guided_mt.training.train_loop.gramian_of", lambda *_: pytest.fail("measured"))
    run_of(tmp_path, "uncertainty", 1)
