"""latent-diffusion's U-Net and schedules: the parents' numbers, the released checkpoints' entries, context and its masks."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_unet import GOLDEN, fill, golden

from guided_mt.errors import UserError
from guided_mt.networks.layers import Context
from guided_mt.networks.transformer import CrossAttention, SpatialTransformer
from latent_mt.model.schedules import BETA_SCHEDULES, ddim_timesteps, make_beta_schedule
from latent_mt.model.unet import UNetModel

RELEASED = json.loads(gzip.decompress((GOLDEN / "ldm_unet_keys.json.gz").read_bytes()))
TINY = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
}


@pytest.mark.parametrize("name", ["ldm_unet_crossattention", "ldm_unet_plain", "sd2_unet_linear_projection"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_golden(name, use_checkpoint):
    spec, arrays = golden(name)
    model = UNetModel(**{**spec["constructor"], "use_checkpoint": use_checkpoint})
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["parameter_shapes"]
    fill(model, spec["fill_seed"]).eval()
    output = model(arrays["x"], arrays["timesteps"], arrays.get("context"))
    assert (output - arrays["output"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_entries(name):
    with torch.device("meta"):
        model = UNetModel(**RELEASED[name]["unet_params"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == RELEASED[name]["state_dict"]
    if name == "stable-diffusion-2-base":
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 865.9
        assert "(865.9 M parameters)" in (ROOT / "docs" / "from_latent_diffusion.md").read_text()


def test_masked_tokens_play_no_part():
    """A token that is left out is as if it weren't there; a sample without any attends to nothing; none is NaN."""
    torch.manual_seed(0)
    attention = CrossAttention(32, 2, context_dim=6)
    x, tokens = torch.randn(3, 5, 32), torch.randn(3, 4, 6)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    out = attention(x, Context(tokens, mask))
    torch.testing.assert_close(out[0], attention(x, Context(tokens))[0])
    torch.testing.assert_close(out[1], attention(x, Context(tokens[:, :2]))[1])
    assert (out[2] == 0).all()


def test_no_context_is_no_token():
    torch.manual_seed(0)
    block = fill(SpatialTransformer(32, 2, context_dim=6), 1)
    x = torch.randn(2, 32, 4, 4)
    none = block(x, None)
    hidden = block(x, None, Context(torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.bool)))
    torch.testing.assert_close(none, hidden)
    assert not torch.allclose(none, block(x, None, Context(torch.randn(2, 3, 6))))


def test_dropped_and_masked_context_has_finite_gradients():
    block = fill(SpatialTransformer(32, 2, context_dim=6), 1)
    tokens = torch.randn(2, 3, 6, requires_grad=True)
    mask = torch.tensor([[True] * 3, [False] * 3])
    block(torch.randn(2, 32, 4, 4), None, Context(tokens, mask)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in [tokens, *block.parameters()])
    assert (tokens.grad[1] == 0).all() and (tokens.grad[0] != 0).any()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dims": 3}, "no dims"),
        ({"n_embed": 8192}, "n_embed"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"context_dim": 8}, "use_spatial_transformer: true"),
        ({"use_spatial_transformer": True}, "needs context_dim"),
        ({"use_spatial_transformer": True, "context_dim": [8, 9]}, "one width"),
        ({"num_heads": 5}, "doesn't divide"),
        ({"model_channels": 40}, "model_channels"),
        ({"channel_mult": []}, "channel_mult"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(UserError, match=message):
        UNetModel(**{**TINY, **wrong})


def test_precisions():
    model = fill(UNetModel(**TINY, use_spatial_transformer=True, context_dim=6), 2)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 3, 6)
    exact = model(x, t, context)
    model.precision = "bf16"
    rough = model(x, t, context)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.std()


def test_schedules():
    parents = np.load(GOLDEN / "ldm_schedules.npz")
    for name, found in {
        "betas_linear_0.0015_0.0195": make_beta_schedule("linear", 1000, 0.0015, 0.0195),
        "betas_linear_0.00085_0.012": make_beta_schedule("linear", 1000, 0.00085, 0.012),
        "betas_cosine_0.0001_0.02": make_beta_schedule("cosine", 1000),
    }.items():
        np.testing.assert_allclose(found, parents[name], rtol=1e-10)
    for count in (50, 200):
        assert ddim_timesteps(count, 1000) == parents[f"ddim_timesteps_uniform_{count}"].tolist()
    for name in BETA_SCHEDULES:
        betas = make_beta_schedule(name, 100)
        assert betas.shape == (100,) and (betas > 0).all() and (betas[:-1] < 1).all()
        assert (betas[-1] == 1) == (name == "straight")  # which ends in pure noise
    assert ddim_timesteps(3, 10) == [1, 4, 7]  # the parent's 10 is no timestep
    with pytest.raises(UserError, match=r"none of linear, .*did you mean linear"):
        make_beta_schedule("liner", 10)
    with pytest.raises(UserError, match="must be above 0"):
        make_beta_schedule("linear", 10, linear_start=-1.0)
