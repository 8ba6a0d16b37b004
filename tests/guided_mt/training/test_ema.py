"""Averages where memory is short: on the host, and in bfloat16 with stochastic rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_same, contents, flags

from guided_mt.commands import train
from guided_mt.runs.loop_config import LoopConfig
from guided_mt.training.ema import DEVICES, DTYPES, Ema, rounded_at_random


def test_stochastic_rounding_is_right_in_the_mean():
    values = torch.tensor([1.0, 1.001, -3.003, 1e-8, 0.0]).repeat(20_000, 1)
    found = rounded_at_random(values, torch.Generator().manual_seed(0)).float()
    error = (found.mean(0) - values[0]).abs()
    assert (error <= values[0].abs() * 2e-4).all()
    assert all(len(found[:, k].unique()) <= 2 for k in range(5))
    assert (found[:, 0] == 1).all() and (found[:, 4] == 0).all()
    nearest = values.to(torch.bfloat16).float()
    assert ((found - nearest).abs() <= values.abs() / 128).all()


def test_small_steps_are_not_rounded_away():
    """Of 1 - rate = 0.001 a bfloat16 rounded to the nearest would keep none once it has come near."""
    layer = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    ema = Ema(layer, ["0.999"], dtype="bf16")
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for step in range(2000):
        ema.update(step=step)
    found = ema.averages["0.999"][0]
    assert found.dtype == torch.bfloat16
    assert float(found.float().mean()) == pytest.approx(1 - 0.999**2000, abs=0.01)  # 0.865


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_come_back_as_they_were(device, dtype):
    layer = torch.nn.Linear(3, 2)
    ema = Ema(layer, ["0.5"], device, dtype)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.update(step=1)
    after = layer.weight.detach().clone()
    with ema.slowest_in(layer):
        torch.testing.assert_close(layer.weight, (before + after) / 2, atol=2e-2, rtol=0)
        assert not layer.training
    assert torch.equal(layer.weight, after) and layer.training
    ema.follow()
    state = ema.state_dict("0.5", layer)
    assert state["weight"].dtype == torch.float32
    other = Ema(layer, ["0.5"], device, dtype)
    other.load("0.5", state)
    assert all(torch.equal(a, b) for a, b in zip(ema.averages["0.5"], other.averages["0.5"], strict=True))


def test_the_flags_have_these_values():
    choices = {name: field.metadata["choices"] for name, field in LoopConfig.__dataclass_fields__.items()}
    assert choices["ema_device"] == DEVICES and choices["ema_dtype"] == tuple(DTYPES)


def trained(run: Path, *steps: int, **values) -> dict:
    for total in steps:
        train.main(flags(log_dir=run, total_steps=total, save_interval=2, ema_rate="0.9,0.5", **values))
    found = contents(run / "checkpoints" / f"step_{steps[-1]:08d}")
    return {name: x for name, x in found.items() if name != "config.yaml"}


def test_runs_with_averages_on_the_host_and_in_bf16(tmp_path):
    plain = trained(tmp_path / "plain", 4)
    assert_same(plain, trained(tmp_path / "host", 4, ema_device="cpu"))
    whole = trained(tmp_path / "whole", 4, ema_dtype="bf16")
    assert_same(whole, trained(tmp_path / "parts", 2, 4, ema_dtype="bf16"))
    assert_same(plain["model.safetensors"], whole["model.safetensors"])
    for rate in ("0.9", "0.5"):
        exact = plain[f"ema_{rate}.safetensors"]
        found = load_file(tmp_path / "whole" / "checkpoints" / "step_00000004" / f"ema_{rate}.safetensors")
        assert all(x.dtype == exact[key].dtype for key, x in found.items())
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=2e-2)
