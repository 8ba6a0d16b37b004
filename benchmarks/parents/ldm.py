"""latent-diffusion's schedules, networks, sampler and checkpoints beside ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guided_mt.diffusion.process import GaussianDiffusion, ModelVarType
from guided_mt.diffusion.sampling import sample
from guided_mt.training.ema import Ema
from latent_mt import AutoencoderKL, UNetModel, VQModel
from latent_mt.model.schedules import BETA_SCHEDULES, ddim_timesteps, make_beta_schedule
from latent_mt.runs.ldm_checkpoint import load_ldm
from latent_mt.runs.targets import instantiate

from .inputs import SEEDS, eps_network, fill, normals
from .standins import given_normals
from .table import Row, by_choice, distance, number, same

LATENT = (2, 4, 8, 8)
T, STEPS, RATE = 1000, 10, "0.9999"
UNETS: dict[str, dict[str, Any]] = {
    "without condition": {"num_head_channels": 32},
    "cross-attention": {"num_heads": 2, "use_spatial_transformer": True, "context_dim": 24, "transformer_depth": 1},
}
UNET: dict[str, Any] = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2],
    "num_res_blocks": 1, "channel_mult": [1, 2],
}  # fmt: skip
DDCONFIG: dict[str, Any] = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": T, "image_size": 8, "channels": 4, "first_stage_key": "image",
    "cond_stage_config": "__is_unconditional__", "scale_factor": 0.5,
    "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**UNET, "num_heads": 2}},
    "first_stage_config": {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"embed_dim": 4, "ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}},
    },
}  # fmt: skip


def schedules() -> Row:
    """make_beta_schedule."""
    from ldm.modules.diffusionmodules.util import make_beta_schedule as make

    ours, theirs = ([f(name, T) for name in BETA_SCHEDULES] for f in (make_beta_schedule, make))
    return same(f"`make_beta_schedule` {', '.join(BETA_SCHEDULES)}", ours, theirs, tolerance=1e-12)


def spacings() -> Row:
    """make_ddim_timesteps."""
    from ldm.modules.diffusionmodules.util import make_ddim_timesteps

    counts = (5, 20, 50, 100, 200, 250)
    theirs = [make_ddim_timesteps("uniform", count, T, verbose=False).tolist() for count in counts]
    return same(
        "`ldmN`: the timesteps of LDM's DDIM", [ddim_timesteps(count, T) for count in counts], theirs, tolerance=0
    )


def unets() -> list[Row]:
    """U-Net: outputs and weights."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel as Theirs

    rows = []
    for name, options in UNETS.items():
        theirs = fill(Theirs(**UNET, **options))
        ours = UNetModel(**UNET, **options).eval()
        ours.load_state_dict(theirs.state_dict())
        g = torch.Generator().manual_seed(3)
        x, t = torch.randn(LATENT, generator=g), torch.tensor([3, 800])
        given = {"context": torch.randn(2, 5, 24, generator=g)} if "context_dim" in options else {}
        with torch.no_grad():
            rows.append(
                same(
                    f"U-Net, {name}: output, and its state dict read strictly",
                    ours(x, t, **given),
                    theirs(x, t, **given),
                )
            )
    return rows


def autoencoders() -> Row:
    """AutoencoderKL: moments and images."""
    from ldm.models.autoencoder import AutoencoderKL as Theirs

    theirs = fill(Theirs(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=4))
    ours = AutoencoderKL(DDCONFIG, embed_dim=4).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        expected, found = theirs.encode(x), ours.encode(x)
        z = expected.mean
        pairs = {
            "mean": (found.mean, z),
            "logvar": (found.logvar, expected.logvar),
            "decoded": (ours.decode(z), theirs.decode(z)),
        }
    return same("`AutoencoderKL`: mean, log variance, decoded", *({k: v[i] for k, v in pairs.items()} for i in (0, 1)))


def quantised() -> Row:
    """VQModel."""
    from ldm.models.autoencoder import VQModel as Theirs

    options = {**DDCONFIG, "double_z": False}
    theirs = fill(Theirs(options, {"target": "torch.nn.Identity"}, n_embed=16, embed_dim=4))
    ours = VQModel(options, n_embed=16, embed_dim=4).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        z, _, _ = theirs.encode(x)
        return same("`VQModel`: quantised and decoded", ours(x)[0], theirs.decode(z))


# ---------------------------------------------------------------- DDIM


class Bare:
    """What LDM's sampler asks of a model, around a formula."""

    parameterization, device = "eps", torch.device("cpu")

    def __init__(self, betas: np.ndarray):
        self.num_timesteps = len(betas)
        abar = np.cumprod(1 - betas)
        self.betas, self.alphas_cumprod, self.alphas_cumprod_prev = (
            torch.tensor(x, dtype=torch.float32) for x in (betas, abar, np.append(1.0, abar[:-1]))
        )

    def apply_model(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return eps_network(x, t)


def betas() -> np.ndarray:
    return make_beta_schedule("linear", T, 0.0015, 0.0195)


def drawn_by_ldm(eta: float = 0.0, count: int = STEPS) -> Tensor:
    """z_0 by LDM's DDIMSampler, from the noise that our samplers take."""
    from ldm.models.diffusion.ddim import DDIMSampler

    class OnCPU(DDIMSampler):
        def register_buffer(self, name: str, value: Any) -> None:  # theirs moves it to CUDA
            setattr(self, name, value)

    start, *noise = normals(count + 1, LATENT)
    with given_normals(*noise):
        found, _ = OnCPU(Bare(betas())).sample(count, 2, LATENT[1:], eta=eta, x_T=start, verbose=False)
    return found


def drawn_by_us(eta: float = 0.0, count: int = STEPS, ends_at_data: bool = False) -> Tensor:
    full = GaussianDiffusion(betas=betas(), model_var_type=ModelVarType.FIXED_SMALL)
    final = 1.0 if ends_at_data else float(full.alphas_cumprod[0])
    process = full.respace(ddim_timesteps(count, T), final_alpha_cumprod=final)
    return sample(eps_network, process, {}, LATENT, sampler="ddim", eta=eta, seeds=SEEDS, clip_denoised=False).x_start


def samplers() -> list[Row]:
    """DDIM."""
    rows = [
        same(f"`--timestep_respacing ldm{STEPS}`, eta {eta:g}", drawn_by_us(eta), drawn_by_ldm(eta))
        for eta in (0.0, 1.0)
    ]
    gap, _ = distance(drawn_by_us(ends_at_data=True), drawn_by_ldm())
    why = "goes on from abar_0 to z_0, which LDM's DDIM leaves out"
    return [*rows, by_choice("the same timesteps with another sampler or by `--steps`: the last step", gap, why)]


# ---------------------------------------------------------------- whole models


def whole_models() -> list[Row]:
    """LatentDiffusion: its checkpoint, its latents and its loss."""
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from omegaconf import OmegaConf

    theirs = LatentDiffusion(**OmegaConf.create(MODEL))
    for module in (theirs.model, theirs.first_stage_model):
        fill(module)
    for parameter, average in zip(theirs.model.parameters(), list(theirs.model_ema.buffers())[2:], strict=True):
        average.copy_(parameter.detach())
    theirs.eval()
    params = {**MODEL, "first_stage_config": {**MODEL["first_stage_config"]}}
    ours = instantiate({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}, "model")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ckpt"
        torch.save({"state_dict": theirs.state_dict(), "global_step": 5}, file)
        unread = load_ldm(ours, file, ema=True).unknown
    ours.eval()
    rows = [
        Row(
            "`LatentDiffusion`: entries of its `.ckpt` that are not read",
            number(len(unread)),
            "same" if not unread else "DIFFERS",
            bool(unread),
        )
    ]
    g = torch.Generator().manual_seed(3)
    x, z, noise = (
        torch.rand(2, 3, 16, 16, generator=g) * 2 - 1,
        torch.randn(LATENT, generator=g),
        torch.randn(LATENT, generator=g),
    )
    t = torch.tensor([3, 800])
    with torch.no_grad():
        mean = theirs.scale_factor * theirs.encode_first_stage(x).mode()
        own = ours.scale_factor * ours.first_stage_model.encode(x).mean
        rows.append(same("`LatentDiffusion`: scaled latents", own, mean))
        _, terms = theirs.p_losses(z, None, t, noise)
        found = ours.diffusion.training_losses(ours.model, z, t, noise=noise)["loss"].mean()
        rows.append(same("`LatentDiffusion`: loss at given noise", found, terms["val/loss_simple"]))
    return rows


def averages() -> Row:
    """Averages of the weights: the share of the trained ones in them, from step to step."""
    from ldm.modules.ema import LitEma

    weights, own = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for network in (weights, own):
        network.weight.data.zero_()
    theirs, ours, found, expected = LitEma(weights), Ema(own, [RATE]), [], []
    for network in (weights, own):
        network.weight.data.fill_(1.0)
    for step in range(1, 5001):
        theirs(weights)
        ours.update(warming=step)
        if step % 500 == 0:
            expected.append(float(theirs.weight))
            found.append(float(ours.averages[RATE][0]))
    return same("averages of 5,000 steps at 0.9999: the share of the trained weights", found, expected)


COMPARISONS: list[Callable[[], Row | list[Row]]] = [
    schedules, spacings, unets, autoencoders, quantised, samplers, whole_models, averages,
]  # fmt: skip
