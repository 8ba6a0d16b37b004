"""Flow models: the straight path as a noise schedule, the velocity as a target, and how networks of SiT and REPA are ours."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from gaussian import JointGaussian, frechet
from mixture import LabelledMixture
from test_samplers import SHAPE, SOUND_WEIGHTS, D, N, conditional_error, covariance, finite_sample_error

from guided_mt.diffusion.aggregation import WEIGHTS
from guided_mt.diffusion.network import TIMES, Told, as_told
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.schedules import get_named_beta_schedule
from guided_mt.modalities import ImageModality

VELOCITIES = ("velocity", "velocity-to-data")


@cache
def flow(prediction: str = "velocity", steps: int = 1000, weights: str = "", name: str = "x") -> GaussianDiffusion:
    return create_gaussian_diffusion(
        noise_schedule="straight",
        prediction=prediction,
        steps=steps,
        sigma_small=True,
        mt_weights={name: weights} if weights else None,
    )


def taus(steps: int) -> torch.Tensor:
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


# ---------------------------------------------------------------- the path


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_the_schedule_is_the_straight_path(steps):
    """y_t / (a + s) is (1 - tau) z_0 + tau eps at tau = (t + 1) / T, and the last timestep is pure noise, exactly."""
    full, t = flow(steps=steps), torch.arange(steps)
    assert get_named_beta_schedule("straight", steps)[-1] == 1 and full.alphas_cumprod[-1] == 0
    x_start, noise = torch.randn(2, steps, 1, 2, 2, dtype=torch.float64)
    tau = taus(steps).view(-1, 1, 1, 1)
    y_t = full.q_sample(x_start, t, noise)
    state, told = Told("noise-level", full.alphas_cumprod)(y_t, t)
    torch.testing.assert_close(state, (1 - tau) * x_start + tau * noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(told, tau.flatten(), rtol=1e-9, atol=1e-9)


def test_the_loss_is_that_of_flow_matching():
    """The plain squared error of the velocity, with weight 1 at every timestep."""
    full, t = flow(steps=50), torch.arange(50)
    x_start, noise = torch.randn(2, 50, 1, 2, 2, dtype=torch.float64)
    terms = full.training_losses(lambda y, t: 0.3 * y, x_start, t, noise=noise)
    y_t = full.q_sample(x_start, t, noise)
    expected = ((noise - x_start) - 0.3 * y_t).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-12, atol=1e-12)


def test_what_the_frame_is_on_the_straight_path():
    """No weights leave anything of a modality in z_T, which is N(0, I) exactly; sound ones stay of the image's size."""
    for weights in WEIGHTS:
        coefficients = flow(weights=weights).aggregation.coefficients["x"]
        assert np.isfinite(coefficients).all() and coefficients[-1] == 0
        assert weights not in SOUND_WEIGHTS or coefficients.max() <= 1 + 1e-9


def test_eps_is_refused_at_the_end_of_the_path():
    with pytest.raises(ValueError, match="predict velocity, v or x0"):
        flow("eps")


# ---------------------------------------------------------------- DDIM is Euler's rule


def network(x: torch.Tensor, time: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """Nonlinear in state and time, of the size of a velocity."""
    return sign * (torch.sin(1.3 * x + 2 * time.view(-1, 1, 1, 1)) + 0.3 * x)


def drawn(model, full: GaussianDiffusion, noise: torch.Tensor, time: str, sampler: str = "ddim", **options):
    """z_0 that our sampler makes of `noise` [B, C, H, W] with a network that is told its time by a row of TIMES."""
    start = noise, full.num_timesteps - 1
    told = as_told(model, time, full.alphas_cumprod)
    return sample(told, full, {}, noise.shape, sampler=sampler, start=start, clip_denoised=False, **options).x_start


@pytest.mark.parametrize("steps", [5, 40])
def test_ddim_is_eulers_rule_to_the_noise(steps):
    """A network that is told the noise level, dx/dtau (REPA): steps of -1/N from tau = 1."""
    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    x = noise.clone()
    for tau in taus(steps).flip(0):
        x = x - network(x, tau.expand(2)) / steps
    torch.testing.assert_close(drawn(network, flow("velocity", steps), noise, "noise-level"), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 40])
def test_ddim_is_eulers_rule_to_the_data(steps):
    """A network that is told the signal's level and says dx/dt (SiT): steps of 1/N from t = 0."""
    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    x = noise.clone()
    for k in range(steps):
        x = x + network(x, torch.full((2,), k / steps, dtype=torch.float64)) / steps
    full = flow("velocity-to-data", steps)
    torch.testing.assert_close(drawn(network, full, noise, "data-level"), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_direction_of_time_is_a_convention(sampler):
    """One velocity field, written both ways, draws the same samples by every rule."""
    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    both = [
        drawn(network, flow("velocity", 20), noise, "noise-level", sampler, seeds=[0, 1]),
        drawn(
            lambda x, t: network(x, 1 - t, -1.0),
            flow("velocity-to-data", 20),
            noise,
            "data-level",
            sampler,
            seeds=[0, 1],
        ),
        drawn(
            lambda x, t: network(x, t / 1000), flow("velocity", 20), noise, "noise-level-1000", sampler, seeds=[0, 1]
        ),
    ]
    for other in both[1:]:
        torch.testing.assert_close(other, both[0], rtol=1e-5, atol=1e-5)


def test_a_network_with_classes_and_floats():
    """SiT's call (x, t, y), in float32: the time it is told is a float32 in [0, 1], and the classes are the caller's."""
    seen = []

    def sit(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, t.dtype, float(t[0]), y.tolist()))
        return network(x, t)

    full = flow("velocity-to-data", 4)
    told = as_told(partial(sit, y=torch.tensor([7, 8])), "data-level", full.alphas_cumprod)
    sample(told, full, {}, (2, *SHAPE), sampler="ddim", seeds=[0, 1])
    assert [time for _, _, time, _ in seen] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert all(call[:2] == (torch.float32, torch.float32) and call[3] == [7, 8] for call in seen)


def test_the_state_is_told_as_the_network_is_asked_of_any_schedule():
    """A model that was trained on the cosine schedule may be told its noise level too; `steps` tells nothing else."""
    full, t = create_gaussian_diffusion(noise_schedule="cosine"), torch.tensor([0, 500, 999])
    x_start, noise = torch.randn(2, 3, 1, 2, 2)
    y_t = full.q_sample(x_start, t, noise)
    assert Told("steps", full.alphas_cumprod)(y_t, t) == (y_t, t)
    state, tau = Told("noise-level", full.alphas_cumprod)(y_t, t)
    mixed = tau.view(-1, 1, 1, 1)
    torch.testing.assert_close(state, (1 - mixed) * x_start + mixed * noise, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="unknown time 'sigma'; choose from steps, noise-level"):
        Told("sigma", full.alphas_cumprod)
    assert set(TIMES) >= {"steps", "noise-level", "data-level"}


def test_euler_of_diffusers():
    """diffusers' FlowMatchEulerDiscreteScheduler, step by step, from the same network and noise."""
    diffusers, steps = pytest.importorskip("diffusers"), 12
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=taus(steps).flip(0).tolist())
    z = noise = torch.randn(4, *SHAPE)
    told = []
    for t in scheduler.timesteps:
        told.append(float(t))
        z = scheduler.step(network(z, t.expand(4) / 1000), t, z).prev_sample
    ours, ours_told = flow("velocity", steps), []

    def model(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        ours_told.append(float(time[0]))
        return network(x, time / 1000)

    torch.testing.assert_close(drawn(model, ours, noise, "noise-level-1000"), z, rtol=1e-5, atol=1e-5)
    assert ours_told == pytest.approx(told, rel=1e-6)


# ---------------------------------------------------------------- the oracles, with a modality in the frame


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_unknown_modality(weights, sampler):
    """z_0 has the right law with x unknown in the frame. z_T is N(0, I) exactly; what `paper` loses with rules of first order is
    its fall from 0.63 to 0 in the last step."""
    data, full = JointGaussian.make(D, seed=1), flow(weights=weights)
    found = sample(
        data.network_u(full),
        full.respace(kept_timesteps(full, "solver200")),
        {"x": ImageModality("x")},
        (N, *SHAPE),
        sampler=sampler,
        seeds=range(N),
        clip_denoised=False,
    )
    error = frechet(covariance(found.x_start), data.cov_z)
    allowed = 0.012 if weights == "paper" and sampler in ("ddim", "heun") else 0.004
    assert error < allowed + 2 * finite_sample_error(data.cov_z)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("form", ["U", "X"])
def test_known_modality(form, sampler):
    """Form U by its own head, and form X: the law of z_0 given x."""
    data = JointGaussian.make(D, seed=2, isotropic=form == "U")
    full, n = flow(weights="paper"), 4000
    x = torch.from_numpy(data.draw_x(n, np.random.default_rng(0))).float().view(n, *SHAPE)
    found = sample(
        (data.network_u if form == "U" else data.network_x)(full),
        full.respace(kept_timesteps(full, "100")),
        {"x": ImageModality("x", variance=data.head_variance(full))},
        (n, *SHAPE),
        known={"x": x},
        sampler=sampler,
        conditioning="own-head" if form == "U" else "network",
        seeds=range(n),
        clip_denoised=False,
    )
    of_mean, of_cov = conditional_error(data, found.x_start, x)
    assert of_mean < 0.02 and of_cov < 0.025


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_own_head_is_the_network_that_is_given_the_label(guidance_scale, weights, sampler):
    """For a label Bayes' rule is exact: sample by sample, form U with its head draws what form X draws; guided too.

    But for the first timestep: in pure noise a head's gradient says nothing of z_0, where form X knows E[z_0 | label]. The solver
    timesteps leave it by a step to tau = 0.998, over which that is of no account."""
    data = LabelledMixture.make(SHAPE, (0.5, 0.3, 0.2), seed=0, apart=0.4)
    full, labels = flow(weights=weights, name="label"), torch.arange(60) % 3
    by_head, given = (
        sample(
            data.network(full),
            full.respace(kept_timesteps(full, "solver25")),
            {"label": data.modality()},
            (60, *SHAPE),
            known={"label": labels},
            sampler=sampler,
            conditioning=conditioning,
            guidance_scale=guidance_scale,
            seeds=range(60),
            clip_denoised=False,
        ).x_start
        for conditioning in ("own-head", "network")
    )
    torch.testing.assert_close(by_head, given, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_label_unknown(sampler):
    """Image and label drawn together: class frequencies, and the law of the image in each class."""
    probabilities, n = np.array([0.5, 0.3, 0.2]), 2400
    data = LabelledMixture.make(SHAPE, probabilities, seed=0, apart=2.5)
    full = flow(weights="bridge", name="label")
    found = sample(
        data.network(full),
        full.respace(kept_timesteps(full, "solver80")),
        {"label": data.modality()},
        (n, *SHAPE),
        sampler=sampler,
        seeds=range(n),
        clip_denoised=False,
    )
    reported, flat = found.modalities["label"].argmax(1), found.x_start.flatten(1).double()
    assert (reported == data.nearest(found.x_start)).float().mean() > 0.999
    error = np.abs(np.bincount(reported, minlength=3) / n - probabilities)
    assert (error < 4 * np.sqrt(probabilities * (1 - probabilities) / n)).all()
    for k, (mean, cov) in enumerate(zip(data.means, data.covs.numpy(), strict=True)):
        own = flat[reported == k]
        assert float(((own.mean(0) - mean) ** 2).sum()) < 4 * np.trace(cov) / len(own)
        assert frechet(np.cov(own.T.numpy()), cov) < 0.006 + 2 * finite_sample_error(cov, len(own))
