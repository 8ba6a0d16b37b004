"""Weights over time and tasks, and routing, in latent space: as guided_mt/training/test_weighted_runs.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import assert_same, column, contents, progress, step_folder, words
from tiny_latent import random_model, train
from tiny_tasks import write_data, write_tasks

from guided_mt.errors import UserError
from latent_mt.commands import export_ldm, latent_sample

TASKS = {"masked": {"timestep_weights": "min-snr"}, "label": {"num_classes": 3}}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"mt_tasks": {name: {**entry, "timestep_weights": "uniform"} for name, entry in TASKS.items()}},
    "learned": {"mt_timestep_weights": "learned"},
    "uncertainty": {"mt_task_weighting": "uncertainty", "mt_interval_rule": "snr", "mt_timestep_intervals": 3},
    "pcgrad": {"mt_task_weighting": "pcgrad", "mt_task_weighting_interval": 2},
    "dtr": {"mt_routing": "dtr", "mt_routing_beta": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run_of(folder: Path, run: Path, row: str, **settings: Any) -> Path:
    if row == "pcgrad":
        pytest.importorskip("torchjd", reason="needs the extra 'tasks'")
    params = {"mt_variant": "U", "mt_tasks": TASKS, **ROWS[row]}
    settings = {"total_steps": 4, "save_interval": 2, "ema_rate": "0.5", **settings}
    train(write_tasks(run.with_suffix(".yaml"), folder, run, settings, **params))
    return run


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> Path:
    return run_of(folder, tmp_path_factory.mktemp("plain") / "run", "plain")


@pytest.mark.parametrize("row", [row for row in ROWS if row != "plain"])
def test_a_weighted_run(row, folder, plain, tmp_path):
    """It resumes to the bit, logs its weights, has nothing new in the model's own files, and can be drawn from."""
    whole = run_of(folder, tmp_path / "whole", row)
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    shutil.rmtree(step_folder(halves, 4))
    run_of(folder, halves, row)
    expected, found = contents(step_folder(whole, 4)), contents(step_folder(halves, 4))
    for one in (expected, found):
        del one["config.yaml"]
    assert_same(expected, found)
    assert progress(whole) == progress(halves)
    theirs = contents(step_folder(plain, 4))
    for name in ("model.safetensors", "ema_0.5.safetensors"):
        assert {k: v.shape for k, v in found[name].items()} == {k: v.shape for k, v in theirs[name].items()}
    assert "weighting" not in theirs["training_state.pt"]["run"]
    assert ("weighting" in found["training_state.pt"]["run"]) == (row != "dtr")
    factors = [name for name in progress(whole)[0] if name.startswith("task_weight_")]
    assert len(factors) == (3 if row in ("uncertainty", "pcgrad") else 0)
    if row == "uncertainty":
        assert column(whole, "task_weight_denoising")[-1] != 1
    assert column(whole, "loss") != column(plain, "loss")
    latent_sample.main(words(model_path=whole, out=tmp_path / "drawn", num_samples=2, steps=2, device="cpu"))


def test_settings_that_resume_must_repeat(folder, plain, tmp_path):
    for row, key in (("uncertainty", "mt_task_weighting"), ("dtr", "mt_routing")):
        run = Path(shutil.copytree(plain, tmp_path / row))
        with pytest.raises(UserError, match=rf"trained with other settings: .*{key}"):
            run_of(folder, run, row, total_steps=5)


def test_routed_weights_are_not_handed_to_code_without_routing(folder, tmp_path):
    run = run_of(folder, tmp_path / "run", "dtr", total_steps=1)
    with pytest.raises(UserError, match=r"trained with mt_routing dtr, which latent-diffusion's code does not have"):
        export_ldm.main(words(model_path=run, out=tmp_path / "out.ckpt"))


def test_an_older_run_goes_on(folder, plain, tmp_path):
    """Its file names no weights and no routing."""
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    saved = step_folder(run, 4) / "config.yaml"
    config = OmegaConf.load(saved)
    for key in [key for key in config.model.params if re.match(r"mt_(timestep|task_w|interval|routing)", key)]:
        del config.model.params[key]
    saved.write_text(OmegaConf.to_yaml(config))
    run_of(folder, run, "plain", total_steps=5)
    assert step_folder(run, 5).exists()


MASKED = {"masked": {}}
BAD = [
    (
        {"mt_tasks": {"masked": {"timestep_weights": "p3"}}},
        r"mt_tasks\.masked\.timestep_weights 'p3' is none of uniform, p2",
    ),
    ({"mt_timestep_weights": "p3"}, r"model\.params\.mt_timestep_weights 'p3' is none of uniform, p2"),
    ({"mt_task_weighting": "pcgard"}, r"model\.params: mt_task_weighting: 'pcgard' is none of fixed"),
    ({"mt_task_weighting_interval": 0}, r"model\.params: mt_task_weighting_interval must be at least 1"),
    ({"mt_interval_rule": "snrr"}, r"model\.params: mt_interval_rule: 'snrr' is none of uniform, snr"),
    ({"mt_routing": "drt"}, r"model\.params: mt_routing: 'drt' is none of none, dtr"),
    ({"mt_routing_beta": 1.5}, r"model\.params: mt_routing_beta must be between 0.1 and 1"),
    (
        {"mt_task_weighting": "nash", "mt_loss_weight": 0.0},
        r"model\.params\.mt_task_weighting nash weighs at least 2 tasks .* train the image alone",
    ),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=str)
def test_what_cannot_be(values, expected):
    with pytest.raises(UserError) as caught:
        random_model(**{"mt_sides": [], "mt_swap_prob": 0.0, "mt_tasks": MASKED, **values})
    assert re.search(expected, str(caught.value)), caught.value


def test_gradients_are_measured_once_a_step_however_many_batches_it_has(folder, tmp_path, monkeypatch):
    """Accumulated gradients: on the first batch of a step, which the dropout and the draws of the step stay the same for."""
    pytest.importorskip("torchjd", reason="needs the extra 'tasks'")
    measured: list[int] = []

    def solved(solve, gramian, seed):
        assert gramian.shape == (3, 3) and (gramian - gramian.T).abs().max() < 1e-9
        measured.append(seed)

    monkeypatch.setattr("guided_mt.modalities.weighting.on_gradients.solved", solved)
    params = {"mt_variant": "any", "mt_tasks": TASKS, **ROWS["pcgrad"], "mt_task_weighting_interval": 1}
    runs = {}
    for name, changed in {"pcgrad": params, "fixed": {**params, "mt_task_weighting": "fixed"}}.items():
        file = write_tasks(
            tmp_path / f"{name}.yaml", folder, tmp_path / name, {"total_steps": 3, "ema_rate": "0.5"}, **changed
        )
        train(file, "lightning.trainer.accumulate_grad_batches=2")
        runs[name] = progress(tmp_path / name)
    assert measured == [0, 1, 2]
    names = runs["fixed"][0].keys()
    assert [{key: row[key] for key in names} for row in runs["pcgrad"]] == runs["fixed"]
