"""The diffusion transformer: the published names and numbers, and the properties of what we add."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor, nn

from guided_mt.errors import UserError
from guided_mt.networks.dit import CONTEXTS, DiT
from guided_mt.networks.dit.blocks import ContextAttention
from guided_mt.networks.dit.positions import resized_positions, sin_cos_positions
from guided_mt.networks.layers import Context

RELEASED = json.loads(gzip.decompress((GOLDEN / "dit_released_keys.json.gz").read_bytes()))
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
TINY = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The golden values' weights: a formula over the sorted names, where `pos_embed` counts and keeps its values."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.state_dict().items())):
            v = np.sin(12.9898 * (np.arange(p.numel()) + 1.0) + 78.233 * (i + 1) + seed)
            v = v * 1.7 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * v + name.endswith("weight")
            if name != "pos_embed":
                p.copy_(torch.from_numpy(v.astype(np.float32)).view(p.shape))
    return model


def tiny(**options) -> DiT:
    return fill(DiT(**{**TINY, **options}), 4).eval()


def batch(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator), torch.tensor([7.0, 900.0]), torch.tensor([4, -1])


@pytest.mark.parametrize("name", ["dit_small_patch2", "dit_small_pixels"])
def test_golden(name):
    spec, arrays = json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz")
    arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    model = DiT(**spec["constructor"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["parameter_shapes"]
    assert (model.pos_embed - arrays["pos_embed"]).abs().max() <= 1e-6
    fill(model, spec["fill_seed"]).eval()
    with torch.no_grad():
        output = model(arrays["x"], arrays["timesteps"], arrays["y"])
    assert (output - arrays["output"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", RELEASED)
def test_released_keys(name):
    size, patch = name.removeprefix("DiT-").split("/")
    depth, hidden_size, num_heads = SIZES[size]
    with torch.device("meta"):
        model = DiT(32, int(patch), hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    assert model.pos_embed.is_meta
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == RELEASED[name]["state_dict"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_before_training_blocks_are_the_identity_and_the_output_is_zero(context):
    """adaLN-Zero: "initializing the entire DiT block as the identity function" (Peebles and Xie, section 3.2)."""
    model = DiT(**TINY, context_dim=6, context=context, condition_channels=2)
    x, t, y = batch()
    tokens, condition = torch.randn(2, 3, 6), torch.randn(2, 2, 8, 8)
    features = model.features(x, t, y, tokens, condition)
    patches = model.x_embedder(x) + model.pos_embed.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(features.last, patches, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.middle, features.last, rtol=0, atol=0)
    assert not model.output(features).any() and not model.make_output(5)(features.last, features.embedding).any()


def test_new_parts_start_so_that_a_loaded_model_says_what_it_said():
    """Form any from released weights: condition and context are there, and the output is the same to the bit."""
    plain = tiny()
    wide = DiT(**TINY, context_dim=6, condition_channels=2).eval()
    new = wide.load_state_dict(plain.state_dict(), strict=False)
    assert not new.unexpected_keys and {key.split(".")[-3] for key in new.missing_keys if "blocks" in key} == {
        "context_attn"
    }
    x, t, y = batch()
    with torch.no_grad():
        got = wide.output(wide.features(x, t, y, torch.randn(2, 3, 6), torch.randn(2, 2, 8, 8)))
        assert torch.equal(got, plain(x, t, y))


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_beside_the_published_network_takes_no_random_numbers_from_it(context):
    torch.manual_seed(0)
    plain = DiT(**TINY).state_dict()
    torch.manual_seed(0)
    wide = DiT(**TINY, context_dim=6, context=context, condition_channels=2).state_dict()
    assert all(torch.equal(value, wide[key]) for key, value in plain.items())


def test_a_sample_without_class_has_the_null_class():
    model, (x, t, _) = tiny(), batch()
    with torch.no_grad():
        assert torch.equal(model(x, t, torch.tensor([-1, -1])), model(x, t, torch.tensor([5, 5])))
        without = tiny(class_dropout_prob=0.0)
        assert without.y_embedder.embedding_table.weight.shape[0] == 5
        nothing = without.features(x, t, torch.tensor([-1, -1])).embedding
        torch.testing.assert_close(nothing, without.t_embedder(t))
        classless = tiny(num_classes=None)
        assert not any(key.startswith("y_embedder") for key in classless.state_dict())
        assert classless(x, t).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_few_and_to_many_tokens_is_softmax_attention(tokens, masked):
    attention = fill(ContextAttention(32, 4, 6), 2).double()
    assert (2 * 4 * tokens <= 32) == (tokens <= 4)  # both ways are reached
    x, context = torch.randn(3, 7, 32, dtype=torch.float64), torch.randn(3, tokens, 6, dtype=torch.float64)
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0], mask[1] = False, True
    h = nn.functional.layer_norm(x, (32,), eps=1e-6)
    q = attention.q(h).view(3, 7, 4, 8).transpose(1, 2)
    k, v = (part.view(3, tokens, 4, 8).transpose(1, 2) for part in attention.kv(context).chunk(2, dim=2))
    scores = q @ k.transpose(2, 3) / 8**0.5
    if masked:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num()
    wanted = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    if masked:
        wanted[0] = 0
    torch.testing.assert_close(attention(x, Context(context, mask if masked else None)), wanted, rtol=1e-10, atol=1e-10)


def test_heads_read_the_block_that_is_asked_for():
    (x, t, y), middles = batch(), []
    for middle in (1, None, 4):
        model = tiny(middle=middle)
        with torch.no_grad():
            features = model.features(x, t, y)
            found = []
            hook = model.trunk.register_forward_hook(lambda module, args, out, found=found: found.append(out))
            model.features(x, t, y)
            hook.remove()
        torch.testing.assert_close(found[0].transpose(1, 2).unflatten(2, (4, 4)), features.middle)
        middles.append(features.middle)
    assert torch.equal(middles[2], features.last) and not torch.allclose(middles[0], middles[1])


def test_positions_are_interpolated_to_other_sizes():
    table = sin_cos_positions(16, 6)
    assert torch.equal(resized_positions(table, 6, 6), table)
    wide = resized_positions(table, 6, 12).unflatten(1, (6, 12))
    rows = table.unflatten(1, (6, 6))
    torch.testing.assert_close(wide[:, :, ::2, 8:], rows[..., 8:], rtol=0, atol=1e-5)  # rows are where they were
    between = (wide[:, :, 5, :8] + wide[:, :, 6, :8]) / 2
    torch.testing.assert_close(between, (rows[:, :, 2, :8] + rows[:, :, 3, :8]) / 2, rtol=0, atol=0.1)
    model, (x, t, y) = tiny(), batch(12)
    with torch.no_grad():
        assert model(x, t, y).shape == (2, 6, 12, 12) and model(x[..., :4, :], t, y).shape == (2, 6, 4, 12)


@pytest.mark.parametrize("context", CONTEXTS)
def test_checkpointing_changes_no_gradient(context):
    x, t, y = batch()
    tokens, mask = torch.randn(2, 3, 6), torch.tensor([[True, False, True], [False, False, False]])
    found = []
    for use_checkpoint in (False, True):
        model = tiny(context_dim=6, context=context, use_checkpoint=use_checkpoint)
        model.output(model.features(x, t, y, tokens, None, mask)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_bf16_is_close_and_its_output_float32():
    (x, t, y), tokens = batch(), torch.randn(2, 1, 6)
    exact, rough = (tiny(context_dim=6, precision=precision) for precision in ("fp32", "bf16"))
    with torch.no_grad():
        a, b = (model.output(model.features(x, t, y, tokens)) for model in (exact, rough))
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "--image_size 8 is not a multiple of --dit_patch_size 3"),
        ({"num_heads": 3}, "--dit_hidden_size 32 is not a multiple of --dit_num_heads 3"),
        ({"hidden_size": 6}, "--dit_hidden_size 6 is not a multiple of 4"),
        ({"depth": 1}, "--dit_depth 1: at least two blocks"),
        ({"middle": 5}, "--dit_middle 5: there are blocks 1 to 4"),
        ({"context": "beside"}, "--dit_context must be one of cross, in-context"),
        ({"precision": "fp8"}, "--precision must be one of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DiT(**{**TINY, **options})


def test_inputs_that_do_not_fit_are_refused():
    model, (x, t, y) = tiny(), batch()
    for args, message in [
        ((x[..., :7], t, y), "multiples of 2 for this network, not 8 x 7"),
        ((x, t), "y is missing"),
        ((x, t, y, torch.randn(2, 3, 6)), "context given to a model without context_dim"),
    ]:
        with pytest.raises(UserError, match=message):
            model.features(*args)
