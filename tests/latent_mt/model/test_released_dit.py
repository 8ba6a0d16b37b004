"""The released DiT: its file, its published sampling, what diffusers draws of the same weights, and the way back to its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import words
from tiny_dit import CLASSES, RELEASED, params_of, random_dit, write_released
from tiny_latent import (
    FIRST_STAGE,
    LATENT,
    SIZE,
    random_model,
    write_run,
)
from torch import Tensor

from guided_mt.commands import export, sample
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.errors import UserError
from guided_mt.networks.dit import DiT
from guided_mt.networks.model import MTDiT
from guided_mt.runs.recognise import recognise
from guided_mt.runs.weights import shapes_of
from latent_mt.commands import export_diffusers, export_ldm, latent_sample
from latent_mt.commands.loading import load_model, read_saved
from latent_mt.configs import file_of
from latent_mt.model.backbones import described
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.model.schedules import make_beta_schedule
from latent_mt.runs.configuration import load_config
from latent_mt.runs.targets import instantiate

CPU, SCALE = torch.device("cpu"), 4.0


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


def loaded(released: Path, first_stage: str = "vae") -> LatentMTDiffusion:
    saved = read_saved(released / "dit.pt", str(released / "dit.yaml"))
    return load_model(saved, released / "dit.pt", CPU, first_stage=str(released / first_stage))


# ---------------------------------------------------------------- the released model


def test_the_released_configuration_is_the_released_model():
    """675 M parameters, the published names, guided-diffusion's linear betas, no stage but the autoencoder."""
    params = load_config("imagenet256_dit_xl")["model"]["params"]
    network = described(params["unet_config"])
    with torch.device("meta"):
        built = network.row.make(**{"heads": {}, **network.keywords})
        alone = DiT()
    assert isinstance(built, MTDiT) and network.learn_sigma
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in alone.state_dict().items()}
    assert round(sum(p.numel() for p in built.parameters()) / 1e6) == 675
    betas = make_beta_schedule(
        params["beta_schedule"], params["timesteps"], params["linear_start"], params["linear_end"]
    )
    np.testing.assert_allclose(betas, create_gaussian_diffusion(noise_schedule="linear").betas, rtol=1e-12)
    kind = recognise(shapes_of(built.state_dict()))
    assert kind is not None and kind.family == "latent" and "imagenet256_dit_xl" in kind.loads_it


def test_the_configuration_of_cityscapes_is_the_size_that_it_says():
    params = load_config("cityscapes_dit_mt")["model"]["params"]
    network = described(params["unet_config"])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in network.row.make(**{"heads": {}, **network.keywords}).parameters())
    assert f"{round(parameters / 1e6)} M" in file_of("cityscapes_dit_mt").read_text().splitlines()[0]
    assert not network.learn_sigma and params["mt_swap_prob"] == 0.5


@pytest.mark.parametrize("first_stage", ["vae", "vae/diffusion_pytorch_model.safetensors", "kl.ckpt"])
def test_the_released_file_is_the_network_with_any_autoencoder(released, first_stage):
    model = loaded(released, first_stage)
    for key, value in random_dit().state_dict().items():
        assert torch.equal(model.network.state_dict()[key], value), key
    torch.manual_seed(5)
    for key, value in instantiate(FIRST_STAGE, "stage").state_dict().items():
        assert torch.equal(model.first_stage_model.state_dict()[key], value), key
    assert float(model.scale_factor) == pytest.approx(0.18215) and model.classes_told == CLASSES


def published_eps(network: DiT, x: Tensor, t: int, y: Tensor, scale: float, channels: int) -> tuple[Tensor, Tensor]:
    """(eps, what says the variance) [B, 4, h, w]: the sampling that DiT's authors published, with `channels` 3; eps of the class
    and of the null class, eps = eps_null + s (eps_y - eps_null) on the first channels, and the class' own in what follows them."""
    times = torch.full((len(x),), t)
    of_class, of_null = network(x, times, y), network(x, times, torch.full_like(y, CLASSES))
    guided = of_null[:, :channels] + scale * (of_class[:, :channels] - of_null[:, :channels])
    whole = torch.cat([guided, of_class[:, channels:]], dim=1)
    return whole[:, :4], whole[:, 4:]


def steps(count: int, betas: np.ndarray) -> list[tuple[int, float, float]]:
    """(t, abar_t, abar of the next lower one) of `count` timesteps evenly from 0 to T - 1, the last first."""
    abar = np.cumprod(1 - betas)
    kept = [round(i * (len(betas) - 1) / (count - 1)) for i in range(count)]
    before = [1.0, *(abar[t] for t in kept[:-1])]
    return [(t, abar[t], low) for t, low in zip(kept, before, strict=True)][::-1]


@pytest.mark.parametrize("channels", [4, 3])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@torch.no_grad()
def test_guidance_is_the_published_one(released, sampler, channels):
    """DDIM, and ancestral steps with learned variances (Nichol and Dhariwal 2021, eq. 15), written out in float64."""
    model, network, count, y = loaded(released), random_dit().double(), 8, torch.tensor([1, 4])
    streams = SampleStreams(torch.tensor([7, 8]))
    x = streams.normal(4, LATENT, LATENT).double()
    for t, abar, low in steps(count, np.linspace(1e-4, 2e-2, 1000)):
        eps, v = published_eps(network, x, t, y, SCALE, channels)
        x_start = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        if sampler == "ddim":
            x = low**0.5 * x_start + (1 - low) ** 0.5 * eps
            continue
        beta = 1 - abar / low
        mean = (low**0.5 * beta * x_start + (1 - beta) ** 0.5 * (1 - low) * x) / (1 - abar)
        small = beta * (1 - low) / (1 - abar)
        noise = streams.normal(4, LATENT, LATENT).double()
        if t > 0:
            x = mean + torch.exp(0.5 * ((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(small))) * noise
        else:
            x = mean
    settings = LatentSampleConfig(
        sampler=sampler, guidance_scale=SCALE, guidance_channels=-1 if channels == 4 else channels
    )
    ours = LatentGenerator(model, {"y": y}).made_from({}, [7, 8], settings, str(count))["image"]
    torch.testing.assert_close(ours.double(), x, rtol=1e-3, atol=1e-3 * float(x.std()))
    assert x.std() > 0.1


@torch.no_grad()
def test_diffusers_draws_the_same(released):
    """Its transformer and DDIM as DiTPipeline calls them, from the same weights and start: the same latents within 1e-3 of their
    size, with guidance and without. Its sinusoids of the timestep divide by 127 where DiT's published code divides by 128
    (`downscale_freq_shift`), which is set right here: at t = 900 outputs otherwise differ by 1 %."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=RELEASED["num_heads"],
        attention_head_dim=RELEASED["hidden_size"] // RELEASED["num_heads"],
        in_channels=4,
        out_channels=8,
        num_layers=RELEASED["depth"],
        sample_size=LATENT,
        patch_size=2,
        attention_bias=True,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    ).eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    theirs.load_state_dict(diffusers_names(random_dit().state_dict(), theirs.state_dict()))
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True
    )
    seeds, y = [3, 4], torch.tensor([2, 0])
    for scale in (1.0, SCALE):
        x = SampleStreams(torch.tensor(seeds)).normal(4, LATENT, LATENT)
        scheduler.set_timesteps(10)  # 900, 800, ... 0
        for t in scheduler.timesteps:
            classes = torch.cat([y, torch.full_like(y, CLASSES)])
            said = theirs(torch.cat([x, x]), timestep=t.expand(4), class_labels=classes).sample[:, :4]
            of_class, of_null = said.chunk(2)
            x = scheduler.step(of_null + scale * (of_class - of_null), t, x).prev_sample
        model = loaded(released)
        process = model.diffusion.respace([int(t) for t in scheduler.timesteps])
        generator = LatentGenerator(model, {"y": y})
        drawn = generator.draw(seeds, LatentSampleConfig(sampler="ddim", guidance_scale=scale), process=process).x_start
        assert (drawn - x).abs().max() <= 1e-3 * x.abs().max().clamp(min=1), scale


def diffusers_names(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """DiT's entries under the names of diffusers' transformer, which has the embeddings of time and class in every block."""
    found = {
        "pos_embed.proj.weight": state["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state["x_embedder.proj.bias"],
        "proj_out_1.weight": state["final_layer.adaLN_modulation.1.weight"],
        "proj_out_1.bias": state["final_layer.adaLN_modulation.1.bias"],
        "proj_out_2.weight": state["final_layer.linear.weight"],
        "proj_out_2.bias": state["final_layer.linear.bias"],
    }
    for k in range(RELEASED["depth"]):
        there, here = f"transformer_blocks.{k}.", f"blocks.{k}."
        for part in ("weight", "bias"):
            for name, value in zip("qkv", state[f"{here}attn.qkv.{part}"].chunk(3), strict=True):
                found[f"{there}attn1.to_{name}.{part}"] = value
            found |= {
                f"{there}attn1.to_out.0.{part}": state[f"{here}attn.proj.{part}"],
                f"{there}ff.net.0.proj.{part}": state[f"{here}mlp.fc1.{part}"],
                f"{there}ff.net.2.{part}": state[f"{here}mlp.fc2.{part}"],
                f"{there}norm1.linear.{part}": state[f"{here}adaLN_modulation.1.{part}"],
                f"{there}norm1.emb.timestep_embedder.linear_1.{part}": state[f"t_embedder.mlp.0.{part}"],
                f"{there}norm1.emb.timestep_embedder.linear_2.{part}": state[f"t_embedder.mlp.2.{part}"],
            }
        table = "norm1.emb.class_embedder.embedding_table.weight"
        found[there + table] = state["y_embedder.embedding_table.weight"]
    return {**{key: value for key, value in wanted.items() if key == "pos_embed.pos_embed"}, **found}


# ---------------------------------------------------------------- the command


def draw(released: Path, out: Path, **flags: Any) -> np.ndarray:
    latent_sample.main(
        words(
            **{
                "model_path": released / "dit.pt",
                "config": released / "dit.yaml",
                "first_stage": released / "vae",
                "num_samples": 3,
                "timestep_respacing": 4,
                "device": "cpu",
                "out": out,
                **flags,
            }
        )
    )
    with np.load(next(out.glob("*.npz"))) as file:
        return file["arr_0"]


def test_the_command_draws_by_class_and_guidance(released, tmp_path):
    made = {
        name: draw(released, tmp_path / name, **flags)
        for name, flags in {
            "plain": {"class_id": 2},
            "other": {"class_id": 3},
            "all": {"class_id": 2, "guidance_scale": SCALE},
            "three": {"class_id": 2, "guidance_scale": SCALE, "guidance_channels": 3},
            "random": {},
        }.items()
    }
    assert {x.shape for x in made.values()} == {(3, SIZE, SIZE, 3)}
    images = list(made.values())
    assert all((a != b).any() for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"first_stage": ""}, "holds the network alone: name its autoencoder by --first_stage"),
        ({"class_id": CLASSES}, f"--class_id {CLASSES}: this model has classes 0 to {CLASSES - 1}"),
        ({"guidance_channels": 3}, "--guidance_channels 3 goes with --guidance_scale"),
        ({"guidance_channels": 5, "guidance_scale": 2}, "--guidance_channels 5: this model has 4 channels"),
    ],
)
def test_bad_requests_are_told(released, tmp_path, flags, expected):
    with pytest.raises(UserError, match=expected):
        draw(released, tmp_path / "out", **flags)


def test_pixel_commands_say_what_takes_it(released, tmp_path):
    with pytest.raises(UserError, match=r"a DiT or SiT transformer for latents, .*imagenet256_dit_xl"):
        sample.main(words(model_path=released / "dit.pt", image_size=8, mt_backbone="dit", out=tmp_path / "x.npz"))


def test_a_file_of_another_size_is_refused(released, tmp_path):
    torch.save(random_dit(depth=3).state_dict(), tmp_path / "dit.pt")
    with pytest.raises(UserError, match=r"entries that the model lacks, first 'blocks.2.*unet_config"):
        draw(released, tmp_path / "out", model_path=tmp_path / "dit.pt")


def test_an_autoencoder_of_another_kind_is_refused(released, tmp_path):
    about = json.loads((released / "vae" / "config.json").read_text())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**about, "norm_num_groups": 16}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "vae" / weights).write_bytes((released / "vae" / weights).read_bytes())
    with pytest.raises(UserError, match=r"another ddconfig: norm_groups \(16 there, 32 here\)"):
        draw(released, tmp_path / "out", first_stage=tmp_path / "vae")


# ---------------------------------------------------------------- export


@pytest.mark.parametrize("form", ["classes", "pair"])
@torch.no_grad()
def test_export_is_what_dits_own_code_loads(released, tmp_path, form, capsys):
    """A bare state dict of the published names, from a run or from the file itself; LDM's and diffusers' layouts refuse it."""
    pair = {"mt_sides": ["day", "night"], "mt_swap_prob": 0.5, "network": {"num_classes": None}}
    what = params_of(**(pair if form == "pair" else {}))
    run = write_run(tmp_path / "run", tmp_path, **what)
    export.main(words(model_path=run, out=tmp_path / "dit.pt"))
    assert "cond_stage" not in capsys.readouterr().out
    options = {"num_classes": 2, "class_dropout_prob": 0.0} if form == "pair" else {}
    network = DiT(**{**RELEASED, **options})
    network.load_state_dict(torch.load(tmp_path / "dit.pt", weights_only=True))
    z, t, y = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 30]), torch.tensor([1, 0])
    assert torch.equal(network(z, t, y), random_model(0, **what).model(z, t, {}, y=y).output)
    with pytest.raises(UserError, match="is a transformer, which latent-diffusion's code does not have"):
        export_ldm.main(words(model_path=run, out=tmp_path / "x.ckpt"))
    with pytest.raises(UserError, match="is a transformer, which diffusers' StableDiffusionPipeline does not have"):
        export_diffusers.main(words(model_path=run, out=tmp_path / "hf"))
    export.main(words(model_path=released / "dit.pt", out=tmp_path / "again.pt"))
    again, first = (torch.load(file, weights_only=True) for file in (tmp_path / "again.pt", released / "dit.pt"))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


@torch.no_grad()
def test_a_network_without_classes_gets_one_that_says_nothing(tmp_path):
    what = params_of(cond_stage_key="image", network={"num_classes": None})
    export.main(words(model_path=write_run(tmp_path / "run", tmp_path, **what), out=tmp_path / "dit.pt"))
    network = DiT(**{**RELEASED, "num_classes": 1, "class_dropout_prob": 0.0})
    network.load_state_dict(torch.load(tmp_path / "dit.pt", weights_only=True))
    z, t, y = torch.randn(2, 4, LATENT, LATENT), torch.tensor([3, 30]), torch.zeros(2, dtype=torch.long)
    assert torch.equal(network(z, t, y), random_model(0, **what).model(z, t, {}).output)
