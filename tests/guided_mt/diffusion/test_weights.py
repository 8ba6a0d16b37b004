"""Where the frame peaks: `early`, `bridge` and `late` have theirs at an SNR of 1/4, 1 and 4 (docs/method.md, section 4)."""

from __future__ import annotations

import numpy as np
import pytest
from gaussian import JointGaussian, frechet, prediction_on

from guided_mt.diffusion.aggregation import aggregation_coefficients, aggregation_weights
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from guided_mt.diffusion.sampling import sample
from guided_mt.diffusion.schedules import SCHEDULES, get_named_beta_schedule, with_signal
from guided_mt.modalities import ImageModality

PEAKS = {"early": 1 / 4, "bridge": 1.0, "late": 4.0}  # SNR


def coefficients(weights: str, betas: np.ndarray) -> np.ndarray:
    return aggregation_coefficients(aggregation_weights(weights, betas), betas)


def nearest_snr(betas: np.ndarray, snr: float) -> int:
    """The timestep whose SNR is nearest."""
    abar = np.cumprod(1 - betas)
    return int(np.abs(np.log(with_signal(abar) / (1 - abar)) - np.log(snr)).argmin())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weights", PEAKS)
def test_one_hump_of_height_1_between_ends_near_0(weights, schedule):
    betas = get_named_beta_schedule(schedule, 1000)
    found = coefficients(weights, betas)
    peak = int(found.argmax())
    assert 0.9999 < found[peak] < 1 + 1e-12
    assert abs(peak - nearest_snr(betas, PEAKS[weights])) <= 2
    assert (np.diff(found[: peak + 1]) > 0).all() and (np.diff(found[peak:]) < 1e-12).all()
    assert found.min() > -1e-12 and found[0] < 0.04 and found[-1] < 0.025
    assert np.abs(np.diff(found)).max() < 0.02  # no jump in any of 1000 steps


def test_late_is_early_with_signal_and_noise_exchanged():
    abar = 1 / (1 + np.exp(np.linspace(-10, 10, 201)))  # even in log SNR, as far to both sides
    betas = 1 - abar / np.append(1.0, abar[:-1])
    early, late = (coefficients(weights, betas) for weights in ("early", "late"))
    np.testing.assert_allclose(late, early[::-1], rtol=0, atol=1e-6)
    bridge = coefficients("bridge", betas)
    np.testing.assert_allclose(bridge, bridge[::-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_frame_outweighs_the_image_early_or_not_at_all(schedule):
    betas = get_named_beta_schedule(schedule, 1000)
    seen = np.cumprod(1 - betas) > 0  # where a schedule ends in pure noise nothing of either is left
    ratio = {w: coefficients(w, betas)[seen] / np.sqrt(np.cumprod(1 - betas)[seen]) for w in PEAKS}
    last = len(ratio["early"]) - 1
    assert ratio["early"].argmax() == last and ratio["early"][-1] == pytest.approx(3.494, rel=1e-3)
    assert ratio["bridge"].argmax() == last and ratio["bridge"][-1] == pytest.approx(2.0, rel=1e-3)
    assert ratio["late"][-1] < 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_modality_is_known_first_early_and_last_late(schedule):
    """The share of the variance of x that the best network knows where the noise is still strong, and the other way round."""
    data, betas = JointGaussian.make(12, seed=1), get_named_beta_schedule(schedule, 1000)
    known = {}
    for weights in (*PEAKS, "none"):
        b = coefficients(weights, betas)
        for snr in (1 / 10, 1 / 4, 10.0):
            t = nearest_snr(betas, snr)
            abar = np.prod(1 - betas[: t + 1])
            known[weights, snr] = 1 - np.trace(data.head_covariance(abar, b[t])) / np.trace(data.cov_x)
    for snr in (1 / 10, 1 / 4):
        assert known["early", snr] > 1.2 * known["bridge", snr] > 2 * known["late", snr] >= 2 * known["none", snr], snr
    assert known["late", 10.0] > known["bridge", 10.0] > known["early", 10.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls, allowed", [(10, 0.04), (50, 0.006)])
@pytest.mark.parametrize("weights", PEAKS)
def test_few_calls(weights, calls, allowed, schedule):
    """The default sampler, x unknown. Frechet distance of z_0, whose covariance has trace 5.4; 6000 exact draws are 0.002 away.
    A schedule that ends in pure noise has more of it to cross."""
    if calls == 10 and schedule == "straight":
        allowed = 0.08
    data = JointGaussian.make(12, seed=1)
    options = {"noise_schedule": schedule, "prediction": prediction_on(schedule), "mt_weights": {"x": weights}}
    full = create_gaussian_diffusion(sigma_small=True, **options)
    drawn = sample(
        data.network_u(full),
        full.respace(kept_timesteps(full, f"solver{calls}")),
        {"x": ImageModality("x")},
        (6000, 3, 2, 2),
        sampler="dpm++",
        seeds=range(6000),
        clip_denoised=False,
    )
    flat = drawn.x_start.flatten(1).double().numpy()
    assert frechet(flat.T @ flat / len(flat), data.cov_z) < allowed
