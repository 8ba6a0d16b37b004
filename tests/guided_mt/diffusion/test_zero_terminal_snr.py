"""Schedules that end in pure noise (Lin et al. 2023): abar_T = 0, where eps says nothing of z_0. v and z_0 do, in every sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guided_mt.diffusion.aggregation import WEIGHTS, Aggregation
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.spacing import solver_timesteps
from guided_mt.diffusion.targets import TARGETS
from guided_mt.diffusion.weighting import TIMESTEP_WEIGHTS
from guided_mt.modalities import ImageModality

SHAPE, N, VARIANCE = (3, 4, 4), 250, 0.5
CAN = ("v", "x0", "velocity", "velocity-to-data")


def zero_snr(steps: int = 200) -> np.ndarray:
    """Lin et al. 2023, algorithm 1, on Ho et al.'s linear schedule."""
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, steps) * 1000 / steps))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 1 - np.append(root[0], root[1:] / root[:-1]) ** 2


def process(prediction: str, weights: str = "", **options) -> GaussianDiffusion:
    betas = zero_snr()
    assert betas[-1] == 1
    aggregation = Aggregation.from_weights({"x": weights} if weights else {}, betas)
    return GaussianDiffusion(betas=betas, model_mean_type=prediction, aggregation=aggregation, **options)


def network(full: GaussianDiffusion):
    """The best network of z_0 ~ N(0, VARIANCE), of what `full` predicts, which is linear in z_0 and eps."""

    def says(y, t, modalities, **options):
        abar = torch.from_numpy(full.alphas_cumprod)[t].view(-1, 1, 1, 1)
        marginal = abar * VARIANCE + 1 - abar
        x_start, eps = abar.sqrt() * VARIANCE / marginal * y, (1 - abar).sqrt() / marginal * y
        output = full.target.wanted(full, x_start, eps, y, t).float()
        return ModelOutput(output, dict.fromkeys(full.aggregation.coefficients, 0.5 * y))

    return says


@pytest.mark.parametrize("prediction", CAN)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("count", [200, 20])
def test_every_sampler_draws_the_right_variance(prediction, sampler, count):
    full = process(prediction)
    spaced = full.respace(solver_timesteps(full.alphas_cumprod, (), count))
    drawn = sample(network(full), spaced, {}, (N, *SHAPE), sampler=sampler, seeds=range(N), clip_denoised=False).x_start
    allowed = 0.05 if count == 200 else {"ddpm": 0.9, "ddim": 0.25, "sde-dpm++": 0.25}.get(sampler, 0.15)
    assert torch.isfinite(drawn).all()
    assert float(drawn.square().mean()) == pytest.approx(VARIANCE, rel=allowed)
    assert abs(float(drawn.mean())) < 0.03


@pytest.mark.parametrize("prediction", CAN)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", ["unknown", "known", "classifier", "free"])
def test_modalities_and_guidance_stay_finite(prediction, sampler, guidance):
    full = process(prediction, "bridge")
    x = {"x": torch.ones(2, *SHAPE)}
    options = {
        "unknown": {},
        "known": {"known": x},
        "classifier": {"cond_fn": lambda y, t: 0.1 * torch.ones_like(y)},
        "free": {"known": x, "conditioning": "network", "guidance_scale": 2.0},
    }[guidance]
    modality = ImageModality("x", torch.ones(full.num_timesteps))
    spaced = full.respace([*range(0, 199, 11), 199])
    drawn = sample(network(full), spaced, {"x": modality}, (2, *SHAPE), sampler=sampler, seeds=[0, 1], **options)
    assert torch.isfinite(drawn.x_start).all() and drawn.x_start.abs().max() < 1.01
    assert torch.isfinite(drawn.modalities["x"]).all()


def test_eps_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"ends in pure noise .zero terminal SNR, .* predict velocity, v or x0"):
        process("eps")
    with pytest.raises(ValueError, match="the last alone may be 1"):
        GaussianDiffusion(betas=np.array([0.1, 1.0, 0.5]), model_mean_type="v")


@pytest.mark.parametrize("prediction", [name for name in TARGETS if name != "eps"])
@pytest.mark.parametrize("weights", TIMESTEP_WEIGHTS)
def test_losses_and_the_bound_are_finite_at_every_timestep(prediction, weights):
    if prediction == "previous" and weights != "uniform":
        return
    full = process(prediction, timestep_weights=weights)
    t = torch.arange(full.num_timesteps)
    x_start = torch.randn(len(t), 1, 2, 2)
    losses = full.training_losses(lambda y, t: 0.3 * y, x_start, t)
    assert torch.isfinite(losses["loss"]).all()
    bound = full.calc_bpd_loop(lambda y, t: 0.3 * y, x_start[:2])
    assert all(torch.isfinite(values).all() for values in bound.values()) and bound["prior_bpd"].abs().max() < 1e-6


@pytest.mark.parametrize("prediction", CAN)
def test_adms_loops(prediction):
    full = process(prediction)
    noise = torch.randn(2, *SHAPE)

    def model(y, t):
        return network(full)(y, t, {}).output

    assert torch.isfinite(full.p_sample_loop(model, noise.shape, noise=noise)).all()
    assert torch.isfinite(full.ddim_sample_loop(model, noise.shape, noise=noise)).all()
    p = full.p_mean_variance(model, noise, torch.full((2,), full.num_timesteps - 1))
    guided = full.condition_score(lambda y, t: torch.ones_like(y), p, noise, torch.full((2,), full.num_timesteps - 1))
    assert torch.equal(guided["pred_xstart"], p["pred_xstart"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_modality_is_left_in_pure_noise(weights):
    coefficients = process("v", weights).aggregation.coefficients["x"]
    assert np.isfinite(coefficients).all() and coefficients[-1] == 0
