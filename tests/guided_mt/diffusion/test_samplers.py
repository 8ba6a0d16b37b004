"""The Gaussian oracle through every sampler, weight schedule and conditioning: with the best network only the process errs."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from gaussian import JointGaussian, frechet, prediction_on

from guided_mt.diffusion.aggregation import WEIGHTS
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps, space_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.schedules import SCHEDULES
from guided_mt.modalities import ImageModality

SHAPE = (3, 2, 2)
D = int(np.prod(SHAPE))
N = 6000
SOUND_WEIGHTS = [name for name in WEIGHTS if name != "paper-literal"]


@cache
def full_process(weights: str, schedule: str = "cosine"):
    options = {"noise_schedule": schedule, "prediction": prediction_on(schedule), "mt_weights": {"x": weights}}
    return create_gaussian_diffusion(steps=1000, sigma_small=True, **options)


def covariance(x: torch.Tensor) -> np.ndarray:
    flat = x.flatten(1).double().numpy()
    return flat.T @ flat / len(flat)


def finite_sample_error(cov: np.ndarray, n: int = N) -> float:
    """The Frechet distance that `n` exact draws would have, about."""
    draws = np.random.default_rng(7).normal(size=(n, len(cov))) @ np.linalg.cholesky(cov).T
    return frechet(draws.T @ draws / n, cov)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_unknown_modality(sampler, weights):
    """z_0 has the right law when x is unknown. `paper` ends at alpha-tilde 0.05, so that z_T is not quite N(0, I): the
    deterministic samplers carry that error along, the ancestral one forgets it."""
    data, full = JointGaussian.make(D, seed=1), full_process(weights)
    steps = kept_timesteps(full, "solver200")
    drawn = sample(
        data.network_u(full),
        full.respace(steps),
        {"x": ImageModality("x")},
        (N, *SHAPE),
        sampler=sampler,
        seeds=range(N),
        clip_denoised=False,
    )
    allowed = 0.04 if weights in ("paper", "constant") and sampler != "ddpm" else 0.004
    error = frechet(covariance(drawn.x_start), data.cov_z)
    assert error < allowed + 2 * finite_sample_error(data.cov_z)
    assert drawn.modalities["x"].shape == drawn.x_start.shape


def test_literal_weights_fail_as_documented():
    """t/(T - t) once per step leaves an error of the size of the data, where `paper` leaves none (docs/method.md, section 4)."""
    data = JointGaussian.make(D, seed=1)
    errors = {}
    for weights in ("paper", "paper-literal"):
        full = full_process(weights)
        drawn = sample(
            data.network_u(full),
            full,
            {"x": ImageModality("x")},
            (1000, *SHAPE),
            seeds=range(1000),
            clip_denoised=False,
        )
        errors[weights] = frechet(covariance(drawn.x_start), data.cov_z)
    assert errors["paper"] < 0.05 * np.trace(data.cov_z)
    assert errors["paper-literal"] > 0.1 * np.trace(data.cov_z)


def conditional_error(data: JointGaussian, drawn: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """(mean squared error of the mean of z_0 | x, Frechet distance of the covariance), by regression of the draws on x."""
    z, given = (v.flatten(1).double().numpy() for v in (drawn, x))
    gain, cov = data.given_x()
    fitted = np.linalg.lstsq(given, z, rcond=None)[0].T
    residual = z - given @ fitted.T
    error = (fitted - gain) @ data.cov_x @ (fitted - gain).T
    return float(np.trace(error)), frechet(residual.T @ residual / len(z), cov)


def draw_given(data, network, weights, sampler, conditioning, schedule="cosine", steps=100, n=N, scale=1.0):
    full = full_process(weights, schedule)
    variance = data.head_variance(full)
    x = torch.from_numpy(data.draw_x(n, np.random.default_rng(0))).float().view(n, *SHAPE)
    drawn = sample(
        network(full),
        full.respace(space_timesteps(1000, str(steps))),
        {"x": ImageModality("x", variance=variance)},
        (n, *SHAPE),
        known={"x": x},
        sampler=sampler,
        conditioning=conditioning,
        conditioning_scale=scale,
        seeds=range(n),
        clip_denoised=False,
    )
    assert torch.equal(drawn.modalities["x"], x)
    return conditional_error(data, drawn.x_start, x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_modality_given_to_the_network(sampler):
    """Form X, any data. The next test says that this holds for all weights."""
    data = JointGaussian.make(D, seed=2)
    of_mean, of_cov = draw_given(data, data.network_x, "paper", sampler, "network")
    assert of_mean < 0.01 and of_cov < 0.01


def few_given(network, weights, sampler, conditioning, data, x):
    """Draws for each x, on 20 timesteps."""
    full = full_process(weights)
    variance = data.head_variance(full)
    return sample(
        network(full),
        full.respace(space_timesteps(1000, "20")),
        {"x": ImageModality("x", variance=variance)},
        x.shape,
        known={"x": x},
        sampler=sampler,
        conditioning=conditioning,
        seeds=range(len(x)),
        clip_denoised=False,
    ).x_start


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_to_the_network_the_weights_do_not_matter(sampler):
    """Not even the literal ones: a given modality leaves the frame."""
    data = JointGaussian.make(D, seed=3)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    drawn = [few_given(data.network_x, weights, sampler, "network", data, x) for weights in WEIGHTS]
    assert all(torch.equal(drawn[0], other) for other in drawn)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_modality_by_own_head(sampler):
    """Form U with Bayes' rule: exact where Cov(x | z_t) is a multiple of the identity, as for isotropic data."""
    data = JointGaussian.make(D, seed=2, isotropic=True)
    of_mean, of_cov = draw_given(data, data.network_u, "paper", sampler, "own-head")
    assert of_mean < 0.02 and of_cov < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_own_head_is_the_network_that_is_given_the_image(weights, sampler):
    """Sample by sample, form U with its own head draws what form X draws, with any weights."""
    data = JointGaussian.make(D, seed=2, isotropic=True)
    x = torch.from_numpy(data.draw_x(30, np.random.default_rng(0))).float().view(30, *SHAPE)
    by_head = few_given(data.network_u, weights, sampler, "own-head", data, x)
    given = few_given(data.network_x, weights, sampler, "network", data, x)
    torch.testing.assert_close(by_head, given, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_one_known_and_one_unknown_modality(weights):
    """x given to the network, a second one u in the frame: with E[eps | z_t, x] and E[u | z_t, x] the law of z_0 | x comes out."""
    full = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights={"x": "paper", "u": weights})
    b = torch.from_numpy(full.aggregation.coefficients["u"])
    abar = torch.from_numpy(full.alphas_cumprod)
    # Scalars per pixel: z_0 = 0.8 x + 0.5 n, u = 0.6 z_0 + 0.3 n', so Var[z_0 | x] = 0.25; u depends on z_0 alone.
    var_z, slope, var_u = 0.25, 0.6, 0.09

    def network(z_t, t, modalities):
        x, a, frame = modalities["x"], abar[t].view(-1, 1, 1, 1).sqrt(), b[t].view(-1, 1, 1, 1)
        signal, s2 = a + frame * slope, 1 - a**2
        total = signal**2 * var_z + frame**2 * var_u + s2
        rest = (z_t - signal * 0.8 * x) / total
        u = slope * (0.8 * x + signal * var_z * rest) + frame * var_u * rest
        return ModelOutput(s2.sqrt() * rest, {"u": u, "x": x})

    x = torch.randn(N, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample(
        network,
        full.respace(space_timesteps(1000, "250")),
        {"x": ImageModality("x"), "u": ImageModality("u")},
        x.shape,
        known={"x": x},
        conditioning="network",
        seeds=range(N),
        clip_denoised=False,
    )
    residual = drawn.x_start - 0.8 * x
    assert abs(float((residual * x).mean())) < 0.02 and abs(float(residual.var()) / var_z - 1) < 0.05
    assert drawn.modalities["u"].shape == x.shape and torch.equal(drawn.modalities["x"], x)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_printed_rule_for_a_known_modality_fails_as_documented(schedule):
    """Algorithm 1 with E[eps | z_t] is off by more than the size of z_0 | x; own head is not (docs/method.md, section 5.2)."""
    data = JointGaussian.make(D, seed=2, isotropic=True)
    printed, _ = draw_given(data, data.network_u, "paper", "ddpm", "algorithm1", schedule, n=1000)
    own, _ = draw_given(data, data.network_u, "paper", "ddpm", "own-head", schedule, n=1000)
    gain, cov = data.given_x()
    assert printed > np.trace(cov) and own < 0.05
    ignored, _ = draw_given(data, data.network_u, "none", "ddpm", "own-head", schedule, n=1000, scale=0.0)
    assert ignored == pytest.approx(
        np.trace(gain @ data.cov_x @ gain.T), rel=0.1
    )  # scale 0 without a frame: x is ignored


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_without_modalities(sampler, learn_sigma):
    """With nothing in the frame: finite, unlike its noise, and for DDIM equal to ADM's own loop from the same noise."""
    diffusion = create_gaussian_diffusion(steps=8, noise_schedule="cosine", learn_sigma=learn_sigma)
    model = lambda x, t: torch.tanh(torch.cat([x] * (1 + learn_sigma), 1) * 0.5)  # noqa: E731
    drawn = sample(model, diffusion, {}, (2, *SHAPE), sampler=sampler, seeds=[5, 6], eta=0.0).x_start
    noise = SampleStreams(torch.tensor([5, 6])).normal(*SHAPE)  # z_T, as `sample` draws it
    if sampler == "ddim":
        torch.testing.assert_close(
            drawn, diffusion.ddim_sample_loop(model, noise.shape, noise=noise), rtol=1e-5, atol=1e-6
        )
    assert drawn.abs().max() < 5 and not torch.equal(drawn, noise)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", range(1, 9))
def test_very_few_calls_give_numbers(count, schedule, sampler):
    """Long steps from pure noise: nothing is rounded to the root of a negative number."""
    diffusion = create_gaussian_diffusion(
        noise_schedule=schedule, prediction=prediction_on(schedule), timestep_respacing=f"solver{count}"
    )
    model = lambda z, t: torch.tanh(z) * 0.9  # noqa: E731
    drawn = sample(model, diffusion, {}, (2, *SHAPE), sampler=sampler, seeds=[0, 1], eta=1.0).x_start
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_its_seed_alone(sampler):
    full = full_process("paper")
    data, process = JointGaussian.make(D, seed=4), full.respace(space_timesteps(1000, "12"))
    model, modalities = data.network_u(full), {"x": ImageModality("x")}
    draw = lambda seeds: sample(model, process, modalities, (len(seeds), *SHAPE), sampler=sampler, seeds=seeds, eta=0.5)  # noqa: E731
    together, alone = draw([3, 1, 4, 1]), draw([4])
    torch.testing.assert_close(together.x_start[2:3], alone.x_start, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together.x_start[1], together.x_start[3], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together.x_start[0], together.x_start[1])


def test_unseeded_samples_follow_torchs_seed():
    process = create_gaussian_diffusion(steps=4, noise_schedule="cosine")
    model = lambda x, t: torch.zeros_like(x)  # noqa: E731
    torch.manual_seed(0)
    first, second = (sample(model, process, {}, (1, *SHAPE)).x_start for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, sample(model, process, {}, (1, *SHAPE)).x_start) and not torch.equal(first, second)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"conditioning": "magic"}, "unknown conditioning 'magic'"),
        ({"known": {"y": torch.zeros(2, *SHAPE)}}, "unknown modality 'y'"),
        ({"known": {"x": torch.zeros(3, *SHAPE)}}, "has 3 samples"),
        ({"seeds": [1]}, "1 seeds for 2 samples"),
        ({}, "no head for modality 'x'"),
        ({"known": {"x": torch.zeros(2, *SHAPE)}}, "no head for modality 'x'"),
    ],
)
def test_bad_arguments(options, message):
    model = lambda z, t, m: ModelOutput(torch.zeros_like(z))  # noqa: E731
    with pytest.raises(ValueError, match=message):
        process = create_gaussian_diffusion(steps=4, noise_schedule="cosine", mt_weights={"x": "paper"})
        sample(model, process, {"x": ImageModality("x")}, (2, *SHAPE), **options)


def test_own_head_needs_a_variance():
    model = lambda z, t, m: ModelOutput(torch.zeros_like(z), {"x": z})  # noqa: E731
    process = create_gaussian_diffusion(steps=4, noise_schedule="cosine", mt_weights={"x": "paper"})
    with pytest.raises(ValueError, match="no head variance"):
        sample(model, process, {"x": ImageModality("x")}, (2, *SHAPE), known={"x": torch.zeros(2, *SHAPE)})
