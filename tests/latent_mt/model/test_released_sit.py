"""Released flow models on DiT's network: SiT's file, and REPA's with its projectors and time the other way."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny import words
from tiny_dit import CLASSES, params_of, random_dit
from tiny_latent import FIRST_STAGE, LATENT, SIZE

from guided_mt.networks.dit import DiT
from latent_mt.commands import latent_sample
from latent_mt.commands.loading import load_model, read_saved
from latent_mt.model.backbones import described
from latent_mt.runs.configuration import load_config
from latent_mt.runs.targets import instantiate

STEPS = 1000
SIT = {"parameterization": "velocity-to-data", "mt_time": "data-level"}
REPA = {"parameterization": "velocity", "mt_time": "noise-level"}


def write(folder: Path, network: DiT, target: str, learn_sigma: bool, **values: str) -> Path:
    """model.pt as it is published, its configuration beside it, and an autoencoder."""
    state = network.state_dict()
    if target == "models.sit.SiT":  # as REPA's training writes it
        projectors = {"projectors.0.0.weight": torch.randn(16, 8), "projectors.0.0.bias": torch.zeros(16)}
        saved = {"model": state, "ema": state | projectors, "opt": {}, "args": argparse.Namespace(lr=1e-4), "steps": 7}
    else:
        saved = state
    torch.save(saved, folder / "model.pt")
    torch.save({"state_dict": instantiate(FIRST_STAGE, "stage").state_dict()}, folder / "kl.ckpt")
    params = params_of(network={"learn_sigma": learn_sigma}, beta_schedule="straight", **values)
    params["unet_config"]["target"] = target
    config = {"model": {"target": "latent_mt.LatentMTDiffusion", "params": params}}
    (folder / "model.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return folder


def test_the_released_configuration_is_the_released_model():
    params = load_config("imagenet256_sit_xl")["model"]["params"]
    network = described(params["unet_config"])
    with torch.device("meta"):
        built, alone = network.row.make(**{"heads": {}, **network.keywords}), DiT()
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in alone.state_dict().items()}
    assert built.out_channels == 4 and not network.learn_sigma
    assert SIT.items() <= params.items() and params["beta_schedule"] == "straight"


@pytest.mark.parametrize(
    ("target", "learn_sigma", "values"),
    [("models.SiT", True, SIT), ("models.sit.SiT", False, REPA)],
    ids=["SiT", "REPA"],
)
@torch.no_grad()
def test_a_published_file_says_the_velocity_of_the_straight_path(target, learn_sigma, values, tmp_path):
    """v = dx/dt of x = (1 - tau) z_0 + tau eps, by the published network at x and at its own time; z_0 = x - tau dx/dtau."""
    network = random_dit(learn_sigma=learn_sigma)
    folder = write(tmp_path, network, target, learn_sigma, **values)
    saved = read_saved(folder / "model.pt", str(folder / "model.yaml"))
    model = load_model(saved, folder / "model.pt", torch.device("cpu"), first_stage=str(folder / "kl.ckpt"))
    t, y = torch.tensor([4, 499, 999]), torch.tensor([2, 0, CLASSES])
    tau = (t + 1) / STEPS
    x = torch.randn(3, 4, LATENT, LATENT)
    length = torch.sqrt((1 - tau) ** 2 + tau**2).view(-1, 1, 1, 1)
    to_data = values == SIT
    velocity = network(x, 1 - tau if to_data else tau, y)[:, :4]
    found = model.network(x / length, t, {}, torch.where(y == CLASSES, -1, y)).output
    torch.testing.assert_close(found, velocity, rtol=1e-4, atol=1e-5)
    to_noise = -velocity if to_data else velocity
    z_0 = model.diffusion.predict_xstart(found, x / length, t)
    torch.testing.assert_close(z_0, x - tau.view(-1, 1, 1, 1) * to_noise, rtol=1e-4, atol=1e-4)

    flags = {"model_path": folder / "model.pt", "config": folder / "model.yaml", "first_stage": folder / "kl.ckpt"}
    drawn = {"class_id": 2, "guidance_scale": 2, "num_samples": 2, "steps": 3, "device": "cpu", "out": tmp_path / "out"}
    latent_sample.main(words(**flags, **drawn))
    with np.load(tmp_path / "out" / "samples_2.npz") as file:
        assert file["arr_0"].shape == (2, SIZE, SIZE, 3)
