"""Weights of the loss's terms: over time against the published formulas, over tasks on problems with a known answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from guided_mt.diffusion.intervals import INTERVALS, interval_clusters, timestep_intervals
from guided_mt.diffusion.resample import StratifiedSampler
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.modalities.weighting.on_gradients import gramian_of, outputs_of
from guided_mt.modalities.weighting.over_tasks import (
    TASK_WEIGHTINGS,
    UNCERTAINTY_RATE,
    GradientWeighting,
    TaskUncertainty,
    parameter_group,
)
from guided_mt.modalities.weighting.over_time import OverTime, Uncertainty
from guided_mt.training.optim import Optimizer

ONE = torch.zeros(10, dtype=torch.int64)  # one interval of ten timesteps
PACKAGES = {"pcgrad": ("torchjd",), "nash": ("torchjd", "cvxpy", "ecos")}


def weighting(name, tasks=("denoising", "other"), interval_of=ONE):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package, reason="needs the extra 'tasks'")
    return TASK_WEIGHTINGS[name](tasks, interval_of)


# ---------------------------------------------------------------- over time


def process(schedule="cosine", steps=1000, **options):
    return create_gaussian_diffusion(steps=steps, noise_schedule=schedule, **options)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_modality_is_weighed_as_a_network_that_predicts_z_0(schedule):
    """A head predicts data, so of the published factors it has those for z_0."""
    full = process(schedule)
    over_time = OverTime({"denoising": "uniform", "a": "p2", "b": "min-snr", "c": "uniform"}, full)
    t, values = torch.arange(0, 1000, 7), torch.rand(143)
    snr = torch.from_numpy(full.alphas_cumprod / (1 - full.alphas_cumprod))[t]
    torch.testing.assert_close(over_time.modality("a", values, t), (snr / (1 + snr)).float() * values)
    torch.testing.assert_close(over_time.modality("b", values, t), snr.clamp(max=5).float() * values)
    assert over_time.modality("c", values, t) is values and not list(over_time.parameters())


def test_a_learned_uncertainty_starts_as_no_weight_at_all():
    over_time = OverTime({"denoising": "learned", "a": "learned", "b": "uniform"}, process())
    t, values = torch.arange(0, 1000, 7), torch.rand(143)
    losses = {"loss": values, "mse": 0.75 * values, "vb": 0.25 * values}
    assert torch.equal(over_time.image(losses, t), 0.75 * values + 0.25 * values)
    assert torch.equal(over_time.modality("a", values, t), values)
    assert torch.equal(over_time.image({"loss": values, "l1": values}, t), values)
    assert sorted({name.split(".")[1] for name, _ in over_time.named_parameters()}) == ["a", "denoising"]


def test_a_learned_uncertainty_finds_the_logarithm_of_the_loss():
    """EDM2, eq. 14 to 16: L / exp(u) + u is least at u = log L, where every timestep contributes alike."""
    torch.manual_seed(0)
    u, steps = Uncertainty(1000), 250
    optimizer = torch.optim.Adam(u.parameters(), lr=0.03)
    law = lambda t: torch.exp(2 * torch.cos(t / 300))  # noqa: E731
    for _ in range(steps):
        t = torch.randint(0, 1000, (256,))
        optimizer.zero_grad()
        u.weighted(law(t), t).mean().backward()
        optimizer.step()
    t = torch.arange(20, 980)
    assert (u(t) - law(t).log()).abs().mean() < 0.1
    with torch.no_grad():
        values, found = law(t), u(t)
        torch.testing.assert_close(u.weighted(values, t), values / found.exp() + found)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_are_contiguous_and_cover_all(name, schedule, count):
    found = timestep_intervals(name, process(schedule, 100).alphas_cumprod, count)
    assert found.dtype == np.int64 and found[0] == 0 and found[-1] == count - 1
    assert set(np.diff(found)) <= {0, 1}


def test_intervals_by_snr_are_the_best_of_all():
    """ANT's clustering, by dynamic programming, against every way to cut 11 timesteps into four."""
    values = np.random.default_rng(0).normal(size=11)

    def cost(cuts):
        parts = np.split(values, cuts)
        return sum(((part - part[(len(part) - 1) // 2]) ** 2).sum() for part in parts)

    best = min(itertools.combinations(range(1, 11), 3), key=cost)
    found = interval_clusters(values, 4)
    assert tuple(np.flatnonzero(np.diff(found)) + 1) == best


def test_intervals_know_pure_noise_and_their_number():
    abar = np.append(process("cosine", 20).alphas_cumprod, 0.0)
    assert timestep_intervals("snr", abar, 4)[-1] == 3
    for count in (0, 22):
        with pytest.raises(ValueError, match=r"of 21 timesteps"):
            timestep_intervals("uniform", abar, count)
    with pytest.raises(ValueError, match="unknown intervals 'srn'"):
        timestep_intervals("srn", abar, 2)


def test_stratified_timesteps_visit_all_intervals_alike():
    """Whatever the batch and the process, by the samples' positions; the weights keep the mean (test_training_parts)."""
    interval_of = torch.tensor([0] * 5 + [1] * 1 + [2] * 14)
    sampler = StratifiedSampler(20, interval_of)
    u, positions = torch.rand(300), torch.arange(60, 360)
    t, weights = sampler(u, positions)
    assert torch.equal(interval_of[t], positions % 3)
    torch.testing.assert_close(weights, torch.tensor([15 / 20, 3 / 20, 42 / 20])[positions % 3])
    half = [sampler(u[part], positions[part]) for part in (slice(0, 100), slice(100, 300))]
    assert torch.equal(torch.cat([t for t, _ in half]), t)
    assert torch.equal(sampler(torch.full((3,), 1 - 1e-8), torch.arange(3))[0], torch.tensor([4, 5, 19]))
    assert not sampler.state_dict()


# ---------------------------------------------------------------- over tasks: what they do at first


@pytest.mark.parametrize("name", TASK_WEIGHTINGS)
def test_every_weighting_starts_as_the_sum(name):
    row = weighting(name, ("denoising", "a", "b"))
    objectives = {name: torch.rand(8) for name in ("denoising", "a", "off", "b")}
    taught = {name: torch.ones(8) for name in ("a", "off", "b")}
    expected = objectives["denoising"] + objectives["a"] + objectives["off"] + objectives["b"]
    assert torch.equal(row(objectives, taught, torch.arange(8)), expected)
    factors = row.factors()
    assert factors is None or factors.tolist() == [1, 1, 1]


def test_task_uncertainty_is_ants_rule_without_its_half():
    """exp(-s) L + s, one s for each interval and task, of samples that are taught the task; its minimum is s = log L."""
    row = TaskUncertainty(["denoising", "a"], torch.tensor([0] * 5 + [1] * 5))
    with torch.no_grad():
        row.s.copy_(torch.tensor([[0.1, 0.2], [0.3, -0.4]]))
    t, s = torch.tensor([2, 7]), torch.tensor([[0.1, 0.2], [0.3, -0.4]])
    objectives, taught = (
        {"denoising": torch.tensor([2.0, 3.0]), "a": torch.tensor([0.5, 0.0])},
        torch.tensor([1.0, 0.0]),
    )
    expected = (-s[:, 0]).exp() * objectives["denoising"] + s[:, 0]
    expected = expected + (-s[:, 1]).exp() * objectives["a"] + torch.tensor([0.2, 0.0])
    torch.testing.assert_close(row(objectives, {"a": taught}, t), expected)

    row = TaskUncertainty(["denoising", "a"], torch.tensor([0] * 5 + [1] * 5))
    network = nn.Parameter(torch.ones(2))
    optimizer = Optimizer([network], beside=parameter_group(row, row.learning_rate), weight_decay=0.1)
    t, of_each = torch.arange(10), {"denoising": torch.tensor([0.2] * 5 + [3.0] * 5), "a": torch.tensor([0.5] * 10)}
    for _ in range(600):
        network.grad = torch.zeros(2)
        row(of_each, {"a": torch.ones(10)}, t).mean().backward()
        optimizer.step(1e-3)
    torch.testing.assert_close(row.s.detach(), torch.tensor([[0.2, 0.5], [3.0, 0.5]]).log(), rtol=0.02, atol=0.02)
    model, own = optimizer.adamw.param_groups
    assert own["lr"] == UNCERTAINTY_RATE and own["weight_decay"] == 0
    assert model["lr"] == 1e-3 and model["weight_decay"] == 0.1 and (network < 1).all()


# ---------------------------------------------------------------- over tasks: two quadratics in conflict


class Quadratics:
    """L_k = scale_k / 2 |w - c_k|^2, c = (-1, 0), (1, 0): on the line between them no task gains but by the other's loss."""

    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)

    def __init__(self, scales=(1.0, 1.0)):
        self.scales = scales
        self.w = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def losses(self) -> dict[str, torch.Tensor]:
        found = [scale / 2 * (self.w - c).square().sum() for scale, c in zip(self.scales, self.centres, strict=True)]
        return dict(zip(("denoising", "other"), found, strict=True))

    def descend(self, row, steps=1, rate=0.01, step=0) -> list[list[float]]:
        """Gradient descent with steps of at most this length, numbered from `step` on; the losses after each."""
        seen = []
        for number in range(step, step + steps):
            losses = self.losses()
            if isinstance(row, GradientWeighting):
                row.measure(gramian_of(losses, self.w), number)
            each = {name: loss[None] for name, loss in losses.items()}
            loss = row(each, {"other": torch.ones(1)}, torch.zeros(1, dtype=torch.int64)).sum()
            self.w.grad = None
            loss.backward()
            with torch.no_grad():
                self.w -= rate * self.w.grad / self.w.grad.norm().clamp(min=1.0)
            seen.append([x.item() for x in self.losses().values()])
        return seen


def gradients(problem):
    return [torch.autograd.grad(loss, problem.w, retain_graph=True)[0] for loss in problem.losses().values()]


def test_pcgrad_takes_off_what_points_against_the_other_task():
    """Yu et al. 2020, algorithm 1, for two tasks: g_1 - (g_1 g_2 / |g_2|^2) g_2 and the other way round, added."""
    row, problem = weighting("pcgrad"), Quadratics((1.0, 3.0))
    with torch.no_grad():
        problem.w.copy_(torch.tensor([0.2, 0.3]))
    a, b = gradients(problem)
    assert a @ b < 0
    expected = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    row.measure(gramian_of(problem.losses(), problem.w), 0)
    torch.testing.assert_close(row.weights[0] * a + row.weights[1] * b, expected)
    with torch.no_grad():
        problem.w.copy_(torch.tensor([0.2, 3.0]))  # far away both want the same
    row.measure(gramian_of(problem.losses(), problem.w), 0)
    assert row.weights.tolist() == [1, 1]


def test_the_bargain_of_nash_and_its_scale():
    """Navon et al. 2022: (G a)_k = 1 / a_k up to one factor, and the direction is the same whatever a loss is measured in."""
    directions = []
    for scales in ((1.0, 1.0), (1.0, 1000.0), (0.001, 1.0)):
        row, problem = weighting("nash"), Quadratics(scales)
        gramian = gramian_of(problem.losses(), problem.w)
        row.measure(gramian, 0)
        a = row.weights.double()
        gains = a * (gramian.double() @ a)
        torch.testing.assert_close(gains, gains.mean().expand(2), rtol=0.02, atol=0.0)
        assert float(a.mean()) == pytest.approx(1)
        direction = sum(weight * gradient for weight, gradient in zip(a, gradients(problem), strict=True))
        directions.append(direction / direction.norm())
    for direction in directions[1:]:
        torch.testing.assert_close(direction, directions[0], rtol=0.02, atol=0.02)


def test_in_conflict_the_loud_task_wins_the_sum_and_not_the_bargain():
    """A loss that counts 100 times: its descent hurts the other task, Nash's never does until nothing can be gained."""
    fixed = Quadratics((1.0, 100.0)).descend(weighting("fixed"), 60, 0.05)
    nash = Quadratics((1.0, 100.0)).descend(weighting("nash"), 20, 0.05)
    start = [x.item() for x in Quadratics((1.0, 100.0)).losses().values()]
    assert fixed[-1][0] > 1.8 and fixed[-1][1] < 1.0  # at the second centre: L_1 = 2
    for before, after in itertools.pairwise([start, *nash]):
        assert after[0] < before[0] and after[1] < before[1]


@pytest.mark.parametrize(
    ("name", "ends"), [("fixed", (0.0, 0.99)), ("uncertainty", (0.81, 0.99)), ("pcgrad", (0.12, 0.85))]
)
def test_where_descent_ends(name, ends):
    """The table of docs/method.md, section 7.2, but for nash, which takes its time."""
    for scales, end in zip(((1.0, 1.0), (1.0, 100.0)), ends, strict=True):
        row, problem = weighting(name), Quadratics(scales)
        own = torch.optim.Adam(row.parameters(), lr=UNCERTAINTY_RATE) if list(row.parameters()) else None
        for step in range(120):
            problem.descend(row, rate=0.05, step=step)
            if own is not None:
                own.step()
                own.zero_grad()
        assert problem.w[0].item() == pytest.approx(end, abs=0.01) and abs(problem.w[1].item()) < 0.05


@pytest.mark.parametrize("name", ["pcgrad", "nash"])
def test_nothing_is_measured_of_gradients_that_tell_nothing(name):
    row = weighting(name)
    row.weights.copy_(torch.tensor([0.5, 1.5]))
    for gramian in (torch.full((2, 2), torch.nan), torch.zeros(2, 2)):
        row.measure(gramian, 0)
        assert row.weights.tolist() == [0.5, 1.5]


def test_pcgrad_draws_its_order_from_the_step_alone():
    """Three tasks in conflict: the order matters; the same step has the same weights, and the generator of others is left alone."""
    angles = torch.tensor([0.0, 2.0, 4.1])
    gradients = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [2.0], [0.5]])
    gramian, found = gradients @ gradients.T, set()
    for step in range(6):
        row, again = weighting("pcgrad", ("denoising", "a", "b")), weighting("pcgrad", ("denoising", "a", "b"))
        before = torch.get_rng_state()
        row.measure(gramian, step)
        assert torch.equal(torch.get_rng_state(), before)
        torch.randn(3)
        again.measure(gramian, step)
        assert torch.equal(row.weights, again.weights)
        found.add(tuple(row.weights.tolist()))
    assert len(found) > 1


# ---------------------------------------------------------------- gradients on the features


def test_the_gramian_of_parts_adds_up():
    """On features the gradients of samples stand side by side, so a batch's Gramian is the sum of its parts'."""
    torch.manual_seed(0)
    body, heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
    x = torch.randn(8, 4)

    def gramian(rows):
        with outputs_of(body) as features:
            with torch.no_grad():
                body(x)  # a pass without gradient is not kept
            seen = body(x[rows])
        (kept,) = features
        assert kept is seen
        objectives = {str(k): head(seen).square().sum() / len(x) for k, head in enumerate(heads)}
        found = gramian_of(objectives, kept, lambda loss: 2.0**20 * loss)
        rows = [torch.autograd.grad(loss, kept, retain_graph=True)[0].flatten() for loss in objectives.values()]
        torch.testing.assert_close(found, torch.stack(rows) @ torch.stack(rows).T)
        return found

    torch.testing.assert_close(gramian(slice(0, 3)) + gramian(slice(3, 8)), gramian(slice(0, 8)))
    assert not body._forward_hooks
    nothing = {"a": torch.zeros((), requires_grad=True), "b": body(x).sum()}
    with outputs_of(body) as features:
        nothing["b"] = body(x).sum()
    assert gramian_of(nothing, features[-1])[0].tolist() == [0, 0]
