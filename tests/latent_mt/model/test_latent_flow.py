"""Flow models of latents: the same rows by latent-diffusion's keys, and what they are refused beside."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_same, column, contents, step_folder, words
from tiny_latent import UNET, random_model, train
from tiny_tasks import write_data, write_tasks

from guided_mt.errors import UserError
from latent_mt.commands import export_diffusers, export_ldm, latent_sample
from latent_mt.model.schedules import make_beta_schedule
from latent_mt.runs.hugging_face.scheduler import to_diffusers

FLOW = {"beta_schedule": "straight", "parameterization": "velocity"}
TASKS = {"masked": {}, "label": {"num_classes": 3}}


def test_the_schedule_is_that_of_pixels():
    assert make_beta_schedule("straight", 40)[-1] == 1
    full = random_model(**FLOW).diffusion
    tau = np.arange(1, 41) / 40
    np.testing.assert_allclose(full.alphas_cumprod, (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("time", ["steps", "data-level"])
def test_a_run(time, tmp_path):
    """It trains, goes on to the bit, draws with modalities unknown and given, and is not handed to code without it."""
    folder = write_data(tmp_path)
    params = {"mt_variant": "any", "mt_tasks": TASKS, "mt_time": time, **FLOW}
    settings = {"total_steps": 4, "save_interval": 2, "ema_rate": "0.5"}
    whole = tmp_path / "whole"
    train(write_tasks(whole.with_suffix(".yaml"), folder, whole, settings, **params))
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    shutil.rmtree(step_folder(halves, 4))
    train(write_tasks(halves.with_suffix(".yaml"), folder, halves, settings, **params))
    expected, found = contents(step_folder(whole, 4)), contents(step_folder(halves, 4))
    for one in (expected, found):
        del one["config.yaml"]
    assert_same(expected, found)
    assert np.isfinite(column(whole, "loss")).all()
    for sampler in ("ddim", "dpm++", "ddpm"):
        options = {"num_samples": 2, "steps": 3, "sampler": sampler, "device": "cpu"}
        latent_sample.main(words(model_path=whole, out=tmp_path / sampler, **options))
    with pytest.raises(
        UserError,
        match=r"trained with (mt_time data-level|parameterization velocity), which latent-diffusion's code does not have",
    ):
        export_ldm.main(words(model_path=whole, out=tmp_path / "out.ckpt"))
    if time != "steps":
        with pytest.raises(UserError, match="trained with mt_time data-level, which diffusers does not have"):
            export_diffusers.main(words(model_path=whole, out=tmp_path / "pipeline"))
    with pytest.raises(UserError, match="parameterization velocity: diffusers' schedulers know eps, v, x0 alone"):
        to_diffusers(params, make_beta_schedule("straight", 40))


def test_the_network_is_told_the_straight_path():
    plain, told = (
        random_model(**FLOW, mt_sides=[], mt_swap_prob=0.0, mt_time=time) for time in ("steps", "data-level")
    )
    told.load_state_dict(plain.state_dict())
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([9, 39])
    tau = (t + 1) / 40
    length = torch.sqrt((1 - tau) ** 2 + tau**2).view(-1, 1, 1, 1)
    with torch.no_grad():
        found, expected = told.network(z_t, t).output, plain.network(length * z_t, 1 - tau).output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


BAD = [
    ({"beta_schedule": "straight"}, r"model\.params: the schedule ends in pure noise .*predict velocity, v or x0"),
    ({**FLOW, "mt_time": "data"}, r"model\.params: mt_time: 'data' is none of steps, noise-level, data-level"),
    ({**FLOW, "beta_schedule": "strait"}, r"beta_schedule 'strait' is none of .*did you mean straight"),
    (
        {
            **FLOW,
            "mt_time": "noise-level",
            "cond_stage_config": "__is_first_stage__",
            "conditioning_key": "concat",
            "unet_config": {"target": "latent_mt.model.unet.UNetModel", "params": {**UNET, "in_channels": 8}},
        },
        r"model\.params\.mt_time noise-level: .*conditioning_key concat",
    ),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_what_cannot_be(values, expected):
    with pytest.raises(UserError) as caught:
        random_model(**{"mt_sides": [], "mt_swap_prob": 0.0, **values})
    assert re.search(expected, str(caught.value)), caught.value
