"""Whole runs of guided-diffusion's own code, from the same noise (tests/golden/adm_runs.npz, by benchmarks/against_parents.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.diffusion.sampling import sample
from guided_mt.diffusion.sampling.guidance import classifier_guidance
from guided_mt.training.classifier_loop import ClassifierLoop
from guided_mt.training.optim import learning_rate
from guided_mt.training.train_loop import TrainLoop

SHAPE, STEPS = (2, 3, 8, 8), 10


@pytest.fixture
def adm(golden) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "adm_runs.npz"))


def network(x: Tensor, t: Tensor) -> Tensor:
    t = t.float().view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(0.3 * x + 0.001 * t), torch.cos(0.7 * x - 0.002 * t)], dim=1)


def classifier(x: Tensor, t: Tensor) -> Tensor:
    return 3.0 * x.flatten(1)[:, :5] - 0.001 * t.float().view(-1, 1)


def process(respacing: str = str(STEPS)):
    return create_gaussian_diffusion(learn_sigma=True, noise_schedule="cosine", timestep_respacing=respacing)


def drawn(sampler: str, respacing: str = str(STEPS), scale: float = 0.0, **options) -> Tensor:
    guide = classifier_guidance(classifier, torch.tensor([1, 3]), scale) if scale else None
    made = sample(network, process(respacing), {}, SHAPE, sampler=sampler, seeds=[0, 1], cond_fn=guide, **options)
    return made.x_start


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ancestral", {"sampler": "ddpm"}),
        ("ddim25", {"sampler": "ddim", "respacing": "ddim25"}),
        ("guided_ancestral", {"sampler": "ddpm", "scale": 2.0}),
        ("guided_ddim_1", {"sampler": "ddim", "scale": 1.0, "clip_before_guidance": True}),
        ("guided_ddim_200", {"sampler": "ddim", "scale": 200.0, "clip_before_guidance": True}),
    ],
)
def test_samples_are_adms(name, arguments, adm):
    torch.testing.assert_close(drawn(**arguments), torch.from_numpy(adm[name]), rtol=0, atol=2e-5)


def test_what_is_clipped_last_stays_in_range(adm):
    """Ours, by --sampler ddim: another result than ADM's, whose z_0 leaves [-1, 1] between the steps."""
    ours = drawn("ddim", scale=1.0)
    assert float((ours - torch.from_numpy(adm["guided_ddim_1"])).abs().max()) > 0.1
    assert float(ours.abs().max()) <= 1


def test_bits_per_dimension_come_in_adms_order(adm):
    streams = SampleStreams(torch.arange(2))
    bound = process().calc_bpd_loop(
        network, torch.from_numpy(adm["images"]), noise_fn=lambda step: streams.normal(*SHAPE[1:])
    )
    for name, values in bound.items():
        torch.testing.assert_close(values, torch.from_numpy(adm[f"bpd_{name}"]), rtol=1e-5, atol=1e-6)


def test_annealed_learning_rates_are_adms(adm):
    """image_train.py sets the rate after a step, classifier_train.py before it."""
    steps = len(adm["annealed"])
    found = [learning_rate(step, 1e-3, 0, steps, lag=TrainLoop.annealing_lag) for step in range(steps)]
    np.testing.assert_allclose(found, adm["annealed"], rtol=1e-12)
    assert learning_rate(3, 1.0, 0, 10, lag=ClassifierLoop.annealing_lag) == pytest.approx(0.7)
