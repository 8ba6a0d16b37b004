"""Denoising Task Routing: its windows against the published formula, the blocks against its equation, and runs with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_unet import batch, fill, tiny
from tiny import assert_same, column, contents, flags, step_folder, words

from guided_mt.commands import export, sample, train
from guided_mt.errors import UserError
from guided_mt.generation.build import build_model, run_sections
from guided_mt.networks.layers import AttentionBlock, Context, Downsample, ResBlock
from guided_mt.networks.routing import Route, Routing
from guided_mt.networks.transformer import SpatialTransformer
from guided_mt.networks.unet import UNetModel
from guided_mt.runs.config import parse

ROUTED = {"mt_task": "masked,label", "mt_variant": "any", "num_classes": 10, "mt_routing": "dtr"}


@pytest.mark.parametrize(("alpha", "beta", "channels"), [(4, 0.8, 1152), (4, 0.8, 37), (1, 0.5, 64), (0.5, 0.29, 100)])
@pytest.mark.parametrize(("steps", "scale"), [(1000, 1.0), (250, 4.0)])
def test_windows_are_the_published_ones(alpha, beta, channels, steps, scale):
    """Park et al. 2024: int(beta C) channels from round(((t - 1) / (T - 1))^alpha (C - int(beta C))) on, their t counted from 1."""
    routing = Routing(alpha, beta, (steps - 1) * scale)
    mask = routing.of_timesteps(torch.arange(steps) * scale).mask(channels)
    assert mask.shape == (steps, channels, 1, 1) and mask.dtype == torch.bool
    width = int(channels * beta)
    first = ((np.linspace(0, 1, steps) ** alpha) * (channels - width)).round().astype(int)
    expected = np.zeros((steps, channels), dtype=bool)
    for t in range(steps):
        expected[t, first[t] : first[t] + width] = True
    np.testing.assert_array_equal(mask[..., 0, 0], expected)
    assert mask[0, 0] and mask[-1, -1]


def test_every_modality_has_a_window_of_its_own_for_its_encoding():
    """Beside that of the cleanest image, which begins at the first channel."""
    routing, like = Routing(4, 0.8, 999.0, ("label", "vector")), torch.zeros(3, 5)
    first = [routing.of_task(name, like).mask(100)[:, :, 0, 0].int().argmax(1).tolist() for name in routing.tasks]
    assert first == [[10] * 3, [20] * 3]


BLOCKS = {
    "residual": lambda: ResBlock(32, 32, 16),
    "residual, wider": lambda: ResBlock(32, 64, 16, use_scale_shift_norm=True),
    "residual, smaller": lambda: ResBlock(32, 64, 16, resample="down"),
    "residual, larger": lambda: ResBlock(32, 32, 16, resample="up"),
    "attention": lambda: AttentionBlock(32, num_heads=4),
    "transformer": lambda: SpatialTransformer(32, 4, context_dim=8),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_routed_block_is_the_published_equation(name):
    """block(x m) + x (1 - m); where the block changes x's shape, its own skip connection of x (1 - m)."""
    block = fill(BLOCKS[name](), seed=2).double().eval()
    x, emb = torch.randn(3, 32, 4, 4, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    context = Context(torch.randn(3, 5, 8, dtype=torch.float64)) if name == "transformer" else None
    route = Route(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 0.8)
    mask = route.mask(32).double()
    skip = getattr(block, "skip_connection", torch.nn.Identity())
    resample = getattr(block, "resample", torch.nn.Identity())
    without = skip(resample(x * (1 - mask))) - skip(torch.zeros_like(resample(x)))  # its bias is in the block
    torch.testing.assert_close(block(x, emb, context, route), block(x * mask, emb, context) + without)
    changed = torch.where(mask > 0, x, x + 1)  # what lies outside the window passes by, and is nowhere read
    difference = block(changed, emb, context, route) - block(x, emb, context, route)
    torch.testing.assert_close(difference, skip(resample(changed)) - skip(resample(x)))


def test_what_is_no_residual_block_is_not_routed():
    block, x = Downsample(32, True), torch.randn(2, 32, 4, 4)
    assert torch.equal(block(x, None, None, Route(torch.zeros(2, dtype=torch.float64), 0.5)), block(x, None))


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True, "resblock_updown": True}], ids=str)
def test_with_all_channels_it_is_the_network_to_the_bit(options):
    """beta = 1; and with less it is another one, with other windows at other timesteps."""
    (x, t), model = batch(), tiny(**options)
    with torch.no_grad():
        plain = model.output(model.features(x, t))
        every = model.output(model.features(x, t, route=Routing(4, 1.0, 999).of_timesteps(t)))
        routed = model.output(model.features(x, t, route=Routing(4, 0.8, 999).of_timesteps(t)))
        moved = model.output(model.features(x, t, route=Routing(1, 0.8, 999).of_timesteps(t)))
    assert torch.equal(every, plain)
    assert not torch.allclose(routed, plain) and not torch.allclose(routed[1], moved[1])


def test_recomputed_activations_give_the_same_gradients():
    (x, t), gradients = batch(), []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint)
        route = Routing(4, 0.8, 999).of_timesteps(t)
        model.output(model.features(x, t, route=route)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*gradients)


def network(**values: Any) -> Any:
    torch.manual_seed(0)
    return fill(build_model(parse(flags(**{**ROUTED, **values}), run_sections(), description="")), seed=1).eval()


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_network_of_a_run_is_routed_by_what_it_is_told(rescaled):
    """Same entries and weights as without; E(x) by the modality's own window; the sample's neighbours don't matter."""
    model, plain = network(rescale_timesteps=rescaled), network(mt_routing="none")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.routing == Routing(4.0, 0.8, 39 * (25.0 if rescaled else 1.0), ("label",)) and plain.routing is None
    z, t, x = torch.randn(2, 3, 8, 8), torch.tensor([0.0, model.routing.last]), {"label": torch.tensor([1, 2])}
    with torch.no_grad():
        both = model(z, t, x).output
        torch.testing.assert_close(both[1:], model(z[1:], t[1:], {"label": x["label"][1:]}).output)
        encoded = model.encode_modality("label", x["label"])
        object.__setattr__(model.routing, "tasks", ("label", "another"))
        assert not torch.allclose(model.encode_modality("label", x["label"]), encoded)


def few_steps(run: Path, steps: int, **values: Any) -> Path:
    train.main(
        flags(**{**ROUTED, "log_dir": run, "total_steps": steps, "ema_rate": "0.5", "save_interval": 2, **values})
    )
    return run


def test_a_routed_run(tmp_path):
    """It trains, goes on, draws by its own setting, starts from plain weights, and is not handed to code without routing."""
    run = few_steps(tmp_path / "run", 3)
    few_steps(tmp_path / "halves", 2)
    halves = few_steps(tmp_path / "halves", 3)
    expected, found = contents(step_folder(run, 3)), contents(step_folder(halves, 3))
    for one in (expected, found):
        del one["config.yaml"]
    assert_same(expected, found)

    plain = few_steps(tmp_path / "plain", 2, mt_routing="none")
    assert contents(step_folder(plain, 2))["model.safetensors"].keys() == found["model.safetensors"].keys()
    routed, unrouted = (
        few_steps(tmp_path / f"from plain {name}", 1, resume_checkpoint=plain, mt_routing=name)
        for name in ("dtr", "none")
    )
    assert column(routed, "loss") != column(unrouted, "loss")
    out = tmp_path / "drawn.npz"
    sample.main(words(model_path=run, out=out, num_samples=2, steps=2, device="cpu"))
    with np.load(out) as drawn:
        assert drawn["arr_0"].shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match=r"trained with --mt_routing dtr, which guided-diffusion's code does not have"):
        export.main(words(model_path=run, out=tmp_path / "adm.pt"))
    export.main(words(model_path=plain, out=tmp_path / "adm.pt"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mt_routing": "dtrr"}, r"--mt_routing: 'dtrr' is none of none, dtr"),
        ({"mt_routing_beta": 0}, r"--mt_routing_beta must be between 0.1 and 1"),
        ({"mt_routing_alpha": -1}, r"--mt_routing_alpha must be at least 0"),
    ],
    ids=str,
)
def test_what_cannot_be(values, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        few_steps(tmp_path, 1, **values)


def test_a_backbone_without_channels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(UNetModel, "routes", False)
    with pytest.raises(UserError, match="--mt_routing: MTUNet has no channels that can be routed"):
        few_steps(tmp_path, 1)


def test_a_run_does_not_change_its_routing_on_the_way(tmp_path):
    run = few_steps(tmp_path, 2, mt_routing="none")
    with pytest.raises(UserError, match=r"mt_routing \(none there, dtr here\)"):
        few_steps(run, 3)
