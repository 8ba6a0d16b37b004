"""The process: ADM's numbers exactly, and the moving frame against the paper's own equations."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from gaussian import prediction_on

from guided_mt.diffusion.aggregation import WEIGHTS, aggregation_coefficients, aggregation_weights
from guided_mt.diffusion.network import ModelOutput, takes_modalities
from guided_mt.diffusion.respacing import create_gaussian_diffusion, space_timesteps
from guided_mt.diffusion.schedules import SCHEDULES, get_named_beta_schedule
from guided_mt.networks.create import create_model

ORACLES = {"adm_diffusion_cosine_learned": 11, "adm_diffusion_linear_fixed": 12}  # name: torch seed of its bits/dim run


@pytest.fixture(params=ORACLES)
def oracle(request, golden):
    values = {k: torch.from_numpy(v) for k, v in np.load(golden / f"{request.param}.npz").items()}
    constructor = json.loads((golden / f"{request.param}.json").read_text())["constructor"]

    def model(x, t):
        t = t.float().view(-1, 1, 1, 1)
        mean = torch.tanh(0.3 * x + 0.001 * t)
        return torch.cat([mean, torch.cos(0.7 * x - 0.002 * t)], 1) if constructor["learn_sigma"] else mean

    return create_gaussian_diffusion(**constructor), model, values, ORACLES[request.param]


def test_schedules_are_adms(oracle):
    diffusion, _, values, _ = oracle
    posterior = ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
    for name in ("betas", "alphas_cumprod", *posterior):
        np.testing.assert_allclose(getattr(diffusion, name), values[name], rtol=1e-12, atol=0)
    assert diffusion.timestep_map.tolist() == values["timestep_map"].tolist()


def test_losses_are_adms(oracle):
    diffusion, model, values, _ = oracle
    x_start, t, noise = values["x0"], values["t"], values["noise"]
    torch.testing.assert_close(diffusion.q_sample(x_start, t, noise), values["xt"])
    losses = diffusion.training_losses(model, x_start, t, noise=noise)
    assert {f"loss_{k}" for k in losses} == {k for k in values if k.startswith("loss_")}
    for name, loss in losses.items():
        torch.testing.assert_close(loss, values[f"loss_{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_reverse_step_is_adms(oracle, clip):
    diffusion, model, values, _ = oracle
    p = diffusion.p_mean_variance(model, values["xt"], values["t"], clip_denoised=clip)
    for name, value in p.items():
        torch.testing.assert_close(value, values[f"pmv_{'clip_' if clip else ''}{name}"], rtol=1e-5, atol=1e-6)


def test_ddim_run_is_adms(oracle):
    diffusion, model, values, _ = oracle
    drawn = diffusion.ddim_sample_loop(model, values["x0"].shape, noise=values["noise"], clip_denoised=False)
    torch.testing.assert_close(drawn, values["ddim_eta0_final"], rtol=1e-4, atol=1e-5)


def test_bits_per_dimension_are_adms(oracle):
    diffusion, model, values, seed = oracle
    torch.manual_seed(seed)
    bound = diffusion.calc_bpd_loop(model, values["x0"][:1])
    torch.testing.assert_close(bound["total_bpd"], values["bpd_total_bpd"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bound["prior_bpd"], values["bpd_prior_bpd"], rtol=1e-5, atol=1e-12)


def test_an_mt_model_without_modalities_is_adms(oracle):
    """The interface with modalities gives the numbers of ADM's, to the bit."""
    diffusion, model, values, _ = oracle
    wrapped = lambda z_t, t, modalities: ModelOutput(model(z_t, t))  # noqa: E731
    x_start, t, noise = values["x0"], values["t"], values["noise"]
    ours, adms = (diffusion.training_losses(m, x_start, t, noise=noise)["loss"] for m in (wrapped, model))
    assert torch.equal(ours, adms)


def test_models_are_told_apart():
    assert takes_modalities(lambda z, t, m: z)
    assert takes_modalities(lambda z, t, modalities=None: z)
    assert takes_modalities(lambda *arguments: arguments[0])
    assert not takes_modalities(lambda x, t: x)
    assert not takes_modalities(lambda x, t, y=None: x)
    assert not takes_modalities(lambda x, t, **kwargs: x)
    plain = create_model(8, 32, 1, channel_mult="1", attention_resolutions="8")
    for wrap in (lambda m: m, lambda m: functools.partial(m, y=None), torch.compile, torch.nn.DataParallel):
        assert not takes_modalities(wrap(plain))
        assert takes_modalities(wrap(WithModalities()))


class WithModalities(torch.nn.Module):
    def forward(self, z_t, t, modalities=None, y=None):
        return z_t


# ---------------------------------------------------------------- the frame against the paper


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("steps", [1000, 37])
def test_theorem_2_gives_the_marginal_of_the_chain(schedule, weights, steps):
    """The chain z_t = sqrt(alpha_t) (z_{t-1} + w_t E) + sqrt(beta_t) eps (eq. 3), as an exact recursion of its coefficients."""
    betas = get_named_beta_schedule(schedule, steps)
    w = aggregation_weights(weights, betas)
    coefficients = aggregation_coefficients(w, betas)
    of_z, of_e, variance = 1.0, 0.0, 0.0
    for t, beta in enumerate(betas):
        root = np.sqrt(1 - beta)
        of_z, of_e, variance = root * of_z, root * (of_e + w[t]), (1 - beta) * variance + beta
        abar = np.prod(1 - betas[: t + 1])
        np.testing.assert_allclose([of_z**2, variance], [abar, 1 - abar], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(coefficients[t], of_e, rtol=1e-12, atol=1e-300)


def test_theorem_2_by_monte_carlo():
    betas = get_named_beta_schedule("cosine", 50)
    w = aggregation_weights("paper", betas)
    rng = np.random.default_rng(0)
    n, z_0, e = 200_000, 0.7, -0.4
    z = np.full(n, z_0)
    for t in range(40):
        z = np.sqrt(1 - betas[t]) * (z + w[t] * e) + np.sqrt(betas[t]) * rng.normal(size=n)
    diffusion = create_gaussian_diffusion(steps=50, noise_schedule="cosine", mt_weights={"x": "paper"})
    t = torch.tensor([39])
    image = torch.full((1, 1, 1, 1), z_0, dtype=torch.float64)
    shift = diffusion.aggregation.shift({"x": torch.full_like(image, e)}, t)
    mean = diffusion.q_mean_variance(image, t)[0] + shift
    std = np.sqrt(1 - diffusion.alphas_cumprod[39])
    assert abs(z.mean() - float(mean)) < 5 * std / np.sqrt(n)
    assert abs(z.std() / std - 1) < 5 / np.sqrt(2 * n)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_equation_5_is_the_frame(schedule, weights):
    """Both printed forms of the posterior mean (in z_0, and in eps) against: shift out, DDPM's posterior, shift in. float64.
    The second form divides by alpha_t, which is 0 where a schedule ends in pure noise."""
    options = {"noise_schedule": schedule, "prediction": prediction_on(schedule), "mt_weights": {"x": weights}}
    diffusion = create_gaussian_diffusion(steps=100, **options)
    rng = torch.Generator().manual_seed(0)
    t = torch.arange(1, 100 if diffusion.betas[-1] < 1 else 99)
    z_0, eps, encoding = (torch.randn(len(t), 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(3))
    shift = lambda step: diffusion.aggregation.shift({"x": encoding}, step)  # noqa: E731
    y_t = diffusion.q_sample(z_0, t, eps)
    z_t = y_t + shift(t)
    frame = diffusion.q_posterior_mean_variance(z_0, z_t - shift(t), t)[0] + shift(t - 1)

    column = lambda a: torch.from_numpy(a)[t].view(-1, 1, 1, 1)  # noqa: E731
    before = lambda a, first: column(np.append(first, a[:-1]))  # noqa: E731
    alphas, abar = 1 - diffusion.betas, diffusion.alphas_cumprod
    a, ab, ab_before, beta = column(alphas), column(abar), before(abar, 1.0), column(diffusion.betas)
    b = diffusion.aggregation.coefficients["x"]
    at, at_before = column(b), before(b, 0.0)

    of_z0 = torch.sqrt(ab_before) * beta / (1 - ab)
    of_zt = torch.sqrt(a) * (1 - ab_before) / (1 - ab)
    of_e = at_before - torch.sqrt(a) * (1 - ab_before) / (1 - ab) * at
    in_z0 = of_z0 * z_0 + of_zt * z_t + of_e * encoding
    w = at / torch.sqrt(a) - at_before  # eq. 5's second form holds w_t itself
    in_eps = (z_t - beta / torch.sqrt(1 - ab) * eps) / torch.sqrt(a) - w * encoding
    scale = max(1.0, float(np.abs(b).max()))
    assert (frame - in_z0).abs().max() < 1e-12 * scale
    assert (frame - in_eps).abs().max() < 1e-12 * scale * float((1 / torch.sqrt(a)).max())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_and_coefficients_have_the_documented_size(weights):
    betas = get_named_beta_schedule("cosine", 1000)
    largest = aggregation_coefficients(aggregation_weights(weights, betas), betas).max()
    documented = {
        "none": 0.0,
        "paper": 0.90,
        "paper-literal": 898,
        "bridge": 1.0,
        "early": 1.0,
        "late": 1.0,
    }  # docs/method.md, section 4
    if weights in documented:
        assert largest == pytest.approx(documented[weights], rel=5e-3)


def test_each_modality_has_its_own_weights_and_shifts_add():
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine", mt_weights={"a": "paper", "b": "bridge"})
    t = torch.tensor([3, 19])
    a, b = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    both = diffusion.aggregation.shift({"a": a, "b": b}, t)
    torch.testing.assert_close(
        both, diffusion.aggregation.shift({"a": a}, t) + diffusion.aggregation.shift({"b": b}, t)
    )
    assert not diffusion.aggregation.shift({"a": a, "b": b}, torch.tensor([-1, -1])).any()
    assert not diffusion.aggregation.shift({}, t).any()
    with pytest.raises(ValueError, match="'c' has no aggregation weights"):
        diffusion.aggregation.shift({"c": a}, t)


def test_respacing_keeps_marginals_and_nothing_else():
    full = create_gaussian_diffusion(steps=100, noise_schedule="cosine", mt_weights={"x": "paper"})
    kept = [0, 7, 50, 99]
    few = full.respace(kept)
    np.testing.assert_allclose(few.alphas_cumprod, full.alphas_cumprod[kept], rtol=1e-9)
    np.testing.assert_array_equal(few.aggregation.coefficients["x"], full.aggregation.coefficients["x"][kept])
    assert few.timestep_map.tolist() == kept
    again = few.respace([1, 3])
    assert again.timestep_map.tolist() == [7, 99]


def test_rescaled_timesteps_and_map_reach_the_network():
    told = []
    model = lambda x, t: (told.append(t), torch.zeros_like(x))[1]  # noqa: E731
    diffusion = create_gaussian_diffusion(steps=200, rescale_timesteps=True, timestep_respacing="10,5")
    diffusion.p_mean_variance(model, torch.zeros(1, 3, 2, 2), torch.tensor([14]))
    assert told[0].tolist() == [199 * 1000 / 200]


def test_space_timesteps_follows_adm():
    assert space_timesteps(100, [100]) == list(range(100))
    assert space_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    assert len(space_timesteps(1000, "250")) == 250
    spaced = space_timesteps(300, "10,15,20")
    assert [sum(lo <= s < lo + 100 for s in spaced) for lo in (0, 100, 200)] == [10, 15, 20]
    for bad in ("ddim0", "1001", "10,x", "0"):
        with pytest.raises(ValueError, match="timestep_respacing"):
            space_timesteps(1000, bad)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="'papr'"):
        aggregation_weights("papr", np.full(3, 0.1))
    with pytest.raises(ValueError, match="'cosin'"):
        get_named_beta_schedule("cosin", 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn_sigma": True},
        {"learn_sigma": True, "rescale_learned_sigmas": True},
        {"use_kl": True, "learn_sigma": True},
        {"sigma_small": True},
        {"predict_xstart": True},
    ],
)
def test_losses_with_a_frame_equal_those_without_for_a_network_that_removes_it(options):
    """z_t is y_t + s_t and nothing else changes: a network that subtracts s_t has DDPM's losses (docs/method.md, section 2.3)."""
    diffusion = create_gaussian_diffusion(steps=50, noise_schedule="cosine", mt_weights={"x": "paper"}, **options)
    x_start, noise, encoding = torch.randn(
        3, 4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    t = torch.tensor([0, 1, 30, 49])
    channels = 2 if options.get("learn_sigma") else 1

    def plain(y, told):
        return torch.tanh(torch.cat([y] * channels, 1))

    def framed(z, told):
        return plain(z - diffusion.aggregation.shift({"x": encoding}, t), told)

    x_start = x_start.clamp(-1, 1)
    a = diffusion.training_losses(plain, x_start, t, noise=noise)["loss"]
    b = diffusion.training_losses(framed, x_start, t, noise=noise, encodings={"x": encoding})["loss"]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_guidance_moves_the_mean_of_gaussian_data_to_the_posterior():
    """ADM's two guidance rules: with the exact score of p(c | y_t) for Gaussian z_0 the law of z_0 | c comes out."""
    variance, observed, seen = 0.3, 0.5, 0.2  # c = z_0 + noise of variance `seen`
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, timestep_respacing="200")
    abar = torch.from_numpy(create_gaussian_diffusion(noise_schedule="cosine").alphas_cumprod).float()

    def model(x, t):
        a = abar[t].view(-1, 1, 1, 1)
        return torch.sqrt(1 - a) * x / (a * variance + 1 - a)

    def cond_fn(x, t):
        a = abar[t].view(-1, 1, 1, 1)
        gain = torch.sqrt(a) * variance / (a * variance + 1 - a)  # E[z_0 | y_t] = gain y_t
        spread = variance - gain * torch.sqrt(a) * variance + seen  # Var[c | y_t]
        return gain * (observed - gain * x) / spread

    mean, var = observed * variance / (variance + seen), variance * seen / (variance + seen)
    torch.manual_seed(0)
    noise = torch.randn(4000, 3, 2, 2)
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        drawn = loop(model, noise.shape, noise, False, cond_fn=cond_fn)
        assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)
        assert float(drawn.var()) == pytest.approx(var, rel=0.06)


def test_space_timesteps_rounds_as_adm_does():
    """ADM adds the stride up; 499.49999... and 500 differ for a quarter of all counts."""
    for count in range(2, 400):
        position, expected = 0.0, []
        for _ in range(count):
            expected.append(round(position))
            position += 999 / (count - 1)
        assert space_timesteps(1000, str(count)) == expected
    assert space_timesteps(1000, "21")[10] == 499


def test_the_empty_shift_fits_any_shape():
    diffusion = create_gaussian_diffusion(steps=10, noise_schedule="cosine")
    t = torch.arange(5)
    assert (torch.zeros(5, 7) + diffusion.aggregation.shift({}, t)).shape == (5, 7)
