"""Whole runs of latent-diffusion's DDIM, from the same noise (tests/golden/ldm_runs.npz, by benchmarks/against_parents.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_latent import random_model

from guided_mt.diffusion.process import GaussianDiffusion, ModelVarType
from guided_mt.diffusion.sampling import sample
from latent_mt.model.schedules import ddim_timesteps, make_beta_schedule

SHAPE, STEPS = (2, 4, 8, 8), 10


def eps_network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.3 * x + 0.001 * t.float().view(-1, 1, 1, 1))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ldmn_is_ldms_ddim_to_its_last_step(eta, golden):
    betas = make_beta_schedule("linear", 1000, 0.0015, 0.0195)
    full = GaussianDiffusion(betas=betas, model_var_type=ModelVarType.FIXED_SMALL)
    process = full.respace(ddim_timesteps(STEPS, 1000), final_alpha_cumprod=float(full.alphas_cumprod[0]))
    found = sample(eps_network, process, {}, SHAPE, sampler="ddim", eta=eta, seeds=[0, 1], clip_denoised=False).x_start
    with np.load(golden / "ldm_runs.npz") as file:
        torch.testing.assert_close(found, torch.from_numpy(file[f"ddim_eta{eta:g}"]), rtol=0, atol=1e-4)


def test_only_ddim_ends_where_ldms_does():
    model = random_model()
    first = model.diffusion.alphas_cumprod[0]
    assert model.respaced("ldm10").final_alpha_cumprod == pytest.approx(first)
    assert model.respaced("ldm10", "dpm++").final_alpha_cumprod == 1
    assert model.respaced("10").final_alpha_cumprod == 1
