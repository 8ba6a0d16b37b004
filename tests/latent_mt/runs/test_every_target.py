"""Every class that the registry of targets names, built from its name and used once for what it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_latent import DDCONFIG, DIT, LATENT, SIZE, UNET, model_params, train, write_config, write_images, write_pairs
from tiny_shards import write_shards

from guided_mt.data import Batch
from guided_mt.diffusion.random import SampleStreams
from latent_mt.commands import encode_latents, latent_sample
from latent_mt.conditioners import text
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig
from latent_mt.runs import targets
from latent_mt.runs.targets import instantiate

VQ = {"embed_dim": 4, "n_embed": 8, "ddconfig": {**DDCONFIG, "double_z": False}}
DISC = {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0}
TEXT = {"n_embed": 16, "n_layer": 1, "vocab_size": 20, "max_seq_len": 6}
IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
# What mt_sides [] leaves is latent-diffusion's own model.
PIXEL_UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {**UNET, "in_channels": 3, "out_channels": 3},
}
ON_PIXELS = {"first_stage_config": IDENTITY, "unet_config": PIXEL_UNET, "channels": 3, "mt_sides": []}


def built(target: str, **params: Any) -> Any:
    return instantiate({"target": target, "params": params}, "here")


def diffusion(target: str = "ldm.models.diffusion.ddpm.LatentDiffusion", **params: Any) -> Any:
    torch.manual_seed(0)
    return built(target, **model_params(**{"mt_sides": [], **params}))


def pixels(model: Any) -> Batch:
    size = model.size * model.first_stage_model.downsampling
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    return Batch(images, None, torch.arange(2), torch.arange(2))


def use_diffusion(model: Any, conditions: dict[str, Any] | None = None) -> None:
    """A training step's gradients, and two images drawn."""
    if conditions is None:
        losses, _ = model.losses(pixels(model), SampleStreams(0, torch.arange(2)))
        losses.loss.mean().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.network.parameters())
    generator = LatentGenerator(model.eval(), conditions)
    drawn = generator.draw([0, 1], LatentSampleConfig(steps=2)).x_start
    image = model.decode(drawn)
    assert image.shape[:2] == (2, 3) and torch.isfinite(image).all() and image.std() > 0


def use_first_stage(model: Any) -> None:
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    mean, logvar = model.encode_moments(x)
    assert mean.shape == (2, model.embed_dim, SIZE // model.downsampling, SIZE // model.downsampling)
    assert logvar is None or logvar.shape == mean.shape
    assert model.decode(mean).shape == x.shape


def a_first_stage(target: str, **params: Any) -> None:
    use_first_stage(built(target, **params))
    use_diffusion(diffusion(first_stage_config={"target": target, "params": params}))


def a_loss(target: str) -> None:
    """One update's gradients of autoencoder and discriminator."""
    kind = "VQModel" if "VQ" in target else "AutoencoderKL"
    params = VQ if kind == "VQModel" else {"embed_dim": 4, "ddconfig": DDCONFIG}
    model = built(f"ldm.models.autoencoder.{kind}", **params, lossconfig={"target": target, "params": DISC})
    loss = instantiate(model.lossconfig, "lossconfig")
    assert isinstance(loss, model.loss_class)
    x = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    made = model.reconstruct(x)
    total, record = loss.generator(x, made, 0, model.last_layer)
    (total + loss.discriminate(x, made.image)[0]).backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0 and "loss" in record
    assert all(p.grad is not None for p in loss.discriminator.parameters())


def a_dummy_loss(target: str) -> None:
    """LDM's loss of a first stage that is not trained."""
    use_first_stage(
        built("ldm.models.autoencoder.AutoencoderKL", embed_dim=4, ddconfig=DDCONFIG, lossconfig={"target": target})
    )


def by_text(target: str, **params: Any) -> Any:
    unet = {
        "target": "latent_mt.unet.UNetModel",
        "params": {**UNET, "use_spatial_transformer": True, "context_dim": 16},
    }
    stage = {"target": target, "params": params}
    return diffusion(cond_stage_config=stage, cond_stage_key="txt", conditioning_key="crossattn", unet_config=unet)


def a_text_stage(target: str, **params: Any) -> None:
    model = by_text(target, **TEXT, **params)
    use_diffusion(model, {"c_crossattn": model.cond_stage_model(torch.tensor([[1, 2, 3], [4, 5, 6]]))})


def a_prompt_stage(target: str, **params: Any) -> None:
    model = by_text(target, version=None, **params)
    use_diffusion(model, {"c_crossattn": model.cond_stage_model(["a cat", "a red dog"])})


def a_tokenizer(target: str) -> None:
    ids = built(target, max_length=4)(["a b", "c"])
    assert ids.shape == (2, 4)


def a_class_stage(target: str) -> None:
    unet = {"target": "latent_mt.unet.UNetModel", "params": {**UNET, "use_spatial_transformer": True, "context_dim": 8}}
    stage = {"target": target, "params": {"embed_dim": 8, "n_classes": 3}}
    model = diffusion(
        cond_stage_config=stage,
        cond_stage_key="class_label",
        conditioning_key="crossattn",
        cond_stage_trainable=True,
        unet_config=unet,
    )
    batch = pixels(model)
    batch.labels = torch.tensor([0, 2])
    losses, _ = model.losses(batch, SampleStreams(0, torch.arange(2)))
    losses.loss.mean().backward()
    use_diffusion(model, {"c_crossattn": model.cond_stage_model(torch.tensor([0, 2]))})


def a_rescaler(target: str) -> None:
    unet = {"target": "latent_mt.unet.UNetModel", "params": {**UNET, "in_channels": 7}}
    stage = {"target": target, "params": {"n_stages": 1}}
    model = diffusion(
        cond_stage_config=stage, cond_stage_key="segmentation", conditioning_key="concat", unet_config=unet
    )
    use_diffusion(model, {"c_concat": model.cond_stage_model(torch.rand(2, 3, SIZE, SIZE))})


def a_schedule(target: str, **params: Any) -> None:
    model = diffusion(scheduler_config={"target": target, "params": params})
    schedule = instantiate(model.scheduler_config, "scheduler_config")
    factors = [schedule(step) for step in range(12)]
    assert factors[0] < max(factors) and factors[-1] < max(factors) and all(0 <= factor <= 1 for factor in factors)


CYCLE = {"warm_up_steps": [3], "f_min": [0.0], "f_max": [1.0], "f_start": [0.0], "cycle_lengths": [10]}


def some_data(data: Any) -> None:
    data.open()
    batch = next(iter(data.stream(seed=0)))
    assert batch.images.shape[0] == 2 and batch.images.dtype == torch.uint8 and len(data.val_source) > 0


DATA = {"image_size": SIZE, "batch_size": 2, "num_workers": 0}
# {what a row builds: (its target's name, a folder) -> used}
USES: dict[str, Callable[[str, Any], None]] = {
    "latent_mt.model.latent_diffusion:LatentMTDiffusion": lambda name, folder: use_diffusion(diffusion(name)),
    "latent_mt.model.unet:UNetModel": lambda name, folder: use_diffusion(
        diffusion(unet_config={"target": name, "params": UNET})
    ),
    "latent_mt.model.dit:DiT": lambda name, folder: use_diffusion(
        diffusion(unet_config={"target": name, "params": DIT})
    ),
    "latent_mt.model.dit:SiT": lambda name, folder: use_diffusion(
        diffusion(unet_config={"target": name, "params": DIT})
    ),
    "latent_mt.first_stage.first_stages:AutoencoderKL": lambda name, folder: a_first_stage(
        name, embed_dim=4, ddconfig=DDCONFIG
    ),
    "latent_mt.first_stage.first_stages:VQModel": lambda name, folder: a_first_stage(name, **VQ),
    "latent_mt.first_stage.first_stages:VQModelInterface": lambda name, folder: a_first_stage(name, **VQ),
    "latent_mt.first_stage.first_stages:IdentityFirstStage": lambda name, folder: (
        use_first_stage(built(name)),
        use_diffusion(diffusion(**ON_PIXELS)),
    ),
    "latent_mt.first_stage.losses:LPIPSWithDiscriminator": lambda name, folder: a_loss(name),
    "latent_mt.first_stage.losses:VQLPIPSWithDiscriminator": lambda name, folder: a_loss(name),
    "torch.nn:Identity": lambda name, folder: a_dummy_loss(name),
    "latent_mt.conditioners:ClassEmbedder": lambda name, folder: a_class_stage(name),
    "latent_mt.conditioners:TransformerEmbedder": lambda name, folder: a_text_stage(name),
    "latent_mt.conditioners:BERTTokenizer": lambda name, folder: a_tokenizer(name),
    "latent_mt.conditioners:BERTEmbedder": lambda name, folder: a_text_stage(name, use_tokenizer=False),
    "latent_mt.conditioners:FrozenOpenCLIPEmbedder": lambda name, folder: a_prompt_stage(
        name,
        arch={"embed_dim": 16, "vision_cfg": {}, "text_cfg": {"width": 16, "heads": 2, "layers": 2}},
        layer="penultimate",
    ),
    "latent_mt.conditioners:FrozenCLIPEmbedder": lambda name, folder: a_prompt_stage(
        name, config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ),
    "latent_mt.conditioners:SpatialRescaler": lambda name, folder: a_rescaler(name),
    "latent_mt.runs.lr_scheduler:LambdaWarmUpCosineScheduler": lambda name, folder: a_schedule(
        name, warm_up_steps=3, lr_min=0.0, lr_max=1.0, lr_start=0.0, max_decay_steps=10
    ),
    "latent_mt.runs.lr_scheduler:LambdaWarmUpCosineScheduler2": lambda name, folder: a_schedule(name, **CYCLE),
    "latent_mt.runs.lr_scheduler:LambdaLinearScheduler": lambda name, folder: a_schedule(name, **CYCLE),
    "latent_mt.data:PairData": lambda name, folder: some_data(
        built(name, path=str(write_pairs(folder)), val_split="val", **DATA)
    ),
    "latent_mt.data:ImageData": lambda name, folder: some_data(
        built(name, path=str(write_images(folder)), val_path=str(folder), **DATA)
    ),
    "latent_mt.data:ShardData": lambda name, folder: some_data(
        built(name, path=write_shards(folder), val_path=str(folder), **DATA)
    ),
}


@pytest.mark.parametrize("name", targets._REGISTRY)
def test_every_target_is_used_once(name, tmp_path, monkeypatch):
    home = targets._REGISTRY[name]
    assert home in USES, f"{name}: add a use of {home} to USES"
    words = lambda texts, max_length, **options: {"input_ids": torch.zeros(len(texts), max_length, dtype=torch.long)}  # noqa: E731
    monkeypatch.setattr(text, "load_tokenizer", lambda: words)
    USES[home](name, tmp_path)


def test_pixels_as_latents_are_trained_encoded_and_drawn(tmp_path):
    """LDM's IdentityFirstStage through the commands."""
    images = write_images(tmp_path / "images")
    unet = {**PIXEL_UNET, "params": {**PIXEL_UNET["params"], "image_size": SIZE, "attention_resolutions": []}}
    file = write_config(
        tmp_path / "a.yaml", images, tmp_path / "run", **{**ON_PIXELS, "unet_config": unet, "image_size": SIZE}
    )
    train(file, "run.total_steps=1", "run.save_interval=1")
    out = tmp_path / "out"
    latent_sample.main(
        [
            "--model_path",
            str(tmp_path / "run"),
            "--num_samples",
            "2",
            "--steps",
            "2",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    assert len(list(out.rglob("*.png"))) or len(list(out.rglob("*.npz")))
    encode_latents.main(["--config", str(file), "--out", str(tmp_path / "latents"), "--device", "cpu"])
    assert (tmp_path / "latents" / "train").is_dir() and LATENT < SIZE
