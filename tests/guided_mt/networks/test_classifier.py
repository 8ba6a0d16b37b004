"""ADM's noisy classifier: names, numbers, every pool."""

from __future__ import annotations

import pytest
import torch
from test_unet import fill, golden

from guided_mt.errors import UserError
from guided_mt.networks.classifier import POOLS, EncoderUNetModel, create_classifier

TINY = {
    "image_size": 8,
    "classifier_use_fp16": False,
    "classifier_width": 64,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "4",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "num_classes": 5,
}
ADM_POOL_KEYS = {
    "adaptive": {"out.0.weight", "out.0.bias", "out.3.weight", "out.3.bias"},
    "attention": {"out.0.weight", "out.0.bias", "out.2.positional_embedding"}
    | {f"out.2.{part}.{kind}" for part in ("qkv_proj", "c_proj") for kind in ("weight", "bias")},
    "spatial": {f"out.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")},
    "spatial_v2": {f"out.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")},
}


def tiny(pool: str) -> EncoderUNetModel:
    return fill(create_classifier(**TINY, classifier_pool=pool), seed=2)


def test_golden():
    spec, arrays = golden("adm_classifier_attention")
    model = create_classifier(**spec["constructor"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["parameter_shapes"]
    fill(model, spec["fill_seed"]).eval()
    with torch.no_grad():
        output = model(arrays["x"], arrays["timesteps"])
    assert (output - arrays["output"]).abs().max() <= 1e-4


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_has_adm_names_and_depends_on_x_and_t(pool):
    model = tiny(pool)
    assert {k for k in model.state_dict() if k.startswith("out.")} == ADM_POOL_KEYS[pool]
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    logits = model(x, torch.tensor([3, 700]))
    assert logits.shape == (2, 5)
    assert not torch.equal(logits[1], model(x, torch.tensor([3, 100]))[1])
    (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), x)  # what classifier guidance takes
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("pool", POOLS)
def test_bf16_is_close_and_returns_float32(pool):
    model = tiny(pool)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = model(x, t)
    model.precision = "bf16"
    output = model(x, t)
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_bad_input():
    with pytest.raises(UserError, match="--classifier_pool"):
        tiny("mean")
    with pytest.raises(UserError, match="--classifier_attention_resolutions"):
        create_classifier(**{**TINY, "classifier_attention_resolutions": "a"}, classifier_pool="adaptive")
    with pytest.raises(UserError, match="images of size 8"):
        tiny("attention")(torch.zeros(1, 3, 16, 16), torch.zeros(1))
