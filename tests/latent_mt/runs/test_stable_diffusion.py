"""Stable Diffusion's published configurations and checkpoints: those that load, and the reasons for those that don't."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from conftest import GOLDEN
from omegaconf import OmegaConf
from tiny_text import PUBLISHED, tiny_config, tiny_model, write_checkpoint

from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import save_checkpoint
from latent_mt.commands.loading import load_model, read_saved
from latent_mt.runs.configuration import load_config
from latent_mt.runs.ldm_checkpoint import COND_STAGE, read_ldm, write_ldm
from latent_mt.runs.targets import instantiate
from latent_mt.training.latent_diffusion import LatentTraining

UNETS, FIRST_STAGES, TEXT = (
    json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))
    for name in ("ldm_unet_keys", "ldm_first_stage_keys", "sd2_text_encoder_keys")
)


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 500, text
    return text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_have_the_released_entries(name, tmp_path):
    file = tmp_path / f"{name}.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(PUBLISHED[name])))
    saved = load_config(file)
    with torch.device("meta"):
        model = instantiate({key: saved["model"][key] for key in ("target", "params")}, "model")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert model.diffusion.model_mean_type == ("v" if name.endswith("-v") else "eps")
    assert model.network.precision == ("fp32" if name == "v1-inference" else "fp16")
    first = FIRST_STAGES["first_stage/kl-f8"]["state_dict"]
    assert {k: v for k, v in shapes.items() if k.startswith("first_stage_model.")} == {
        f"first_stage_model.{key}": shape for key, shape in first.items()
    }
    if name != "v1-inference":
        unet = UNETS["stable-diffusion-2-base"]["state_dict"]
        expected = {f"model.diffusion_model.{key}": shape for key, shape in unet.items()}
        expected |= {f"first_stage_model.{key}": shape for key, shape in first.items()}
        expected |= {COND_STAGE + key: shape for key, shape in TEXT["cond_stage_model"].items()}
        assert {key: shape for key, shape in shapes.items() if key != "scale_factor"} == expected
    else:  # as many as Stable Diffusion 1.4 has, its projections are 1 x 1 convolutions
        unet = {key: shape for key, shape in shapes.items() if key.startswith("model.diffusion_model.")}
        assert len(unet) == 686 and sum(torch.Size(shape).numel() for shape in unet.values()) == 859_520_964
        assert unet["model.diffusion_model.input_blocks.1.1.proj_in.weight"] == [320, 320, 1, 1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_brings_its_text_encoder(name, tmp_path):
    config = tiny_config(name)
    model = tiny_model(config)
    weights, file = write_checkpoint(tmp_path, config, model)
    loaded = load_model(read_saved(weights, str(file)), weights, torch.device("cpu"))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    # Nothing is to be fetched any more, although the file names no weights of its own and the stage has a version.
    assert loaded.cond_stage_model.version is None
    assert torch.equal(
        loaded.cond_stage_model("a cat"), model.cond_stage_model.context(model.cond_stage_model.tokens(["a cat"]))
    )


def test_a_checkpoint_without_unused_parts_is_not_given_any(tmp_path):
    config = tiny_config()
    model = tiny_model(config)
    weights, file = write_checkpoint(tmp_path, config, model)
    found = read_ldm(weights)
    unused = model.cond_stage_model.unused
    found.cond_stage = {key: value for key, value in found.cond_stage.items() if key not in unused}
    write_ldm(weights, found)
    loaded = load_model(read_saved(weights, str(file)), weights, torch.device("cpu"))
    assert set(loaded.cond_stage_model.state_dict()) == set(found.cond_stage)
    assert torch.equal(
        loaded.cond_stage_model("a cat"), model.cond_stage_model.context(model.cond_stage_model.tokens(["a cat"]))
    )
    del found.cond_stage["model.ln_final.weight"]
    write_ldm(weights, found)
    said = complaint(load_model, read_saved(weights, str(file)), weights, torch.device("cpu"))
    assert "conditioning stage" in said and "'model.ln_final.weight'" in said and "cond_stage_config" in said


def test_a_run_that_began_without_unused_parts_goes_on(tmp_path):
    """Its own checkpoint lacks them, and its configuration says nothing of that."""
    model = tiny_model(tiny_config())
    model.cond_stage_model.leave_out(model.cond_stage_model.unused)
    save_checkpoint(
        tmp_path, 1, config_yaml="{}", weights={"model": model.state_dict()}, training_state={}, classes=None
    )
    again = LatentTraining(tiny_model(tiny_config(), seed=1))
    again.load_weights_of(tmp_path / "checkpoints" / "step_00000001")
    found = again.model.state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_a_text_encoder_that_does_not_fit_is_named(tmp_path):
    config = tiny_config()
    weights, _ = write_checkpoint(tmp_path, config, tiny_model(config))
    wider = tiny_config("v2-inference")
    wider["model"]["params"]["cond_stage_config"]["params"]["arch"]["text_cfg"]["layers"] = 5
    said = complaint(load_model, wider, weights, torch.device("cpu"))
    assert "conditioning stage: another architecture" in said and "compare model.params.cond_stage_config" in said
    first = tiny_config("v1-inference")
    first["model"]["params"]["unet_config"] = config["model"]["params"]["unet_config"]
    said = complaint(load_model, first, weights, torch.device("cpu"))
    assert "conditioning stage" in said and "FrozenOpenCLIPEmbedder" in said and "FrozenCLIPEmbedder" in said
    unlike = tiny_config()
    unlike["model"]["params"]["unet_config"]["params"]["context_dim"] = 48
    said = complaint(load_model, unlike, weights, torch.device("cpu"))
    assert "vectors of width 32" in said and "context_dim 48" in said


REFUSED = {
    "v2-inpainting-inference": ("LatentInpaintDiffusion", "mask"),
    "v2-midas-inference": ("LatentDepth2ImageDiffusion", "depth"),
    "x4-upscaling": ("LatentUpscaleDiffusion", "low resolution"),
    "v2-1-stable-unclip-h-inference": ("ImageEmbeddingConditionedLatentDiffusion", "CLIP embedding"),
    "v2-1-stable-unclip-l-inference": ("ImageEmbeddingConditionedLatentDiffusion", "CLIP embedding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_name_with_the_reason(name, tmp_path):
    target, reason = REFUSED[name]
    file = tmp_path / f"{name}.yaml"
    file.write_text(f"model: {{target: ldm.models.diffusion.ddpm.{target}, params: {{finetune_keys: null}}}}\n")
    said = complaint(load_config, file)
    assert target in said and reason in said and "text" in said
