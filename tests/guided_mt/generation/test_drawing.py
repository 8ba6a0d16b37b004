"""What a request for samples means: timesteps, samplers, and the warning where drawing begins in the wrong place."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.errors import UserError
from guided_mt.generation.drawing import draw, start_warning, take_parents_sampler, visited
from guided_mt.runs.config import Config, DiffusionConfig, SampleConfig, SamplingOptions


def full(schedule: str = "cosine", weights: str = "paper"):
    return create_gaussian_diffusion(noise_schedule=schedule, mt_weights={"x": weights})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_network_calls_where_the_sampler_wants_them(sampler):
    options = SamplingOptions(sampler=sampler, steps=20)
    process = visited(full(), options)
    wanted = "20" if sampler == "ddpm" else "solver20"
    assert process.timestep_map.tolist() == kept_timesteps(full(weights="none"), wanted)
    framed = visited(full(), options, in_frame=["x"]).timestep_map.tolist()
    assert framed == (kept_timesteps(full(), wanted))
    for respacing in ("10,5", "ddim25"):  # ADM's flag keeps its meaning, and goes first
        assert visited(full(), options, respacing).timestep_map.tolist() == kept_timesteps(full(), respacing)
    assert visited(full(), SamplingOptions(sampler=sampler, steps=5000)).num_timesteps == 1000
    with pytest.raises(UserError, match="timestep_respacing"):
        visited(full(), options, "ddim999")


def test_every_option_reaches_the_sampler():
    """A draw equals `sample` with the same values, each of them other than its default."""
    process = full().respace(kept_timesteps(full(), "solver6"))
    model = lambda z, t, unconditional=None: torch.tanh(1.5 * z)  # noqa: E731
    plain = {"sampler": "ddim", "clip_denoised": False, "eta": 0.7, "dynamic_threshold": 0.9, "guidance_scale": 2.0}
    options = SamplingOptions(**plain, mt_condition="algorithm1", mt_condition_scale=0.5)
    found = draw(model, process, {}, (3, 2, 2), [4, 5], options, device=torch.device("cpu")).x_start
    direct = sample(
        model, process, {}, (2, 3, 2, 2), seeds=[4, 5], **plain, conditioning="algorithm1", conditioning_scale=0.5
    ).x_start
    assert torch.equal(found, direct)
    for name, value in plain.items():
        other = dataclasses.replace(options, **{name: SamplingOptions.__dataclass_fields__[name].default})
        drawn = draw(model, process, {}, (3, 2, 2), [4, 5], other, device=torch.device("cpu")).x_start
        unseen = name in (
            "clip_denoised",
            "guidance_scale",
        )  # the threshold clips too; without conditions nothing is guided
        assert unseen or not torch.equal(drawn, found), (name, value)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_start_far_from_the_marginal_is_said_where_it_is_carried_along(sampler):
    options = SamplingOptions(sampler=sampler)
    assert bool(start_warning(full("linear"), options, ["x"])) == (sampler not in ("ddpm", "sde-dpm++"))
    assert not start_warning(full("linear"), options, [])
    assert not start_warning(full("linear", "bridge"), options, ["x"])
    assert not start_warning(full("cosine"), options, ["x"])


@pytest.mark.parametrize(
    ("respacing", "typed", "use_ddim", "rule"),
    [
        ("250", (), False, "ddpm"),
        ("ldm50", (), False, "ddim"),
        ("frame20", (), False, "dpm++"),
        ("", (), False, "dpm++"),
        ("250", ("sampler",), False, "dpm++"),
        ("ddim25", (), True, "ddim"),
    ],
)
def test_timesteps_named_as_a_parents_are_walked_by_its_sampler(respacing, typed, use_ddim, rule):
    sections = [SampleConfig(use_ddim=use_ddim), DiffusionConfig(timestep_respacing=respacing)]
    config = Config(sections, frozenset({"timestep_respacing", *typed}))
    take_parents_sampler(config)
    assert config[SampleConfig].rule == rule
