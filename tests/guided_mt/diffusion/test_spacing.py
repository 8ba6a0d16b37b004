"""Few network calls: where they are placed, how many there are, and how good they are with the best network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import JointGaussian, frechet, prediction_on

from guided_mt.diffusion.aggregation import WEIGHTS, Aggregation
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion, ModelVarType
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.schedules import SCHEDULES, get_named_beta_schedule, half_log_snr
from guided_mt.diffusion.spacing import solver_timesteps
from guided_mt.diffusion.targets import TARGETS, ModelMeanType
from guided_mt.modalities import ImageModality

SECOND_ORDER = [name for name in SAMPLERS if name not in ("ddpm", "ddim", "heun")]
SOUND_WEIGHTS = [name for name in WEIGHTS if name not in ("paper-literal", "none")]
VARIANCES = np.array([0.3, 1.0, 2.2])
SHAPE = (3, 2, 2)


def schedule(name: str) -> np.ndarray:
    """abar_t [1000]; "ldm" is latent-diffusion's schedule, linear in sqrt(beta), and "sd" Stable Diffusion's."""
    ends = {"ldm": (0.0015, 0.0195), "sd": (0.00085, 0.012)}
    if name in ends:
        return np.cumprod(1 - np.linspace(*np.sqrt(ends[name]), 1000) ** 2)
    return np.cumprod(1 - get_named_beta_schedule(name, 1000))


def process(name: str, calls: int = 0, weights: str = "none", target: str = ModelMeanType.EPSILON) -> GaussianDiffusion:
    abar = schedule(name)
    betas = 1 - abar / np.append(1.0, abar[:-1])
    full = GaussianDiffusion(
        betas=betas,
        model_mean_type=target,
        model_var_type=ModelVarType.FIXED_SMALL,
        aggregation=Aggregation.from_weights({"x": weights}, betas),
    )
    return full.respace(kept_timesteps(full, f"solver{calls}")) if calls else full


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("count", [2, 3, 13, 50, 99, 100])
def test_timesteps_are_distinct_sorted_and_hold_both_ends(name, weights, count):
    options = {"noise_schedule": name, "prediction": prediction_on(name), "mt_weights": {"x": weights}}
    full = create_gaussian_diffusion(steps=100, sigma_small=True, **options)
    kept = kept_timesteps(full, f"solver{count}")
    assert len(set(kept)) == count and kept == sorted(kept) and kept[0] == 0 and kept[-1] == 99
    assert kept == kept_timesteps(full, f"frame{count}")


def test_one_timestep_is_the_noisiest_and_impossible_counts_are_refused():
    abar = schedule("cosine")
    assert solver_timesteps(abar, [], 1) == [999]
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"can't take {count} steps of 1000"):
            solver_timesteps(abar, [], count)


def test_above_the_noise_steps_are_even_in_log_snr_and_denser_where_a_frame_moves():
    abar = schedule("cosine")
    lambdas = half_log_snr(abar)[solver_timesteps(abar, [], 20)]
    steps = -np.diff(lambdas)[lambdas[1:] > -0.5][2:]  # the first two are a matter of whole timesteps near t = 0
    assert steps.max() / steps.min() < 1.35
    moving = np.zeros(1000)
    moving[600:] = 1.0
    near = sum(580 < t < 620 for t in solver_timesteps(abar, [moving], 100))
    assert near > sum(580 < t < 620 for t in solver_timesteps(abar, [], 100)) + 5


def gaussian_model(full: GaussianDiffusion, calls: list[int]):
    """The best network for pixels of variance VARIANCES by channel; it predicts what `full` wants."""
    variances = torch.from_numpy(VARIANCES).view(1, 3, 1, 1)
    a, b = full.xstart_coefficients()

    def model(z, t):
        calls.append(int(t[0]))
        abar = full.alphas_cumprod[calls[-1]]
        x_start = np.sqrt(abar) * variances / (abar * variances + 1 - abar) * z
        return (x_start - a[calls[-1]] * z) / b[calls[-1]]

    return model


@pytest.mark.parametrize("target", [target for target, row in TARGETS.items() if row.eps_error is not None])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["cosine", "linear", "straight", "ldm", "sd"])
def test_a_gaussian_at_few_calls(name, sampler, target):
    """20 calls of a second-order rule are as good as 250 ancestral steps, 10 within 0.12, and never worse than DDIM. Largest
    relative error of the drawn variances; with 6000 x 4 draws its floor is about 0.03."""
    if target == "eps" and schedule(name)[-1] == 0:
        pytest.skip("ends in pure noise, where eps says nothing")
    errors = {}
    for rule, count in [(sampler, 10), (sampler, 20), ("ddim", 20)]:
        calls: list[int] = []
        full = process(name, target=target)
        drawn = sample(
            gaussian_model(full, calls),
            process(name, count, target=target),
            {},
            (6000, *SHAPE),
            sampler=rule,
            clip_denoised=False,
            seeds=range(6000),
        ).x_start.double()
        assert len(calls) == count and (rule == "heun" or calls == sorted(set(calls), reverse=True))
        errors[rule, count] = float(np.abs(drawn.var(dim=(0, 2, 3)).numpy() / VARIANCES - 1).max())
    if sampler in SECOND_ORDER:
        assert errors[sampler, 10] < 0.12 and errors[sampler, 20] < 0.07
    if sampler not in ("ddpm", "ddim"):
        assert errors[sampler, 20] < errors["ddim", 20]


@pytest.mark.parametrize("sampler", SECOND_ORDER)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_an_unknown_modality_at_few_calls(name, sampler, weights):
    """As good as 250 ancestral steps with 20 calls. On the linear schedule `paper` ends at alpha-tilde 4.5, and what starts from
    N(0, I) is far from its marginal there: only new noise forgets that."""
    data = JointGaussian.make(12, seed=1)
    target = prediction_on(name)
    full = process(name, weights=weights, target=target)
    drawn = sample(
        data.network_u(full),
        process(name, 20, weights=weights, target=target),
        {"x": ImageModality("x")},
        (6000, *SHAPE),
        sampler=sampler,
        seeds=range(6000),
        clip_denoised=False,
    )
    flat = drawn.x_start.flatten(1).double().numpy()
    error = frechet(flat.T @ flat / len(flat), data.cov_z)
    if weights == "paper" and name == "linear" and not sampler.startswith("sde"):
        assert error > 0.5
    else:
        jump = weights == "paper" and name == "straight"  # alpha-tilde falls from 0.63 to 0 in the last step
        assert error < (0.012 if jump else 0.008)  # 6000 exact draws are 0.002 away


@pytest.mark.parametrize("sampler", SECOND_ORDER)
@pytest.mark.parametrize("conditioning", ["network", "own-head"])
def test_a_given_modality_at_few_calls(sampler, conditioning):
    data = JointGaussian.make(12, seed=2, isotropic=conditioning == "own-head")
    full = process("cosine", weights="bridge")
    x = torch.from_numpy(data.draw_x(6000, np.random.default_rng(0))).float().view(6000, *SHAPE)
    drawn = sample(
        (data.network_x if conditioning == "network" else data.network_u)(full),
        process("cosine", 20, weights="bridge"),
        {"x": ImageModality("x", variance=data.head_variance(full))},
        x.shape,
        known={"x": x},
        sampler=sampler,
        conditioning=conditioning,
        seeds=range(6000),
        clip_denoised=False,
    ).x_start
    gain, cov = data.given_x()
    residual = drawn.flatten(1).double().numpy() - x.flatten(1).double().numpy() @ gain.T
    assert np.square(residual.mean(0)).sum() < 0.01
    assert frechet(residual.T @ residual / len(residual), cov) < 0.01


@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++", "unipc"])
def test_evenly_spaced_timesteps_do_not_make_a_solver_worse_than_ddim(sampler):
    """They end in one step that is several times as long as the one before: the rules extrapolate over no longer step than that."""
    errors = {}
    for rule in (sampler, "ddim"):
        full = process("linear")
        even = full.respace(kept_timesteps(full, "20"))
        drawn = sample(
            gaussian_model(full, []), even, {}, (4000, *SHAPE), sampler=rule, seeds=range(4000), clip_denoised=False
        ).x_start.double()
        errors[rule] = float(np.abs(drawn.var(dim=(0, 2, 3)).numpy() / VARIANCES - 1).max())
    assert errors[sampler] < 0.6 * errors["ddim"]


def test_a_sampler_with_two_calls_per_step_is_one_class_and_one_row(monkeypatch):
    """A midpoint rule, written as a newcomer would."""
    from guided_mt.diffusion.sampling import Sampler

    class Midpoint(Sampler):
        def run(self, z, steps):
            steps = list(steps)
            for step, middle, to in zip(steps[::2], [*steps[1::2], -1], [*steps[2::2], -1], strict=False):
                estimate = self.denoise(z, step)
                if middle >= 0:
                    estimate = self.denoise(self.move(z, step, middle, estimate), middle)
                z = self.move(z, step, to, estimate)
            return z

    monkeypatch.setitem(SAMPLERS, "midpoint", Midpoint)
    calls: list[int] = []
    full = process("cosine")
    drawn = sample(
        gaussian_model(full, calls),
        process("cosine", 40),
        {},
        (4000, *SHAPE),
        sampler="midpoint",
        seeds=range(4000),
        clip_denoised=False,
    ).x_start.double()
    assert len(calls) == 40
    assert np.abs(drawn.var(dim=(0, 2, 3)).numpy() / VARIANCES - 1).max() < 0.12


def test_dynamic_threshold_keeps_each_sample_inside_by_its_own_percentile():
    process = create_gaussian_diffusion(steps=10, noise_schedule="cosine", predict_xstart=True)
    wide = torch.linspace(-3, 3, 12).view(1, *SHAPE)
    model = lambda z, t, m: ModelOutput(torch.cat([wide, wide / 6]))  # noqa: E731
    drawn = sample(model, process, {}, (2, *SHAPE), sampler="ddim", seeds=[0, 1], dynamic_threshold=0.8).x_start
    most = float(torch.quantile(wide.abs().flatten(), 0.8))
    torch.testing.assert_close(drawn[0], wide[0].clamp(-most, most) / most)
    torch.testing.assert_close(drawn[1], wide[0] / 6)  # inside [-1, 1] nothing is changed
