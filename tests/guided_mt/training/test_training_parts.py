"""The parts of a training step: timestep samplers, head variances, objective, optimiser, averages, log."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.resample import SCHEDULE_SAMPLERS, LossSecondMomentResampler, create_named_schedule_sampler
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.modalities import ImageModality, Images, MaskedImage
from guided_mt.networks.heads import HeadVariance
from guided_mt.training.ema import Ema, warmed
from guided_mt.training.objective import multi_task_losses
from guided_mt.training.optim import Optimizer, learning_rate
from guided_mt.training.record import Record

# ---------------------------------------------------------------- timestep samplers


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_importance_weights_keep_the_mean(name):
    """E over draws of weight * f(t) is the plain mean of f, whatever the probabilities."""
    sampler = create_named_schedule_sampler(name, 20)
    for _ in range(12):
        sampler.update(torch.arange(20), torch.linspace(0.1, 5, 20))
    t, weights = sampler(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    values = torch.cos(t.float())
    assert (weights * values).mean() == pytest.approx(float(torch.cos(torch.arange(20.0)).mean()), abs=0.01)


def test_second_moment_history_is_that_of_one_at_a_time():
    """A whole batch at once, with repeats beyond the history's length, against a plain queue per timestep."""
    sampler = LossSecondMomentResampler(5, history=4)
    queues = [[] for _ in range(5)]
    rng = np.random.default_rng(0)
    for size in (3, 40, 1, 17):
        t, losses = rng.integers(0, 5, size), rng.random(size).astype(np.float32)
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        for step, loss in zip(t, losses, strict=True):
            queues[step] = [*queues[step], loss][-4:]
    for step in range(5):
        assert sorted(sampler.losses[step].tolist()) == sorted(np.float32(queues[step]).tolist())
    p = np.array([math.sqrt(np.mean(np.square(q))) for q in queues])
    expected = p / p.sum() * (1 - 0.001) + 0.001 / 5
    np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-5)


def test_second_moment_is_uniform_until_every_timestep_has_a_history():
    sampler = LossSecondMomentResampler(4, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.ones(7) * torch.arange(7))
    np.testing.assert_allclose(sampler.weights(), 0.25)


def test_unknown_schedule_sampler():
    with pytest.raises(ValueError, match="unknown 'unifrom'"):
        create_named_schedule_sampler("unifrom", 10)


# ---------------------------------------------------------------- heads


def test_head_variance_finds_the_error_and_forgets():
    variance = HeadVariance(100)
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="no head variance"):
        variance.value()
    truth = torch.linspace(0.1, 1.0, 100)
    for scale in (20.0, 1.0):  # an early bad phase must fade, within 400 visits
        for _ in range(600):
            t = torch.randint(0, 100, (64,), generator=rng)
            error = truth[t] * scale * torch.rand(64, generator=rng) * 2
            variance.update(variance.sums(t, torch.stack([error, torch.ones(64)])))
    assert (variance.value() / truth - 1).abs().mean() < 0.1


def test_head_variance_leaves_out_dropped_and_broken_samples():
    variance = HeadVariance(10)
    t, weights = torch.tensor([3, 3, 3]), torch.tensor([1.0, 0.0, 1.0])
    record = Record.of(t, {"masked": torch.tensor([1.0, 5.0, math.nan])}, {"masked": weights})
    variance.update(variance.sums(t, record.rows("masked")))
    assert torch.allclose(variance.value(), torch.ones(10))


def test_head_variances_of_several_processes_are_those_of_one():
    whole, parts = HeadVariance(10), [HeadVariance(10), HeadVariance(10)]
    for _ in range(3):
        t, error, weight = torch.randint(0, 10, (8,)), torch.rand(8), torch.randint(0, 2, (8,)).float()
        rows = torch.stack([error * weight, weight])
        whole.update(whole.sums(t, rows))
        sums = sum(parts[0].sums(t[half], rows[:, half]) for half in (slice(4), slice(4, 8)))
        for part in parts:
            part.update(sums)
    torch.testing.assert_close(whole.state_dict(), parts[0].state_dict())
    assert torch.equal(parts[0].error_sum, parts[1].error_sum)


def test_gaussian_log_prob():
    x, mean = torch.randn(2, 4, 3, 2, 2)
    variance = torch.linspace(0.1, 2, 7)
    t = torch.tensor([0, 3, 6, 3])
    ours = ImageModality("x", variance).log_prob(mean, x, t)
    reference = torch.distributions.Normal(mean, variance[t].sqrt().view(-1, 1, 1, 1)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(ours, reference)


# ---------------------------------------------------------------- objective


class Recorder(nn.Module):
    """Remembers its inputs; predicts nothing well."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, z_t, t, modalities, given=None, unconditional=None):
        self.z_t, self.given, self.unconditional = z_t, modalities, unconditional
        return ModelOutput(self.weight * z_t, {"masked": self.weight * z_t})


def objective(variant, drop_prob=0.0, loss_weight=0.1, task=True):
    rng = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 16, 3, 8, 8, generator=rng)
    t = torch.arange(16) * 60
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", mt_weights={"masked": "paper"} if task else {})
    modalities = {"masked": MaskedImage(patch=2)} if task else {}
    model = Recorder() if task else lambda z, t, unconditional=None: 0.5 * z
    streams = SampleStreams(0, torch.arange(16))
    options = {"variant": variant, "drop_prob": drop_prob, "loss_weight": loss_weight}
    losses = multi_task_losses(model, diffusion, modalities, Images(x_start), t, noise, streams, **options)
    streams = SampleStreams(0, torch.arange(16))
    streams.uniform()
    masked = MaskedImage(patch=2).from_batch(Images(x_start), streams)
    return losses, model, diffusion, x_start, noise, t, masked


def test_form_u_sees_the_frame():
    losses, model, diffusion, x_start, noise, t, masked = objective("U")
    y_t = diffusion.q_sample(x_start, t, noise)
    torch.testing.assert_close(model.z_t, y_t + diffusion.aggregation.shift({"masked": masked}, t))
    assert model.given == {}
    mse = ((0.5 * model.z_t - noise) ** 2).flatten(1).mean(1)
    head = ((0.5 * model.z_t - masked) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses.loss, mse + 0.1 * head)
    assert list(losses.terms) == ["mse", "masked"]


def test_form_x_is_given_the_modality_and_sees_no_frame():
    _, model, diffusion, x_start, noise, t, masked = objective("X")
    torch.testing.assert_close(model.z_t, diffusion.q_sample(x_start, t, noise))
    assert torch.equal(model.given["masked"], masked)


@pytest.mark.parametrize("variant", ["U", "X"])
def test_dropped_samples_are_plain_generation(variant):
    dropped, model, *_ = objective(variant, drop_prob=1.0)
    plain, *_ = objective(variant, task=False)
    torch.testing.assert_close(dropped.loss, plain.loss)
    assert not any(taught.any() for taught in dropped.taught.values()) and model.unconditional is True
    half, model, *_ = objective(variant, drop_prob=0.5)
    taught = half.taught["masked"]
    assert 0 < taught.sum() < 16 and torch.equal(model.unconditional, taught == 0)


def test_loss_weight_zero_is_the_conditional_twin():
    losses, *_ = objective("X", loss_weight=0.0)
    torch.testing.assert_close(losses.loss, losses.terms["mse"])
    losses.loss.mean().backward()  # the head stays in the graph, so every process has every gradient


# ---------------------------------------------------------------- optimiser and averages


def quadratic(**options):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    return parameter, Optimizer([parameter], **options)


@pytest.mark.parametrize("fp16", [False, True])
def test_clipped_steps_equal_torchs(fp16):
    ours, optimizer = quadratic(grad_clip=0.5, weight_decay=0.1, fp16=fp16)
    theirs = nn.Parameter(ours.detach().clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for k in range(4):
        optimizer.scale((ours**2).sum() * k).backward()
        norm = optimizer.step(0.01)
        (theirs**2).sum().mul(k).backward()
        expected = nn.utils.clip_grad_norm_([theirs], 0.5)
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_changes_nothing_but_its_counters(bad):
    parameter, optimizer = quadratic(grad_clip=1.0)
    (parameter**2).sum().backward()
    optimizer.step(0.1)
    before = parameter.detach().clone()
    state = {k: v.clone() for k, v in optimizer.adamw.state[parameter].items()}
    for _ in range(3):
        (parameter * bad).sum().backward()
        optimizer.step(0.1)
    assert torch.equal(parameter, before)
    assert all(torch.equal(optimizer.adamw.state[parameter][k], v) for k, v in state.items())
    assert optimizer.skipped.total == 3 and optimizer.skipped.longest_row == 3
    (parameter**2).sum().backward()
    optimizer.step(0.1)
    assert not torch.equal(parameter, before) and optimizer.skipped.in_row == 0 and optimizer.skipped.longest_row == 3


def test_the_loss_scale_falls_on_overflow_has_a_floor_and_grows():
    parameter, optimizer = quadratic(fp16=True, scale_growth=0.5)
    for expected in [*range(19, -1, -1), 0, 0]:
        (parameter * math.inf).sum().backward()
        optimizer.step(0.1)
        assert float(optimizer.log2_scale) == expected
    assert optimizer.skipped.total == 22 and optimizer.skipped.longest_row == 2  # those at the floor alone make a row
    (parameter**2).sum().backward()
    optimizer.step(0.1)
    assert float(optimizer.log2_scale) == 0.5


def test_averages_that_warm_up_are_latent_diffusions():
    """The values of LitEma(decay=0.9999) of one weight that is k after step k: rates 2/11, 3/12, 4/13, ..."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    ema, expected = Ema(layer, ["0.9999", "0.2"]), [0.0, 0.0]
    for step in range(1, 51):
        layer.weight.data.fill_(step)
        ema.update(step)
        for k, rate in enumerate((0.9999, 0.2)):
            kept = min(rate, (1 + step) / (10 + step))
            expected[k] -= (1 - kept) * (expected[k] - step)
    found = [float(ema.averages[rate][0]) for rate in ("0.9999", "0.2")]
    assert found == pytest.approx(expected, rel=1e-6)
    assert warmed(0.9999, 1) == 2 / 11 and warmed(0.9999, 10**6) == 0.9999
    share = 1.0  # of the initial weights, after a thousand steps
    for step in range(1, 1001):
        share *= warmed(0.9999, step)
    assert share < 1e-9 < 0.9 < 0.9999**1000


def test_ema_and_swap():
    model = nn.Linear(2, 1)
    ema = Ema(model, ["0.9", "0.5"])
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    ema.update()
    torch.testing.assert_close(ema.state_dict("0.9", model)["weight"], start + 0.1)
    torch.testing.assert_close(ema.state_dict("0.5", model)["weight"], start + 0.5)
    ema.swap("0.5")
    torch.testing.assert_close(model.weight.detach(), start + 0.5)
    ema.swap("0.5")
    torch.testing.assert_close(model.weight.detach(), start + 1.0)


def test_learning_rate():
    assert [learning_rate(s, 1.0, 4, 0) for s in (0, 1, 3, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert [learning_rate(s, 2.0, 0, 10) for s in (0, 5, 10, 20)] == [2.0, 1.0, 0.0, 0.0]
    assert [learning_rate(s, 2.0, 0, 10, lag=1) for s in (0, 1, 6, 11)] == [2.0, 2.0, 1.0, 0.0]


def test_moments_are_read_in_the_parameters_memory_format():
    """A run saved channels-last goes on with contiguous weights as if it had been contiguous before."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layer, x = torch.nn.Conv2d(4, 8, 3), torch.randn(2, 4, 8, 8)
        optimizer = Optimizer(layer.parameters())
        layer(x).square().sum().backward()
        optimizer.step(1e-2)
        state = optimizer.state_dict()
        state["adamw"]["state"] = {
            k: {name: v.to(memory_format=layout) if v.ndim == 4 else v for name, v in moments.items()}
            for k, moments in state["adamw"]["state"].items()
        }
        optimizer.load_state_dict(state)
        (layer(x) - 1).square().sum().backward()
        optimizer.step(1e-2)
        found.append(layer.weight.detach())
    assert torch.equal(*found)


def test_averages_follow_the_parameters():
    layer = torch.nn.Conv2d(4, 8, 3)
    ema = Ema(layer, ["0.9"])
    before = ema.averages["0.9"][0].clone()
    layer.to(memory_format=torch.channels_last)
    ema.follow()
    average = ema.averages["0.9"][0]
    assert torch.equal(average, before) and average.stride() == layer.weight.stride() and not average.requires_grad
