"""The U-Net: ADM's names and numbers, and the properties of what we add."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn

from guided_mt.errors import UserError
from guided_mt.networks.classifier import create_classifier
from guided_mt.networks.create import create_model
from guided_mt.networks.layers import AttentionBlock, Context, GroupNorm32, make_output_block
from guided_mt.networks.unet import UNetModel

RELEASED = json.loads(gzip.decompress((GOLDEN / "adm_released_keys.json.gz").read_bytes()))
TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4", "num_heads": 2}


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    arrays = np.load(GOLDEN / f"{name}.npz")
    return json.loads((GOLDEN / f"{name}.json").read_text()), {k: torch.from_numpy(arrays[k]) for k in arrays.files}


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The golden values' weights: a formula over the sorted parameter names."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            v = np.sin(12.9898 * (np.arange(p.numel()) + 1.0) + 78.233 * (i + 1) + seed)
            if p.ndim > 1:
                v = v * 1.7 / math.sqrt(p[0].numel())
            else:
                v = 0.1 * v + name.endswith("weight")
            p.copy_(torch.from_numpy(v.astype(np.float32)).view(p.shape))
    return model


def tiny(seed: int = 3, **options) -> UNetModel:
    return fill(create_model(**{**TINY, **options}), seed)


def batch(size: int = 8, n: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=generator), torch.tensor([7, 900])[:n]


@pytest.mark.parametrize("name", ["adm_unet_uncond", "adm_unet_classcond_updown"])
def test_golden(name):
    spec, arrays = golden(name)
    model = create_model(**spec["constructor"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["parameter_shapes"]
    fill(model, spec["fill_seed"]).eval()
    with torch.no_grad():
        output = model(arrays["x"], arrays["timesteps"], arrays.get("y"))
    assert (output - arrays["output"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", RELEASED)
def test_released_keys(name):
    with torch.device("meta"):
        model = (create_classifier if "classifier" in name else create_model)(**RELEASED[name]["constructor"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == RELEASED[name]["state_dict"]


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
def test_attention_is_explicit_softmax_attention(new_order, with_context):
    channels, heads, dim = 64, 4, 16
    block = AttentionBlock(channels, num_heads=heads, use_new_attention_order=new_order)
    block.add_context(8)
    block = fill(block, seed=1).double()
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    context = torch.randn(2, 7, 8, dtype=torch.float64) if with_context else None

    def parts(projected: Tensor, n: int) -> list[Tensor]:  # [B, n * C, L] -> n of [B, heads, dim, L]
        if new_order:
            return [p.reshape(2, heads, dim, -1) for p in projected.chunk(n, dim=1)]
        return list(projected.reshape(2, heads, n * dim, -1).split(dim, dim=2))

    q, k, v = parts(block.qkv(block.norm(x).flatten(2)), 3)
    if with_context:
        context_k, context_v = parts(block.encoder_kv(context.transpose(1, 2)), 2)
        k, v = torch.cat([context_k, k], dim=-1), torch.cat([context_v, v], dim=-1)
    weight = torch.softmax(torch.einsum("bhdt,bhds->bhts", q, k) / math.sqrt(dim), dim=-1)
    attended = torch.einsum("bhts,bhds->bhdt", weight, v).reshape(2, channels, -1)
    expected = x + block.proj_out(attended).view(x.shape)
    torch.testing.assert_close(block(x, None, Context(context) if with_context else None), expected)


def test_modulated_norm_is_norm_then_scale_and_shift():
    norm = fill(GroupNorm32(64), seed=1).double()
    x, scale_shift = torch.randn(3, 64, 4, 6, dtype=torch.float64), torch.randn(3, 128, dtype=torch.float64)
    scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(norm.modulated(image, scale_shift), norm(x) * (1 + scale) + shift)


def test_checkpointing_gives_equal_gradients():
    x, t = batch()
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny(use_checkpoint=use_checkpoint, dropout=0.1, use_scale_shift_norm=True, resblock_updown=True)
        torch.manual_seed(0)
        model(x, t).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_condition_is_a_concatenated_convolution():
    x, t = batch()
    condition = torch.randn(2, 2, 8, 8)
    ours = tiny(condition_channels=2)
    wide = create_model(**TINY, in_channels=5)
    state = ours.state_dict()
    state["input_blocks.0.0.weight"] = torch.cat(
        [state["input_blocks.0.0.weight"], state.pop("condition_in.weight")], 1
    )
    state["out.2.weight"], state["out.2.bias"] = (wide.state_dict()[k] for k in ("out.2.weight", "out.2.bias"))
    wide.load_state_dict(state)
    wide.out = ours.out
    torch.testing.assert_close(ours(x, t, condition=condition), wide(torch.cat([x, condition], 1), t))


def test_new_condition_leaves_the_output_bit_identical():
    x, t = batch()
    plain, conditional = tiny(), create_model(**TINY, condition_channels=3)
    assert set(conditional.state_dict()) - set(plain.state_dict()) == {"condition_in.weight"}
    missing = conditional.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["condition_in.weight"]
    assert torch.equal(plain(x, t), conditional(x, t, condition=torch.randn(2, 3, 8, 8)))


def test_context_attends_and_no_context_is_the_plain_model():
    x, t = batch()
    plain, ours = tiny(), tiny(context_dim=6)
    ours.load_state_dict(plain.state_dict(), strict=False)
    context = torch.randn(2, 5, 6)
    assert torch.equal(plain(x, t), ours(x, t))
    output = ours(x, t, context=context)
    assert not torch.allclose(output, plain(x, t))
    torch.testing.assert_close(ours(x, t, context=context.flip(1)), output)  # a set of tokens: order is no matter


@pytest.mark.parametrize("updown", [False, True])
def test_bf16_is_close_and_returns_float32(updown):
    x, t = batch()
    model = tiny(use_scale_shift_norm=True, resblock_updown=updown)
    expected = model(x, t)
    model.precision = "bf16"
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a caller's autocast doesn't reach the output block
        output, features = model(x, t), model.features(x, t)
    assert output.dtype == features.last.dtype == features.middle.dtype == torch.float32
    assert 0 < (output - expected).abs().mean() < 0.03 * expected.std()
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_features_have_the_promised_shapes():
    model = tiny()
    x, t = batch()
    features = model.features(x, t)
    assert features.last.shape == (2, model.feature_channels, 8, 8)
    assert features.middle.shape == (2, model.middle_channels, 4, 4)
    head = make_output_block(model.feature_channels, model.input_channels, 5)
    assert list(head.state_dict()) == [k.removeprefix("out.") for k in model.state_dict() if k.startswith("out.")]
    assert torch.equal(head(features.last), torch.zeros(2, 5, 8, 8))


@pytest.mark.parametrize(
    "options", [{"use_scale_shift_norm": True, "resblock_updown": True}, {"use_checkpoint": True, "precision": "bf16"}]
)
def test_compiles_to_one_graph_without_recompiling(options):
    torch._dynamo.reset()
    model = tiny(class_cond=True, num_classes=10, condition_channels=1, attention_resolutions="", **options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, _ = batch()

    def step(t: list[int], y: list[int]) -> None:
        arguments = (x, torch.tensor(t), torch.tensor(y), None, torch.randn(2, 1, 8, 8))
        output = compiled(*arguments)
        output.square().mean().backward()
        if model.precision == "fp32":
            torch.testing.assert_close(output, model(*arguments))

    step([0, 1], [2, 3])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in ([5, 5], [999, 0], [17, 300]):
            step(t, [t[0] % 10, 9])
    torch._dynamo.reset()


def test_attention_sizes_that_do_not_occur_do_nothing():
    names = create_model(**{**TINY, "attention_resolutions": "32,16,4"}).state_dict().keys()
    assert names == create_model(**TINY).state_dict().keys()


@pytest.mark.parametrize("size", [8, 16, 32])
def test_small_sizes_have_a_default_channel_mult(size):
    with torch.device("meta"):
        create_model(**{**TINY, "image_size": size})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 48}, "--channel_mult"),
        ({"image_size": 20, "channel_mult": "1,2,2,2"}, "--image_size 20"),
        ({"channel_mult": "1,b"}, "--channel_mult"),
        ({"channel_mult": "1,0"}, "--channel_mult"),
        ({"attention_resolutions": "16,x"}, "--attention_resolutions"),
        ({"attention_resolutions": "0"}, "--attention_resolutions"),
        ({"num_channels": 40}, "--num_channels"),
        ({"num_heads": 3}, "--num_heads 3"),
        ({"num_head_channels": 48}, "--num_head_channels 48"),
        ({"precision": "fp8"}, "--precision"),
    ],
)
def test_bad_configurations_name_the_flag(options, message):
    with pytest.raises(UserError, match=message):
        create_model(**{**TINY, **options})


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"x": torch.zeros(2, 4, 8, 8)}, r"x must be \[B, 3, H, W\]"),
        ({}, {"x": torch.zeros(2, 3, 8, 9)}, "multiples of 2"),
        ({}, {"timesteps": torch.zeros(3)}, "timesteps"),
        ({}, {"y": torch.zeros(2, dtype=torch.long)}, "without classes"),
        ({"class_cond": True}, {}, "y is missing"),
        ({"class_cond": True}, {"y": torch.zeros(1, dtype=torch.long)}, "y must be"),
        ({"condition_channels": 3}, {}, "condition .* is missing"),
        ({"condition_channels": 3}, {"condition": torch.zeros(2, 3, 4, 4)}, "condition must be"),
        ({}, {"condition": torch.zeros(2, 3, 8, 8)}, "without condition_channels"),
        ({}, {"context": torch.zeros(2, 1, 6)}, "without context_dim"),
        ({"context_dim": 6}, {"context": torch.zeros(2, 6)}, "context must be"),
    ],
)
def test_bad_inputs_get_one_clear_line(options, change, message):
    model = create_model(**TINY, **options)
    with pytest.raises(UserError, match=message) as error:
        model(**{"x": torch.zeros(2, 3, 8, 8), "timesteps": torch.zeros(2), **change})
    assert "\n" not in str(error.value)
