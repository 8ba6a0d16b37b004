"""The MT model: ADM's U-Net plus heads and conditions, and the registry that builds it."""

from __future__ import annotations

import pytest
import torch

from guided_mt.diffusion.network import as_denoising
from guided_mt.diffusion.random import SampleStreams
from guided_mt.generation.build import (
    build_diffusion,
    build_modalities,
    build_model,
    model_sections,
    multi_task_options,
)
from guided_mt.modalities import Images, Pixels
from guided_mt.modalities.registry import TASKS
from guided_mt.networks.create import create_model
from guided_mt.networks.model import VARIANTS, MTModel
from guided_mt.runs.backbones import BACKBONES
from guided_mt.runs.config import ModelConfig, parse

TINY = [
    "--image_size",
    "8",
    "--num_channels",
    "32",
    "--num_res_blocks",
    "1",
    "--channel_mult",
    "1,1",
    "--attention_resolutions",
    "4",
    "--learn_sigma",
    "True",
]


def tiny(*flags: str):
    torch.manual_seed(0)
    flags = (
        "--noise_schedule",
        "cosine",
        "--num_classes",
        "7",
        "--representation_size",
        "5",
        "--caption_length",
        "3",
        *flags,
    )
    config = parse([*TINY, *flags], model_sections(), description="")
    return config, build_model(config)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # ADM's zero layers would hide everything behind them
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.05)


def inputs(config, batch: int = 3):
    rng = torch.Generator().manual_seed(1)
    x_start = torch.randn(batch, 3, 8, 8, generator=rng).clamp(-1, 1)
    streams = SampleStreams(torch.arange(batch))
    captions = torch.tensor([[2, 3, 4], [3, 0, 0], [4, 2, 0]])
    beside = {"representation": torch.randn(batch, 5, generator=rng), "caption": captions[:batch]}
    images, modalities = Images(x_start, torch.arange(batch), beside, {"paired": -x_start}), build_modalities(config)
    if "random-caption" in modalities:
        modalities["random-caption"].table = captions
    data = {name: m.from_batch(images, streams) for name, m in modalities.items()}
    return x_start, torch.tensor([0, 400, 999][:batch]), data


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_task_and_variant_predicts_its_modality(task, variant):
    config, model = tiny("--mt_task", task, "--mt_variant", variant)
    randomise(model)
    z_t, t, data = inputs(config)
    result = as_denoising(model)(z_t, t, data if variant != "U" else {})
    assert result.output.shape == (3, 6, 8, 8)
    modality = build_modalities(config, model)[task]
    assert modality.loss(result.predictions[task], data[task]).shape == (3,)
    assert modality.encode(modality.estimate(result.predictions[task])).shape == z_t.shape
    assert modality.encode(modality.prior(z_t.shape[1:], SampleStreams(torch.arange(3)))).shape == z_t.shape
    assert build_diffusion(config).aggregation.shift({task: modality.encode(data[task])}, t).shape == z_t.shape


def test_the_u_net_inside_is_adms():
    """With the same weights, the output of form U is the plain U-Net's, and the others' too while their new inputs are zero."""
    _, plain = tiny()
    unet = create_model(
        8,
        32,
        1,
        channel_mult="1,1",
        learn_sigma=True,
        attention_resolutions="4",
        num_heads=4,
        use_scale_shift_norm=True,
    )
    randomise(unet)
    assert set(unet.state_dict()) == set(plain.state_dict())
    for variant in VARIANTS:
        config, model = tiny("--mt_task", "masked", "--mt_variant", variant)
        model.load_state_dict(unet.state_dict(), strict=False)
        z_t, t, data = inputs(config)
        result = as_denoising(model)(z_t, t, data if variant != "U" else {})
        assert torch.equal(result.output, unet(z_t, t))


def test_form_x_uses_its_condition():
    config, model = tiny("--mt_task", "masked", "--mt_variant", "X")
    randomise(model)
    z_t, t, data = inputs(config)
    other = {"masked": -data["masked"]}
    assert not torch.equal(model(z_t, t, data).output, model(z_t, t, other).output)


@pytest.mark.parametrize("variant, given", [("U", {"masked": 1}), ("X", {"label": 1}), ("any", {"label": 1})])
def test_what_is_given_must_fit_the_variant(variant, given):
    _, model = tiny("--mt_task", "masked", "--mt_variant", variant)
    with pytest.raises(ValueError, match=f"variant {variant} is given"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1), {name: torch.zeros(1, 3, 8, 8) for name in given})


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown variant 'Y'"):
        MTModel(heads={}, variant="Y")


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_training_neither_breaks_the_graph_nor_recompiles(variant):
    """One graph for every step: new timesteps, data and weights must not trigger a recompilation."""
    config, model = tiny("--mt_task", "masked", "--mt_variant", variant)
    randomise(model)
    diffusion = build_diffusion(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x_start, t, data = inputs(config)
    given, encodings = ({}, data) if variant == "U" else (data, {})

    def step(shift: int) -> None:
        terms = diffusion.training_losses(compiled, x_start, (t + shift) % 1000, {"modalities": given}, None, encodings)
        (terms["loss"].mean() + terms["predictions"]["masked"].mean()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-4 * parameter.grad

    step(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in (1, 50):
            step(shift)
    assert list(model.image_inputs) == ([] if variant == "U" else ["masked"])


@pytest.mark.parametrize("task", ["masked", "label"])
def test_unconditional_is_for_all_samples_or_for_each(task):
    config, model = tiny("--mt_task", task, "--mt_variant", "any", "--class_cond", "True")
    randomise(model)
    z_t, t, data = inputs(config)
    y, all_of_them = torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool)
    for one, each in ((False, ~all_of_them), (True, all_of_them)):
        torch.testing.assert_close(
            model(z_t, t, data, y, unconditional=one).output, model(z_t, t, data, y, unconditional=each).output
        )
    torch.testing.assert_close(model(z_t, t, data, y, unconditional=False).output, model(z_t, t, data, y).output)


@torch.no_grad()
def test_unconditional_samples_see_the_other_context_and_no_modality():
    """A negative prompt: its tokens in the place of the caller's, and nothing of what the modalities are given."""
    torch.manual_seed(0)
    config, _ = tiny("--mt_task", "label", "--mt_variant", "any")
    parts = multi_task_options(config, build_diffusion(config), Pixels(8))
    options = {key: value for key, value in config.as_dict(ModelConfig).items() if key not in ("compile", "use_fp16")}
    model = BACKBONES["unet"].make(**options, **parts, learn_sigma=True, context_dim=12, conditioned=True).eval()
    randomise(model)
    z, t, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999]), {"label": torch.tensor([1, 2, 3])}
    told, other = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    away = torch.tensor([False, True, True])
    made = model(z, t, labels, context=told, unconditional=away, unconditional_context=other).output
    absent = {"label": torch.ones(3, dtype=torch.bool)}
    torch.testing.assert_close(made[1:], model(z, t, {}, context=other, absent=absent).output[1:])
    torch.testing.assert_close(made[:1], model(z, t, labels, context=told).output[:1])
    everywhere = model(z, t, labels, context=told, unconditional=True, unconditional_context=other).output
    torch.testing.assert_close(everywhere[1:], made[1:])
    # Without it an unconditional sample sees no token at all, as before.
    bare = model(z, t, labels, context=told, unconditional=away).output
    torch.testing.assert_close(bare[1:], model(z, t, labels, context=told, unconditional=True).output[1:])
    assert (bare[1:] - made[1:]).abs().max() > 1e-3
