"""`latent_sample.py --compile`: the same graphs for all timesteps and batches, and the same latents."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_latent import DIT, UNET, random_model
from torch._dynamo.testing import CompileCounter

from latent_mt.model.generate import LatentGenerator, LatentSampleConfig


@pytest.mark.parametrize(
    ("target", "params"), [("latent_mt.model.unet.UNetModel", UNET), ("models.DiT", {**DIT, "learn_sigma": True})]
)
def test_the_graphs_serve_all_timesteps_of_all_batches(monkeypatch, target, params):
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    network = {"target": target, "params": params}
    model = random_model(mt_variant="U", unet_config=network).requires_grad_(False)
    plain, compiled = LatentGenerator(model), LatentGenerator(model, compiling="True")
    options, counts = LatentSampleConfig(steps=4), []
    for seeds in ([0, 1], [2, 3]):
        side = torch.linspace(-1, 1, 2 * model.channels * model.size**2).view(2, model.channels, model.size, model.size)
        wanted, found = (generator.made_from({"night": side}, seeds, options) for generator in (plain, compiled))
        torch.testing.assert_close(found, wanted)
        counts.append(counter.frame_count)
    assert counts == [3, 3]  # network, what is read off it, and the move
