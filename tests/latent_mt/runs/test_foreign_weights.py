"""Weights of other tools and other architectures where latent models read them, and those that hold NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import adm_unet
from tiny_latent import DDCONFIG, FIRST_STAGE, UNET, model_params

from guided_mt.errors import UserError
from latent_mt.commands import loading
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig
from latent_mt.runs.ldm_checkpoint import load_ldm, read_ldm
from latent_mt.runs.targets import instantiate

LDM = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion"}


def model():
    torch.manual_seed(0)
    return instantiate({**LDM, "params": model_params(mt_sides=[])}, "model")


def complaint(function: Callable, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


def whole(built) -> dict[str, torch.Tensor]:
    return {
        key: torch.randn_like(x) if x.is_floating_point() and x.ndim else x for key, x in built.state_dict().items()
    }


WRAPPED = {
    "module": lambda state: {"module." + key: value for key, value in state.items()},
    "compiled whole": lambda state: {"_orig_mod." + key: value for key, value in state.items()},
    "compiled network": lambda state: {
        key.replace("model.diffusion_model.", "model.diffusion_model._orig_mod."): value for key, value in state.items()
    },
    "state_dict": lambda state: {"state_dict": state, "epoch": 1, "global_step": 5},
    "both": lambda state: {"state_dict": {"_orig_mod.module." + key: x for key, x in state.items()}, "global_step": 5},
    "averages": lambda state: {"model": {k: 0 * x for k, x in state.items()}, "ema": state, "opt": {}, "args": {}},
    "half": lambda state: {key: x.half() if x.ndim else x for key, x in state.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_latent_model_as_other_tools_save_it(name, tmp_path):
    state, built = whole(model()), model()
    torch.save(WRAPPED[name](state), tmp_path / "x.ckpt")
    load_ldm(built, tmp_path / "x.ckpt", ema=True)
    allowed = 2e-3 if name == "half" else 0
    for key, value in built.state_dict().items():
        assert (value - state[key]).abs().max() <= allowed * state[key].abs().max(), key


def test_averages_of_a_compiled_network_are_found(tmp_path):
    state = whole(model())
    names = [key.removeprefix("model.") for key in state if key.startswith("model.")]
    ema = {
        "model_ema." + name.replace("diffusion_model.", "diffusion_model._orig_mod.").replace(".", ""): state[
            "model." + name
        ]
        for name in names
    }
    wrapped = WRAPPED["compiled network"](state) | ema | {"model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": wrapped}, tmp_path / "x.ckpt")
    found = read_ldm(tmp_path / "x.ckpt")
    assert found.ema is not None and found.ema.keys() == found.model.keys() and not found.unknown


@pytest.mark.parametrize("name", ["module", "state_dict", "averages"])
def test_a_first_stage_as_other_tools_save_it(name, tmp_path):
    first = instantiate(FIRST_STAGE, "x")
    state = whole(first)
    torch.save(WRAPPED[name](state), tmp_path / "x.ckpt")
    params = {**FIRST_STAGE["params"], "ckpt_path": str(tmp_path / "x.ckpt")}
    loaded = instantiate({**FIRST_STAGE, "params": params}, "x").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def adm() -> dict[str, torch.Tensor]:
    return dict(adm_unet().state_dict())


SD = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3),
    "cond_stage_model.model.x": torch.zeros(1),
}
OTHERS = {
    "an unconditional model of guided-diffusion": adm,
    "a Stable Diffusion inpainting model; LatentInpaintDiffusion is missing here": lambda: SD,
    "a diffusers U-Net": lambda: {f"{part}.0.x": torch.zeros(1) for part in ("down_blocks", "up_blocks", "time_embedding")},
    "a torchvision ResNet": lambda: {key: torch.zeros(1) for key in ("layer1.0.conv1.w", "layer4.0.conv1.w", "fc.weight")},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_told_what_it_looks_like(name, tmp_path):
    torch.save(OTHERS[name](), tmp_path / "x.ckpt")
    assert f"x.ckpt: has the keys of {name}" in complaint(load_ldm, model(), tmp_path / "x.ckpt")
    stage = {**FIRST_STAGE, "params": {**FIRST_STAGE["params"], "ckpt_path": str(tmp_path / "x.ckpt")}}
    text = complaint(instantiate, stage, "first_stage_config")
    assert f"has the keys of {name}" in text or "is a diffusion model's checkpoint" in text


def test_another_file_is_told_before_the_model_is_built(tmp_path, monkeypatch):
    """A large model takes minutes."""
    torch.save(adm(), tmp_path / "x.ckpt")
    monkeypatch.setattr(loading, "instantiate", lambda *_: pytest.fail("it was built"))
    text = complaint(loading.load_model, {"model": {**LDM, "params": {}}}, tmp_path / "x.ckpt", torch.device("cpu"))
    assert "has the keys of an unconditional model of guided-diffusion" in text


def test_weights_with_nan(tmp_path):
    """The network, the averages alone, and the first stage: only what is used counts."""
    state = whole(model())
    key = "model.diffusion_model.out.2.bias"
    torch.save({**state, key: state[key] * float("nan")}, tmp_path / "x.ckpt")
    assert "network: 1 of" in complaint(load_ldm, model(), tmp_path / "x.ckpt")
    first = "first_stage_model.decoder.conv_out.bias"
    torch.save({**state, first: state[first] * float("inf")}, tmp_path / "x.ckpt")
    assert "first stage: 1 of" in complaint(load_ldm, model(), tmp_path / "x.ckpt")
    average = {"model_ema.diffusion_modelout2bias": state[key] * float("nan")}
    torch.save({**state, **average}, tmp_path / "x.ckpt")
    load_ldm(model(), tmp_path / "x.ckpt")
    assert "hold NaN or infinity ('out.2.bias')" in complaint(lambda: load_ldm(model(), tmp_path / "x.ckpt", ema=True))


def test_decoded_images_that_are_nan_are_not_made(monkeypatch):
    built = model().eval()
    monkeypatch.setattr(built.first_stage_model, "decode", lambda z: z.new_full((len(z), 3, 16, 16), float("nan")))
    drawn = LatentGenerator(built).draw([0], LatentSampleConfig(steps=2)).x_start
    assert "decoded images became NaN" in complaint(built.decode, drawn)
    assert DDCONFIG["out_ch"] == 3 and UNET["in_channels"] == 4
