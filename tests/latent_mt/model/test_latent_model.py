"""LatentMTDiffusion against what is known: exact conditionals of Gaussian latents, guided_mt's losses, LDM's own kinds of model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import JointGaussian, frechet
from test_samplers import conditional_error, covariance, finite_sample_error
from tiny_latent import (
    DDCONFIG,
    FIRST_STAGE,
    LATENT,
    SIZE,
    UNET,
    model_params,
    newest_weights,
    train,
    write_config,
    write_images,
    write_pairs,
)
from torch import nn

from guided_mt.data import Batch
from guided_mt.data.images import from_uint8
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion, LossType
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.networks.unet import UNetModel as SharedUNet
from latent_mt.data import PairData
from latent_mt.first_stage.latents import write_cache
from latent_mt.model import codec
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.model.network import DiffusionWrapper
from latent_mt.model.tasks import PAIRED
from latent_mt.runs.ldm_checkpoint import LDMCheckpoint, load_ldm, schedule_buffers, write_ldm
from latent_mt.runs.targets import instantiate

IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {"in_channels": 3}}
PIXEL_UNET = {**UNET, "in_channels": 3, "out_channels": 3}


def build(seed: int = 0, **params) -> LatentMTDiffusion:
    """A tiny model, `params` over those of `model_params`, with random weights everywhere, as a trained one has."""
    torch.manual_seed(seed)
    made = instantiate({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model_params(**params)}, "m")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def unet(**values) -> dict:
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**UNET, **values}}


# ---------------------------------------------------------------- Gaussian latents

SHAPE = (3, 2, 2)
D = int(np.prod(SHAPE))
N = 1500


class Oracle(nn.Module):
    """In the place of a model's network: the best one for Gaussian latents. Role 1 is the same pair, read the other way round."""

    def __init__(self, model: LatentMTDiffusion, data: JointGaussian):
        super().__init__()
        self.diffusion_model, self.only = model.network, model.roles.trained[0]
        self.sides = [data, JointGaussian(data.cov_x, data.cov_z, data.cross.T)]
        self.framed = [side.network_u(model.diffusion, PAIRED) for side in self.sides]
        self.given = [side.network_x(model.diffusion, PAIRED) for side in self.sides]

    def forward(self, z_t, t, modalities, y=None) -> ModelOutput:
        role = self.only if y is None else int(y[0])
        return (self.given if modalities else self.framed)[role](z_t, t, modalities)


def oracle(variant: str, weights: str, data: JointGaussian, swap: float = 0.5) -> LatentGenerator:
    """LDM's linear schedule, and the exact network and head variance for `data`."""
    small = {**PIXEL_UNET, "image_size": 2, "channel_mult": [1], "attention_resolutions": []}
    model = build(
        timesteps=1000,
        linear_start=0.0015,
        linear_end=0.0195,
        image_size=2,
        channels=3,
        first_stage_config=IDENTITY,
        unet_config=unet(**small),
        mt_variant=variant,
        mt_weights=weights,
        mt_swap_prob=swap,
    )
    exact = Oracle(model, data)
    for tracked, role in zip(model.network.head_variance.values(), model.roles.trained, strict=False):
        tracked.error_sum.copy_(torch.tensor(exact.sides[role].head_variance(model.diffusion, PAIRED)))
        tracked.error_count.fill_(1)
    model.model = exact
    return LatentGenerator(model)


STEPS = {"ddpm": 100, "ddim": 60, "dpm++": 60}


def conditional_of(generator: LatentGenerator, role: int, **settings) -> tuple[float, float]:
    """Errors of mean and covariance of what is drawn in `role` given the other side, less what as many exact draws would have."""
    asked = generator.latent.model.sides[role]
    x = torch.from_numpy(asked.draw_x(N, np.random.default_rng(0))).float().view(N, *SHAPE)
    known = {generator.roles.sides[1 - role]: x}
    drawn = generator.draw(range(N), LatentSampleConfig(**settings), known).x_start
    of_mean, of_cov = conditional_error(asked, drawn, x)
    cov = asked.given_x()[1]
    return of_mean - np.trace(cov) * D / N, of_cov - finite_sample_error(cov, N)


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.parametrize("weights", ["paper", "bridge"])
@pytest.mark.parametrize("variant", ["U", "X", "any"])
def test_translation_draws_from_the_exact_conditional(variant, weights, sampler):
    """Both roles of one model. Form U by its own head, which is exact for isotropic data; X and any are given the other side."""
    data = JointGaussian.make(D, seed=2, isotropic=variant == "U")
    generator = oracle(variant, weights, data)
    assert generator.roles.trained == (0, 1)
    for role in generator.roles.trained:
        of_mean, of_cov = conditional_of(generator, role, sampler=sampler, steps=STEPS[sampler])
        assert of_mean < 0.02 and of_cov < 0.04


@pytest.mark.parametrize("sampler", STEPS)
@pytest.mark.parametrize("weights", ["paper", "bridge"])
@pytest.mark.parametrize("variant", ["U", "any"])
def test_pairs_from_nothing(variant, weights, sampler):
    """z_0 has its own law, and the other side is what the head estimates of it; in the order of mt_sides, whichever is z_0.

    LDM's schedule takes `paper` up to alpha-tilde 4.6 at T, where z_T is then not N(0, I): the deterministic samplers carry that
    error along (a third of the data's variance here), the ancestral one forgets it, and `bridge`, which ends at 0, has none.
    """
    data = JointGaussian.make(D, seed=1)
    for swap in (0.0, 1.0):
        generator = oracle(variant, weights, data, swap)
        (role,) = generator.roles.trained
        made = generator.made_from({}, range(N), LatentSampleConfig(sampler=sampler, steps=STEPS[sampler]))
        sides = [made[name] for name in generator.roles.sides]
        z, x = sides[role], sides[1 - role]
        asked = generator.latent.model.sides[role]
        error = frechet(covariance(z), asked.cov_z) - finite_sample_error(asked.cov_z, N)
        if weights == "paper" and sampler != "ddpm":
            assert error > 0.2 * np.trace(asked.cov_z)
        else:
            assert error < 0.015 * np.trace(asked.cov_z)
        estimate = z.flatten(1).double() @ torch.from_numpy(np.linalg.inv(asked.cov_z) @ asked.cross)
        assert float((x.flatten(1) - estimate).square().sum(1).mean()) < 0.02 * np.trace(asked.cov_x)


def test_each_role_has_the_variance_of_its_head():
    """Form U both ways, where one direction leaves more open than the other: own head needs each role's own variance."""
    eye = np.eye(D)
    generator = oracle("U", "bridge", JointGaussian(1.4 * eye, 0.6 * eye, 0.8 * eye))
    for role in generator.roles.trained:
        of_mean, of_cov = conditional_of(generator, role, sampler="dpm++", steps=40)
        assert of_mean < 0.03 and of_cov < 0.03


def test_training_tracks_each_role(tmp_path):
    train(write_config(tmp_path / "a.yaml", write_pairs(tmp_path / "pairs"), tmp_path / "run", mt_variant="U"))
    weights = newest_weights(tmp_path / "run")
    tracked = [
        weights[f"model.diffusion_model.head_variance.{n}.error_count"].sum() for n in (PAIRED, f"{PAIRED}_swapped")
    ]
    assert min(tracked) > 3 and sum(tracked) == pytest.approx(16, rel=0.1)  # 4 steps of 4 pairs; older ones fade


# ---------------------------------------------------------------- training


class Recorder(nn.Module):
    """In the place of a model's network: keeps what it was shown, and predicts zeros."""

    def __init__(self, model: LatentMTDiffusion):
        super().__init__()
        self.diffusion_model, self.seen = model.network, []

    def forward(self, z_t, timesteps, modalities, **options) -> ModelOutput:
        self.seen.append((z_t, modalities, options))
        return ModelOutput(torch.zeros_like(z_t), {PAIRED: torch.zeros_like(z_t)})


def pixels(count: int = 6, sides: int = 2, size: int = SIZE, labels: bool = False) -> Batch:
    images = torch.randint(0, 256, (count, 3 * sides, size, size), dtype=torch.uint8)
    numbers = torch.arange(count)
    return Batch(images, numbers % 3 if labels else None, numbers, numbers)


def streams(batch: Batch) -> SampleStreams:
    return SampleStreams(7, batch.positions)


def latents_of(model: LatentMTDiffusion, batch: Batch) -> list[torch.Tensor]:
    """By side."""
    images = model.images(batch, streams(batch))
    return [images.x_start, *images.sides.values()]


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_without_sides_it_is_guided_mts_diffusion(loss_type, parameterization):
    """No sides, pixels as latents: guided_mt's GaussianDiffusion on the shared U-Net with the same weights, to the last bit."""
    settings = {"loss_type": loss_type, "parameterization": parameterization}
    params = {"first_stage_config": IDENTITY, "unet_config": unet(**{**PIXEL_UNET, "image_size": 8}), "channels": 3}
    model = build(mt_sides=[], image_size=8, **params, **settings)
    batch = pixels(sides=1, size=8)
    losses, t = model.losses(batch, streams(batch))
    shared = SharedUNet(image_size=8, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, num_heads=2,
                        attention_resolutions=(2,), channel_mult=(1, 1))  # fmt: skip
    shared.load_state_dict(model.network.state_dict())
    own = model.diffusion
    plain = GaussianDiffusion(
        betas=own.betas, model_mean_type=own.model_mean_type, model_var_type=own.model_var_type,
        loss_type={"l1": LossType.L1, "l2": LossType.MSE}[loss_type],
    )  # fmt: skip
    drawn = streams(batch)
    drawn.uniform()  # mirroring
    assert torch.equal(t, (drawn.uniform() * own.num_timesteps).long())
    expected = plain.training_losses(shared.eval(), from_uint8(batch.images), t, {}, drawn.normal(3, 8, 8))
    assert torch.equal(losses.loss, expected["loss"]) and torch.equal(losses.denoising, expected["loss"])
    assert list(losses.terms) == [{"l1": "l1", "l2": "mse"}[loss_type]] and not losses.predicted


def test_mirroring_is_of_both_sides_and_before_encoding():
    model, batch = build(), pixels()
    plain = latents_of(model, batch)
    model.random_flip = True
    found = latents_of(model, batch)
    flip = streams(batch).uniform() < 0.5
    assert 0 < flip.sum() < len(flip)
    images = from_uint8(batch.images)
    drawn = streams(batch)
    drawn.uniform()
    for side, latents, unflipped in zip(images.chunk(2, dim=1), found, plain, strict=True):
        mean, logvar = model.first_stage_model.encode_moments(torch.where(flip.view(-1, 1, 1, 1), side.flip(-1), side))
        torch.testing.assert_close(latents, mean + torch.exp(0.5 * logvar) * drawn.normal(4, LATENT, LATENT))
        assert torch.equal(latents[~flip], unflipped[~flip]) and not torch.equal(latents[flip], unflipped[flip])


@pytest.mark.parametrize("swap", [0.0, 0.5, 1.0])
def test_swapping_exchanges_the_sides_and_says_so_by_the_class(swap):
    model, batch = build(mt_variant="X", mt_swap_prob=swap), pixels()
    first, second = latents_of(model, batch)
    model.model = recorder = Recorder(model)
    losses, t = model.losses(batch, streams(batch))
    z_t, modalities, options = recorder.seen[0]
    swapped = modalities[PAIRED].flatten(1).eq(first.flatten(1)).all(1)
    assert torch.equal(modalities[PAIRED], torch.where(swapped.view(-1, 1, 1, 1), first, second))
    abar = torch.from_numpy(model.diffusion.alphas_cumprod).float()[t].view(-1, 1, 1, 1)
    z_0 = torch.where(swapped.view(-1, 1, 1, 1), second, first)
    noise = (z_t - abar.sqrt() * z_0) / (1 - abar).sqrt()  # form X: no frame
    torch.testing.assert_close(losses.terms["mse"], noise.square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    if swap == 0.5:
        assert torch.equal(options["y"], swapped.long()) and 0 < swapped.sum() < len(swapped)
        assert model.network.num_classes == 2
    else:
        assert swapped.all() if swap else not swapped.any()
        assert "y" not in options and model.network.num_classes is None


@pytest.mark.parametrize("precision, near", [("float32", 1e-5), ("float16", 5e-3)])
def test_a_cache_gives_the_batches_of_the_images(tmp_path, precision, near):
    """Same streams, mirroring and swapping included: latents and losses to rounding."""
    params = {
        "path": str(write_pairs(tmp_path / "pairs")),
        "image_size": SIZE,
        "batch_size": 6,
        "sides": ["day", "night"],
    }
    model = build()
    model.random_flip = True
    images = PairData(**params, num_workers=0)
    write_cache(
        images.pixel_source("train"), model.first_stage_model, SIZE, tmp_path / "cache/train",
        precision=precision, num_workers=0,
    )  # fmt: skip
    cached = PairData(**params, num_workers=0, latents=str(tmp_path / "cache"))
    for data in (images, cached):
        data.open()
    for expected, found in zip(images.stream(seed=3, total_steps=2), cached.stream(seed=3, total_steps=2), strict=True):
        assert torch.equal(expected.positions, found.positions) and torch.equal(expected.indices, found.indices)
        assert found.images.dtype != torch.uint8
        for a, b in zip(latents_of(model, expected), latents_of(model, found), strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near)
        a, b = (model.losses(batch, streams(batch))[0] for batch in (expected, found))
        torch.testing.assert_close(a.loss, b.loss, rtol=near, atol=near)
        torch.testing.assert_close(a.terms, b.terms, rtol=near, atol=near)


# ---------------------------------------------------------------- LDM's own models


def train_images(folder, params: dict, *overrides: str) -> dict[str, torch.Tensor]:
    """Two steps on folders of three classes; the weights."""
    file = write_config(folder / "config.yaml", write_images(folder / "images"), folder / "run", mt_sides=[], **params)
    train(file, "run.total_steps=2", *overrides)
    return newest_weights(folder / "run")


CLASSES = {
    "conditioning_key": "crossattn",
    "cond_stage_key": "class_label",
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 16, "n_classes": 3, "key": "class_label"},
    },
    "unet_config": unet(num_head_channels=32, num_heads=-1, use_spatial_transformer=True, context_dim=16),
}


def test_unconditional_ldm_trains_with_l1(tmp_path):
    weights = train_images(tmp_path, {"loss_type": "l1", "cond_stage_config": "__is_unconditional__"})
    header, *rows = (tmp_path / "run/progress.csv").read_text().splitlines()
    assert "l1" in header.split(",") and "paired" not in header and len(rows) == 2
    assert not any("condition_in" in key or "heads." in key for key in weights)


@pytest.mark.parametrize("trainable", [True, False])
def test_class_conditional_ldm_trains(tmp_path, trainable):
    one = train_images(tmp_path, {**CLASSES, "cond_stage_trainable": trainable}, "run.total_steps=1")
    two = train_images(tmp_path, {**CLASSES, "cond_stage_trainable": trainable})
    key = "cond_stage_model.embedding.weight"
    assert one[key].shape == (3, 16) and torch.equal(one[key], two[key]) != trainable
    inside = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert not torch.equal(one[inside], two[inside])


def test_a_class_conditional_ldm_sees_the_class():
    model, batch = build(mt_sides=[], **CLASSES), pixels(sides=1, labels=True)
    losses, *_ = model.losses(batch, streams(batch))
    other = Batch(batch.images, (batch.labels + 1) % 3, batch.indices, batch.positions)
    assert not torch.isclose(losses.loss, model.losses(other, streams(batch))[0].loss).any()
    with pytest.raises(UserError, match="only class_label"):
        model.losses(Batch(batch.images, None, batch.indices, batch.positions), streams(batch))


@pytest.mark.parametrize(
    "key, options, condition",
    [
        (None, {}, {}),
        ("concat", {"in_channels": 7}, {"c_concat": (3, LATENT, LATENT)}),
        (
            "crossattn",
            {"use_spatial_transformer": True, "context_dim": 16},
            {"c_crossattn": (5, 16)},
        ),
        (
            "hybrid",
            {"in_channels": 7, "use_spatial_transformer": True, "context_dim": 16},
            {"c_concat": (3, LATENT, LATENT), "c_crossattn": (5, 16)},
        ),
        ("adm", {"num_classes": 3}, {"y": ()}),
    ],
)
def test_ways_of_conditioning(key, options, condition):
    """Shapes in and out, every condition is read, and one condition per image serves a batch that guidance doubled."""
    stage = "__is_first_stage__" if key else "__is_unconditional__"
    model = build(mt_sides=[], conditioning_key=key, cond_stage_config=stage, unet_config=unet(**options))
    assert isinstance(model.model, DiffusionWrapper) and model.conditioning_key == key

    def make() -> dict[str, torch.Tensor]:
        return {n: torch.tensor([0, 2]) if n == "y" else torch.randn(2, *shape) for n, shape in condition.items()}

    z, t, given = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 30]), make()
    with torch.no_grad():
        output = model.model(z, t, {}, **given).output
        assert output.shape == z.shape
        for name, value in given.items():
            other = {**given, name: value.roll(1, 0)}
            assert not torch.allclose(model.model(z, t, {}, **other).output, output)
        if given:
            twice = model.model(z.repeat(2, 1, 1, 1), t.repeat(2), {}, **given).output
            torch.testing.assert_close(twice, output.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_an_unknown_way_of_conditioning_is_named():
    with pytest.raises(UserError, match="conditioning_key 'cross' is none of None, concat, crossattn, hybrid, adm"):
        build(mt_sides=[], conditioning_key="cross", cond_stage_config="__is_first_stage__")


# ---------------------------------------------------------------- LDM's checkpoints


def ldm_file(path, model: LatentMTDiffusion) -> LDMCheckpoint:
    """Write `model` as LDM's training does, its averages with other values than its weights."""
    parts = {name: module.state_dict() for name, module in model.named_children() if name != "model"}
    weights = model.network.state_dict()
    averages = {key: value + 0.01 * torch.randn_like(value) for key, value in weights.items()}
    content = LDMCheckpoint(
        weights,
        parts["first_stage_model"],
        parts.get("cond_stage_model", {}),
        averages,
        ema_decay=0.9999,
        ema_updates=10,
        scale_factor=0.18215,
        buffers=schedule_buffers(model.diffusion.betas),
        step=10,
    )
    write_ldm(path, content)
    return content


@pytest.mark.parametrize("conditional", [False, True])
def test_ldms_checkpoint_comes_back_whole(tmp_path, conditional):
    """U-Net, first stage, conditioning stage, scale; and the averages, where they are asked for."""
    params = {"mt_sides": [], **(CLASSES if conditional else {})}
    trained, model = build(**params), build(seed=1, **params)
    content = ldm_file(tmp_path / "ldm.ckpt", trained)
    model.load_ldm(tmp_path / "ldm.ckpt")
    assert float(model.scale_factor) == pytest.approx(0.18215)
    expected, found = trained.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected if key != "scale_factor")
    load_ldm(model, tmp_path / "ldm.ckpt", ema=True)
    averaged = model.network.state_dict()
    assert all(torch.equal(averaged[key], content.ema[key]) for key in averaged)


@pytest.mark.parametrize("swap", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["U", "X", "any"])
def test_ldms_checkpoint_starts_a_model_of_pairs(tmp_path, variant, swap):
    """Heads, condition inputs and the class of the role are new, and the output is the loaded model's until they are trained."""
    ldm = build(mt_sides=[])
    ldm_file(tmp_path / "ldm.ckpt", ldm)
    model = build(seed=1, mt_variant=variant, mt_swap_prob=swap)
    model.load_ldm(tmp_path / "ldm.ckpt")
    z, other, t = torch.randn(2, 4, LATENT, LATENT), torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 30])
    told = {"y": torch.tensor([0, 1])} if swap else {}
    with torch.no_grad():
        expected = ldm.model(z, t, {}).output
        found = model.model(z, t, {} if variant == "U" else {PAIRED: other}, **told)
    torch.testing.assert_close(found.output, expected, rtol=0, atol=0)
    assert found.predictions[PAIRED].shape == z.shape


def test_the_first_stage_of_an_ldm_is_a_ckpt_path_too(tmp_path):
    """The same latents whether it came with the diffusion model or from its own file."""
    ldm = build(mt_sides=[])
    state = {f"{key}": value for key, value in ldm.first_stage_model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "autoencoder.ckpt")
    stage = {
        **FIRST_STAGE,
        "params": {"embed_dim": 4, "ddconfig": DDCONFIG, "ckpt_path": str(tmp_path / "autoencoder.ckpt")},
    }
    torch.manual_seed(3)
    model = instantiate(
        {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model_params(first_stage_config=stage)}, "m"
    )
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    assert torch.equal(model.encode(images), ldm.encode(images))


@pytest.mark.parametrize(
    ("part", "target"),
    [
        ("cond_stage_config", "ldm.modules.encoders.modules.FrozenClipImageEmbedder"),
        ("first_stage_config", "ldm.models.autoencoder.AutoencoderCL"),
    ],
)
def test_a_stage_that_cannot_be_built_is_told_before_the_network_is(part, target, monkeypatch):
    """A large network takes minutes."""
    monkeypatch.setattr("latent_mt.model.latent_diffusion.build_network", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match=rf"model.params.{part}: .*{target.rpartition('.')[2]}"):
        build(mt_sides=[], conditioning_key="crossattn", **{part: {"target": target}})


@pytest.mark.parametrize("stage", [FIRST_STAGE, IDENTITY])
def test_the_first_stage_sees_few_images_at_a_time(stage, monkeypatch):
    """Of large images, whose feature maps would else be the most of a step's memory; the latents and images are the same."""
    options: dict = {}
    if stage is IDENTITY:
        options = {"first_stage_config": IDENTITY, "channels": 3, "image_size": SIZE}
        options["unet_config"] = unet(in_channels=3, out_channels=3)
    model, batch = build(**options), pixels(5)
    images = from_uint8(batch.images)[:, :3]
    seen: list[int] = []
    first = model.first_stage_model
    encode, decode = first.encode_moments, first.decode
    monkeypatch.setattr(first, "encode_moments", lambda x: (seen.append(len(x)), encode(x))[1])
    monkeypatch.setattr(first, "decode", lambda z: (seen.append(len(z)), decode(z))[1])
    whole = model.encode(images, streams(batch))
    back = model.decode(whole)
    assert seen == [5, 5]
    monkeypatch.setattr(codec, "PASS", 2 * SIZE**2)
    torch.testing.assert_close(model.encode(images, streams(batch)), whole)
    torch.testing.assert_close(model.decode(whole), back)
    assert seen[2:] == [2, 2, 1, 2, 2, 1]
