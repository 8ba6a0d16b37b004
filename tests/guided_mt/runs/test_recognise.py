"""What a state dict looks like, from its entries' names and shapes alone."""

from __future__ import annotations

import gzip
import json

import pytest
from conftest import GOLDEN

from guided_mt.runs.recognise import KINDS, LDM_UNET, looks_like, recognise


def shapes(*names: str) -> dict[str, list[int]]:
    return {name: [1] for name in names}


def released(file: str) -> dict[str, dict[str, list[int]]]:
    """{name: {entry: shape}} of the parents' released models."""
    content = json.loads(gzip.decompress((GOLDEN / f"{file}_keys.json.gz").read_bytes()))
    return {name: entry["state_dict"] for name, entry in content.items()}


def ldm(channels: int, *names: str) -> dict[str, list[int]]:
    return {f"{LDM_UNET}input_blocks.0.0.weight": [32, channels, 3, 3], **shapes(*names)}


FIRST = "input_blocks.0.0.weight"
ADM = shapes("time_embed.0.weight", FIRST, "out.0.weight")
DIT = shapes("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight")

# What is told apart: {name that is said: a state dict's entries}.
CASES = {
    "a Stable Diffusion 2 model": ldm(4, "cond_stage_model.model.text_projection"),
    "a Stable Diffusion 1 model": ldm(4, "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    "a Stable Diffusion XL model": ldm(4, "conditioner.embedders.0.x"),
    "a Stable Diffusion inpainting model": ldm(9, "cond_stage_model.model.text_projection"),
    "a Stable Diffusion unCLIP model": ldm(4, "noise_augmentor.betas", "cond_stage_model.model.x"),
    "a Stable Diffusion depth (MiDaS) model": ldm(5, "depth_model.model.x", "cond_stage_model.model.x"),
    "a Stable Diffusion upscaling model": ldm(7, "low_scale_model.betas", "cond_stage_model.model.x"),
    "a latent-diffusion (LDM) model": ldm(3, "first_stage_model.encoder.conv_in.weight"),
    "a latent model of this project": ldm(3, f"{LDM_UNET}heads.label.weight"),
    "a pixel-space model of this project": ADM | shapes("output_blocks.0.0.x", "heads.label.weight"),
    "an upsampler of guided-diffusion (ADM)": ADM
    | shapes("output_blocks.0.0.x", "label_emb.weight")
    | {FIRST: [32, 6, 3, 3]},
    "a DiT or SiT transformer for latents": DIT | {"x_embedder.proj.weight": [32, 4, 2, 2]},
    "a DiT transformer for pixels": DIT | {"x_embedder.proj.weight": [32, 3, 2, 2]},
    "a diffusers U-Net": shapes("down_blocks.0.x", "up_blocks.0.x", "time_embedding.linear_1.weight"),
    "a diffusers autoencoder": shapes("encoder.down_blocks.0.x", "decoder.up_blocks.0.x"),
    "a CLIP model (OpenAI's or open_clip's)": shapes("visual.x", "token_embedding.weight", "text_projection"),
    "an Inception network": shapes("Mixed_5b.branch1x1.conv.weight", "Mixed_7c.branch1x1.conv.weight"),
    "a torchvision ResNet": shapes("layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight"),
    "a torchvision AlexNet": shapes("features.0.weight", "features.3.weight", "classifier.1.weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kind_is_told_by_its_entries(name):
    kind = recognise(CASES[name])
    assert kind is not None and kind.name == name and kind.loads_it
    assert looks_like(CASES[name]) == f"has the keys of {name}; {kind.loads_it}"


@pytest.mark.parametrize("file, expected", [("adm_released", "guided-diffusion (ADM)"), ("ldm_first_stage", "(LDM)")])
def test_released_models_of_the_parents(file, expected):
    for name, entries in released(file).items():
        kind = recognise(entries)
        assert kind is not None and expected in kind.name, name
        assert ("classifier" in name) == ("classifier" in kind.name)
        assert ("vq" in name) == (" VQ " in kind.name)
        assert ("uncond" in name) == ("unconditional" in kind.name)


def test_latent_models_without_and_with_their_prefix():
    for name, entries in released("ldm_unet").items():
        kind = recognise({LDM_UNET + key: shape for key, shape in entries.items()})
        expected = "a Stable Diffusion 2 U-Net" if "diffusion-2" in name else "a latent-diffusion (LDM) model"
        assert kind is not None and kind.name.startswith(expected), name
    assert recognise(released("ldm_unet")["ldm/cin256"]).name == "a latent-diffusion (LDM) U-Net alone"


def test_anything_else_is_not_guessed():
    assert recognise({}) is None and recognise(shapes("weight", "bias")) is None and looks_like(shapes("w")) == ""
    assert len({row.name for row in KINDS}) >= 30
