"""`--compile` in sampling: the same graphs for all timesteps of all batches, and the samples of the plain network to rounding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny import MODEL, PROCESS, words
from torch._dynamo.testing import CompileCounter

from guided_mt.generation.build import bind, build_modalities, build_model, run_sections
from guided_mt.generation.compiling import compiled_arithmetic, compiled_encoder, compiled_network
from guided_mt.generation.generate import Generator
from guided_mt.runs.compiling import CUDA_GRAPHS
from guided_mt.runs.config import SampleConfig, parse

SEEDS = ([0, 1, 2], [3, 4, 5])


def generators(how: str, **values: Any) -> list[Generator]:
    """The same model twice: plain, and compiled."""
    config = parse(words(**MODEL, **PROCESS, **values), run_sections(), description="")
    torch.manual_seed(0)
    modalities = build_modalities(config)
    model = build_model(config, modalities)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().requires_grad_(False)
    network, encode = compiled_network(model, how), compiled_encoder(model, how)
    found = []
    for options in ({}, {"network": network, "encode": encode, "arithmetic": compiled_arithmetic(how)}):
        own = build_modalities(config)
        bind(own, config, model, encode=options.get("encode"))
        for modality in own.values():
            if modality.tracks_variance:
                modality.use_variance(torch.ones(config.diffusion_steps))
        found.append(Generator(config, model, own, None, **options))
    return found


@pytest.mark.parametrize(
    ("trained", "settings", "given", "graphs"),
    [
        ({"mt_task": "masked", "mt_variant": "U"}, {"sampler": "ddpm"}, False, 3),
        ({"mt_task": "masked", "mt_variant": "U"}, {"sampler": "dpm++"}, True, 3),  # own head, with its backward pass
        ({"mt_task": "masked", "mt_variant": "X", "mt_drop_prob": 0.1}, {"guidance_scale": 2.0}, True, 3),
        # And the encoder, whose estimates lie in memory in another way than what was drawn at first.
        ({"mt_task": "label", "mt_variant": "U", "num_classes": 4}, {"sampler": "heun"}, False, 5),
    ],
)
def test_the_graphs_of_a_step_serve_all_timesteps(monkeypatch, trained, settings, given, graphs):
    """Network, what is read off it, and the move to the next timestep; the second batch needs no other."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    plain, compiled = generators("True", **trained)
    for seeds in SEEDS:
        known = {"masked": torch.linspace(-1, 1, 3 * 3 * 8 * 8).view(3, 3, 8, 8)} if given else {}
        wanted, found = (g.draw(seeds, SampleConfig(steps=6, **settings), known) for g in (plain, compiled))
        torch.testing.assert_close(found.x_start, wanted.x_start)
        torch.testing.assert_close(found.modalities, wanted.modalities)
        assert counter.frame_count == graphs


def test_what_cuda_graphs_return_is_copied(monkeypatch):
    """Each call of a CUDA graph overwrites what the last one returned, which a sampler still holds."""
    returned: dict[Any, Any] = {}

    def overwriting(function, mode=None, **options):
        if mode != CUDA_GRAPHS:
            return function

        def call(*arguments, **given):
            seen = function(*arguments, **given)
            made = [seen] if isinstance(seen, torch.Tensor) else [seen.output, *seen.predictions.values()]
            for old in returned.get(function, []):
                old.fill_(torch.nan)
            returned[function] = made
            return seen

        return call

    monkeypatch.setattr(torch, "compile", overwriting)
    for trained in ({"mt_task": "masked"}, {"mt_task": "label", "num_classes": 4}):
        plain, compiled = generators(CUDA_GRAPHS, mt_variant="U", **trained)
        wanted, found = (g.draw(SEEDS[0], SampleConfig(steps=6, sampler="unipc")) for g in (plain, compiled))
        assert torch.equal(found.x_start, wanted.x_start) and returned
