"""The published rules, step by step, against PyPI's diffusers: on timesteps that are even in log SNR ours are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guided_mt.diffusion.process import GaussianDiffusion, ModelVarType
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.sampling import sample
from guided_mt.diffusion.targets import ModelMeanType

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, of numpy
SHAPE = (3, 2, 2)
COUNT = 12


def even_in_log_snr() -> np.ndarray:
    """betas [COUNT] whose lambda_t falls evenly from 3 to -4."""
    abar = 1 / (1 + np.exp(-2 * np.linspace(3, -4, COUNT)))
    return 1 - abar / np.append(1.0, abar[:-1])


def network(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Nonlinear in the state and the timestep, of the size of its target."""
    return torch.sin(1.3 * z + 0.2 * t.view(-1, 1, 1, 1)) + 0.3 * z


def theirs(name: str, prediction: str):
    import diffusers

    options = {"num_train_timesteps": COUNT, "trained_betas": even_in_log_snr(), "prediction_type": prediction}
    if name.startswith("unipc"):
        order = 3 if name == "unipc3" else 2
        scheduler = diffusers.UniPCMultistepScheduler(
            **options, solver_order=order, timestep_spacing="trailing", final_sigmas_type="zero"
        )
        scheduler.set_timesteps(COUNT)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**options, final_sigmas_type="zero", euler_at_final=True)
        scheduler.set_timesteps(timesteps=list(range(COUNT - 1, -1, -1)))
    assert scheduler.timesteps.tolist() == list(range(COUNT - 1, -1, -1))
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["dpm++", "unipc", "unipc3"])
def test_deterministic_rules(name, prediction):
    targets = {"epsilon": ModelMeanType.EPSILON, "sample": ModelMeanType.START_X, "v_prediction": ModelMeanType.V}
    diffusion = GaussianDiffusion(
        betas=even_in_log_snr(), model_mean_type=targets[prediction], model_var_type=ModelVarType.FIXED_SMALL
    )
    seeds = torch.arange(4)
    ours = sample(network, diffusion, {}, (4, *SHAPE), sampler=name, seeds=seeds, clip_denoised=False).x_start
    scheduler, z = theirs(name, prediction), SampleStreams(seeds).normal(*SHAPE)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, torch.full((4,), int(t))), t, z).prev_sample
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)


def test_stochastic_rule():
    """One step at a time, with the same noise."""
    import diffusers

    diffusion = GaussianDiffusion(betas=even_in_log_snr(), model_var_type=ModelVarType.FIXED_SMALL)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=COUNT,
        trained_betas=even_in_log_snr(),
        algorithm_type="sde-dpmsolver++",
        final_sigmas_type="zero",
        euler_at_final=True,
    )
    scheduler.set_timesteps(timesteps=list(range(COUNT - 1, -1, -1)))
    seeds = torch.arange(4)
    ours = sample(network, diffusion, {}, (4, *SHAPE), sampler="sde-dpm++", seeds=seeds, clip_denoised=False).x_start
    streams = SampleStreams(seeds)
    z = streams.normal(*SHAPE)
    for t in scheduler.timesteps:
        noise = streams.normal(*SHAPE)
        z = scheduler.step(network(z, torch.full((4,), int(t))), t, z, variance_noise=noise).prev_sample
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)
