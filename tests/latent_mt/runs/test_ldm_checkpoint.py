"""LDM's checkpoints: exact round trips, averages by their dotless names, loading into a model, and what is refused."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny import assert_same
from torch import Tensor, nn

from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import save_checkpoint
from latent_mt.commands import export_ldm
from latent_mt.model.schedules import make_beta_schedule
from latent_mt.runs.ldm_checkpoint import (
    SCHEDULE_BUFFERS,
    LDMCheckpoint,
    average_name,
    load_ldm,
    read_ldm,
    read_state_dict,
    schedule_buffers,
    write_ldm,
)
from latent_mt.runs.targets import instantiate

UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "context_dim": 8,
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
PARAMS = {
    "linear_start": 0.0015,
    "linear_end": 0.0195,
    "timesteps": 1000,
    "image_size": 8,
    "channels": 3,
    "cond_stage_key": "class_label",
    "cond_stage_trainable": True,
    "conditioning_key": "crossattn",
    "scale_factor": 0.25,
    "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
    "first_stage_config": {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {"embed_dim": 3, "n_embed": 16, "ddconfig": DDCONFIG, "lossconfig": {"target": "torch.nn.Identity"}},
    },
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 4},
    },
}
PAIRED = {"mt_sides": ["photo", "map"], "mt_variant": "any"}


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 700, text
    return text


def model(seed: int = 0, **params) -> nn.Module:
    """A tiny LatentMTDiffusion with random weights everywhere, as a trained one has."""
    torch.manual_seed(seed)
    built = instantiate(
        {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**PARAMS, **params}}, "model"
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.eval()


def noised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + 0.01 * torch.randn_like(value) for key, value in state.items()}


def parts_of(built: nn.Module, **changes) -> LDMCheckpoint:
    unet = {k: v.clone() for k, v in built.model.diffusion_model.state_dict().items()}
    fields = {
        "model": unet,
        "first_stage": built.first_stage_model.state_dict(),
        "cond_stage": built.cond_stage_model.state_dict(),
        "ema": noised(unet),
        "ema_decay": 0.9999,
        "ema_updates": 1234,
        "scale_factor": 0.18215,
        "buffers": schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.0195)),
        "step": 1234,
    }
    return LDMCheckpoint(**{**fields, **changes})


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return model()


def lightning_file(path: Path, state: dict[str, Tensor], **beside) -> Path:
    """A .ckpt as LDM's training writes it."""
    torch.save(
        {"epoch": 3, "global_step": 77, "pytorch-lightning_version": "1.4.2", "state_dict": state, **beside}, path
    )
    return path


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("changes", [{}, {"ema": None, "ema_decay": None, "ema_updates": None}, {"scale_factor": None}])
def test_round_trip_is_exact(tiny, tmp_path, suffix, changes):
    content = parts_of(tiny, **changes)
    write_ldm(tmp_path / f"x{suffix}", content)
    found = read_ldm(tmp_path / f"x{suffix}")
    for field in ("model", "first_stage", "cond_stage", "buffers"):
        assert_same(getattr(found, field), dict(getattr(content, field)), field)
    assert (found.ema is None) == (content.ema is None)
    if content.ema is not None:
        assert_same({k: found.ema[k] for k in sorted(found.ema)}, {k: content.ema[k] for k in sorted(content.ema)})
        assert found.ema_decay == float(np.float32(0.9999)) and found.ema_updates == 1234
    assert found.scale_factor == (None if content.scale_factor is None else float(np.float32(0.18215)))
    assert found.step == 1234 and not found.unknown
    write_ldm(tmp_path / f"y{suffix}", found)
    again = read_ldm(tmp_path / f"y{suffix}")
    assert_same(vars(again), vars(found))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"x{suffix}", f"y{suffix}"]


def test_what_is_written_has_ldms_names(tiny, tmp_path):
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny))
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(file) == {"state_dict", "global_step"} and file["global_step"] == 1234
    state = file["state_dict"]
    expected = {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model_ema.diffusion_modelinput_blocks00weight",
        "model_ema.diffusion_modeltime_embed0bias",
        "model_ema.decay",
        "model_ema.num_updates",
        "first_stage_model.quantize.embedding.weight",
        "cond_stage_model.embedding.weight",
        "scale_factor",
        *SCHEDULE_BUFFERS,
    }
    assert expected <= set(state)
    assert state["model_ema.num_updates"].dtype == torch.int32 and state["model_ema.num_updates"].ndim == 0
    assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in state.values())


def test_averages_have_the_names_of_a_module_s_buffers():
    """A buffer's name can't hold a dot: registering them is what LDM does with them."""
    holder = nn.Module()
    for name in ("input_blocks.1.1.proj_in.weight", "out.2.bias"):
        holder.register_buffer(average_name(name), torch.zeros(1))
    assert list(holder.state_dict()) == ["diffusion_modelinput_blocks11proj_inweight", "diffusion_modelout2bias"]


def test_names_that_collide_without_dots_are_refused(tmp_path):
    twins = {"a.1.11.w": torch.zeros(1), "a.11.1.w": torch.zeros(1)}
    text = complaint(write_ldm, tmp_path / "x.ckpt", LDMCheckpoint(twins, ema=twins))
    assert "same name without dots" in text and not list(tmp_path.iterdir())


def test_schedule_buffers_are_ldms():
    golden = np.load(GOLDEN / "ldm_schedules.npz")["betas_linear_0.0015_0.0195"]
    buffers = schedule_buffers(golden)
    assert set(buffers) == set(SCHEDULE_BUFFERS) and all(b.dtype == torch.float32 for b in buffers.values())
    abar = np.cumprod(1 - golden)
    before = np.append(1.0, abar[:-1])
    variance = golden * (1 - before) / (1 - abar)
    for name, expected in {
        "betas": golden,
        "alphas_cumprod_prev": before,
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - golden) / (1 - abar),
    }.items():
        assert np.allclose(buffers[name], expected, rtol=1e-6, atol=0), name


# ---------------------------------------------------------------- reading


def test_lightnings_own_entries_are_known_and_others_are_named(tiny, tmp_path):
    state = {f"model.diffusion_model.{k}": v for k, v in tiny.model.diffusion_model.state_dict().items()}
    state |= {"embedding_manager.x": torch.zeros(1), "model_ema.diffusion_modelnowhere": torch.zeros(1)}
    path = lightning_file(tmp_path / "x.ckpt", state, optimizer_states=[], lr_schedulers=[], extra_part=1)
    found = read_ldm(path)
    assert found.unknown == ["embedding_manager.x", "model_ema.diffusion_modelnowhere", "extra_part"]
    assert found.step == 77 and found.ema is None and found.scale_factor is None


def test_averages_alone_are_read_with_the_names_of_the_model(tiny, tmp_path):
    unet = dict(tiny.model.diffusion_model.state_dict())
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny, model={}, ema=unet))
    assert read_ldm(tmp_path / "x.ckpt").ema is None and len(read_ldm(tmp_path / "x.ckpt").unknown) == len(unet)
    assert_same(read_ldm(tmp_path / "x.ckpt", unet).ema, unet)


class Callback:
    """What Lightning 1.x kept by its class in a checkpoint."""


def test_objects_in_a_checkpoint_are_refused_with_a_way_out(tmp_path):
    path = lightning_file(tmp_path / "old.ckpt", {"x": torch.zeros(1)}, callbacks={Callback: {"best": 1.0}})
    text = complaint(read_ldm, path)
    assert "old.ckpt: refused" in text and f"({Callback.__module__}.Callback)" in text
    assert "torch.save(model.state_dict(), 'weights.pt')" in text and "weights_only" not in text


def test_what_lightning_left_in_released_files_is_not_loaded(tiny, tmp_path):
    """Callbacks by their class and numpy scalars, as LDM's files have them: the weights load, and none of it is made."""
    state = {"x": torch.zeros(1), **{f"model.diffusion_model.{k}": v for k, v in tiny.network.state_dict().items()}}
    callbacks = {ModelCheckpoint: {"best_model_score": np.float64(0.5), "best_model_path": "somewhere"}}
    path = lightning_file(tmp_path / "old.ckpt", state, callbacks=callbacks)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = read_ldm(path)
    assert found.model.keys() == tiny.network.state_dict().keys() and found.unknown == ["x"]


def autoencoder_file(tiny, path: Path) -> Path:
    state = dict(tiny.first_stage_model.state_dict()) | {"loss.logvar": torch.zeros(())}
    return lightning_file(path, state)


BAD = [
    (
        lambda t, p: autoencoder_file(t, p),
        "is an autoencoder's checkpoint, .* give it as ckpt_path of first_stage_config",
    ),
    (
        lambda t, p: lightning_file(p, {"input_blocks.0.0.weight": torch.zeros(1)}),
        "no entry begins with model.diffusion",
    ),
    (lambda t, p: lightning_file(p, {}), "holds no state dict of tensors"),
    (lambda t, p: torch.save([1, 2], p), "holds no state dict of tensors"),
    (lambda t, p: p.write_bytes(b"PK\x03\x04 nothing"), "x.ckpt: "),
    (lambda t, p: None, "x.ckpt: .*No such file"),
]


@pytest.mark.parametrize("make, expected", BAD)
def test_other_files_get_one_line(make, expected, tiny, tmp_path):
    make(tiny, tmp_path / "x.ckpt")
    assert re.search(expected, complaint(read_ldm, tmp_path / "x.ckpt"))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.999])
def test_truncated_files_get_one_line(tiny, tmp_path, suffix, share):
    path = tmp_path / f"x{suffix}"
    write_ldm(path, parts_of(tiny))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert re.search(f"x{suffix}: .*(truncated|damaged)", complaint(read_ldm, path))


def test_a_diffusion_model_is_no_autoencoder(tiny, tmp_path):
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny))
    text = complaint(read_state_dict, tmp_path / "x.ckpt", "autoencoder")
    assert "is a diffusion model's checkpoint, but an autoencoder's is expected" in text
    state, beside = read_state_dict(autoencoder_file(tiny, tmp_path / "ae.ckpt"), "autoencoder")
    assert "quant_conv.weight" in state and beside["epoch"] == 3


def test_writing_where_that_is_impossible_says_so(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    text = complaint(write_ldm, tmp_path / "file" / "x.ckpt", parts_of(tiny))
    assert "can't be written" in text
    assert "must end in .ckpt or .safetensors" in complaint(write_ldm, tmp_path / "x.pt", parts_of(tiny))
    (tmp_path / "x.ckpt").mkdir()
    assert "can't be written" in complaint(write_ldm, tmp_path / "x.ckpt", parts_of(tiny))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "x.ckpt"]


# ---------------------------------------------------------------- loading into a model


def test_a_released_checkpoint_loads_and_gives_the_same_numbers(tiny, tmp_path):
    content = parts_of(tiny)
    write_ldm(tmp_path / "x.ckpt", content)
    other = model(seed=1)
    found = load_ldm(other, tmp_path / "x.ckpt")
    assert found.step == 1234 and other.scale_factor.item() == pytest.approx(0.18215)
    for key, value in tiny.state_dict().items():
        assert key == "scale_factor" or torch.equal(other.state_dict()[key], value), key
    z, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 1, 8)
    with torch.no_grad():
        outputs = [m.model(z, t, {}, c_crossattn=context).output for m in (tiny, other)]
        load_ldm(other, tmp_path / "x.ckpt", ema=True)
        averaged = other.model(z, t, {}, c_crossattn=context).output
    assert torch.equal(*outputs) and not torch.allclose(averaged, outputs[0])
    assert_same(dict(other.model.diffusion_model.state_dict()), content.ema)


def test_the_constructor_loads_it(tiny, tmp_path):
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny))
    built = instantiate(
        {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {**PARAMS, "ckpt_path": str(tmp_path / "x.ckpt")},
        },
        "model",
    )
    assert_same(dict(built.model.state_dict()), dict(tiny.model.state_dict()))


def test_float16_is_widened_and_only_the_unet_can_be_loaded(tiny, tmp_path):
    half = {key: value.half() for key, value in tiny.model.diffusion_model.state_dict().items()}
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny, model=half, first_stage={}, cond_stage={}, ema=None))
    other, untouched = model(seed=1), model(seed=1).first_stage_model.state_dict()
    load_ldm(other, tmp_path / "x.ckpt", only_unet=True)
    loaded = other.model.diffusion_model.state_dict()
    assert_same({k: loaded[k] for k in half}, {k: v.float() for k, v in half.items()})
    assert_same(dict(other.first_stage_model.state_dict()), dict(untouched))
    assert other.scale_factor.item() == 0.25


def test_heads_and_condition_inputs_are_new_and_change_nothing(tiny, tmp_path):
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny))
    paired = model(seed=2, **PAIRED)
    load_ldm(paired, tmp_path / "x.ckpt")
    z, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 1, 8)
    with torch.no_grad():
        plain = tiny.model(z, t, {}, c_crossattn=context).output
        ours = paired.model(z, t, {"paired": torch.randn(2, 3, 8, 8)}, c_crossattn=context).output
    assert torch.allclose(ours, plain, atol=1e-5)


def test_averages_stand_in_for_missing_weights(tiny, tmp_path):
    content = parts_of(tiny, model={})
    write_ldm(tmp_path / "x.ckpt", content)
    other = model(seed=1)
    load_ldm(other, tmp_path / "x.ckpt")
    assert_same(dict(other.model.diffusion_model.state_dict()), content.ema)


def test_the_first_stage_as_conditioning_stage_is_written_twice_by_ldm(tmp_path):
    inpainting = {
        "cond_stage_config": "__is_first_stage__",
        "conditioning_key": "concat",
        "unet_config": {**PARAMS["unet_config"], "params": {**UNET, "in_channels": 6}},
    }
    unet = {k: v for k, v in UNET.items() if k not in ("use_spatial_transformer", "context_dim")}
    inpainting["unet_config"]["params"] = {**unet, "in_channels": 6}
    built = model(**inpainting)
    first = built.first_stage_model.state_dict()
    content = LDMCheckpoint(dict(built.model.diffusion_model.state_dict()), dict(first), dict(first))
    write_ldm(tmp_path / "x.ckpt", content)
    other = model(seed=1, **inpainting)
    load_ldm(other, tmp_path / "x.ckpt")
    assert_same(dict(other.state_dict()), dict(built.state_dict()))


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


WRONG = [
    (
        lambda c: {"model": without(c.model, "out.2.bias")},
        r"network: another architecture: it lacks 1 of the model's \d+ entries, first 'out.2.bias'; compare .*unet_config",
    ),
    (
        lambda c: {"model": {**c.model, "extra.weight": torch.zeros(1)}},
        "network: .* has 1 entries that the model lacks, first 'extra.weight'",
    ),
    (lambda c: {"model": {**c.model, "out.2.bias": torch.zeros(7)}}, r"'out.2.bias' is \[7\] there and \[3\] here"),
    (
        lambda c: {"first_stage": without(c.first_stage, "quant_conv.bias")},
        "first stage: another architecture: it lacks 1 .*first_stage_config",
    ),
    (lambda c: {"first_stage": {}}, "first stage: the file holds nothing of it"),
    (
        lambda c: {"cond_stage": {"embedding.weight": torch.zeros(9, 8)}},
        r"conditioning stage: .*'embedding.weight' is \[9, 8\] there and \[4, 8\] here; compare .*cond_stage_config",
    ),
    (
        lambda c: {"buffers": schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.0155))},
        r"another noise schedule: 1000 betas from 0.0015 to 0.0155 there, 1000 betas from 0.0015 to 0.0195 here",
    ),
    (
        lambda c: {"buffers": schedule_buffers(make_beta_schedule("linear", 500, 0.0015, 0.0195))},
        "another noise schedule: 500 betas",
    ),
    (lambda c: {"buffers": {**c.buffers, "strange.entry": torch.zeros(1)}}, r"first 'strange.entry'; .*\[strange\]"),
]


@pytest.mark.parametrize("changes, expected", WRONG)
def test_what_differs_is_named(changes, expected, tiny, tmp_path):
    content = parts_of(tiny)
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny, **changes(content)))
    assert re.search(expected, complaint(load_ldm, model(seed=1), tmp_path / "x.ckpt"))


def test_what_is_ignored_is_not_loaded(tiny, tmp_path):
    content = parts_of(tiny, buffers=schedule_buffers(make_beta_schedule("linear", 500, 0.0015, 0.0195)))
    content.buffers["strange.entry"] = torch.zeros(1)
    write_ldm(tmp_path / "x.ckpt", content)
    found = load_ldm(model(seed=1), tmp_path / "x.ckpt", ["betas", "strange"])
    assert "betas" not in found.buffers and not found.unknown


def test_a_condition_that_the_model_does_not_have_is_named(tiny, tmp_path):
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny))
    unet = {k: v for k, v in UNET.items() if k not in ("use_spatial_transformer", "context_dim")}
    plain = model(
        cond_stage_config="__is_unconditional__",
        conditioning_key=None,
        unet_config={**PARAMS["unet_config"], "params": unet},
    )
    state = dict(plain.model.diffusion_model.state_dict())
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny, model=state, ema=None))
    text = complaint(load_ldm, plain, tmp_path / "x.ckpt")
    assert "conditioning stage: it has 1 entries that the model lacks" in text and "[cond_stage_model]" in text
    load_ldm(plain, tmp_path / "x.ckpt", ["cond_stage_model"])


def test_where_there_are_no_averages_the_weights_are_taken(tiny, tmp_path):
    write_ldm(tmp_path / "x.ckpt", parts_of(tiny, ema=None))
    loaded = model()
    load_ldm(loaded, tmp_path / "x.ckpt", ema=True)
    assert_same(dict(loaded.model.state_dict()), dict(tiny.model.state_dict()))


# ---------------------------------------------------------------- export


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, nn.Module, dict[str, Tensor]]:
    """(run folder of a model of pairs with two rates of averages, the model, the slow averages)."""
    folder, trained = tmp_path_factory.mktemp("export") / "run", model(seed=3, **PAIRED)
    state = trained.state_dict()
    slow = {k: v + 1 if k.startswith("model.") and v.is_floating_point() else v for k, v in state.items()}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**PARAMS, **PAIRED}}}
    save_checkpoint(
        folder,
        42,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(config)),
        weights={"model": state, "ema_0.9": state, "ema_0.9999": slow},
        training_state={},
        classes=None,
    )
    return folder, trained, slow


def exported(capsys, *argv: str | Path) -> str:
    export_ldm.main([str(word) for word in argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_run_is_exported_as_ldm_has_it(run, tmp_path, capsys, suffix):
    folder, trained, slow = run
    out = tmp_path / "deep" / f"x{suffix}"
    text = exported(capsys, "--model_path", folder, "--out", out)
    assert "step 42" in text and "ema_0.9999" in text
    assert "left out, since LDM has no place for them: condition_in, head_variance, heads" in text
    found = read_ldm(out)
    plain = model(seed=5)  # the U-Net without pairs is exactly LDM's
    assert found.model.keys() == plain.model.diffusion_model.state_dict().keys() == found.ema.keys()
    assert_same(found.first_stage, dict(trained.first_stage_model.state_dict()))
    assert_same(found.cond_stage, dict(trained.cond_stage_model.state_dict()))
    for key, value in found.ema.items():
        assert torch.equal(value, slow[f"model.diffusion_model.{key}"]), key
    assert (found.step, found.scale_factor, found.ema_updates, found.unknown) == (42, None, -1, [])
    assert found.ema_decay == float(np.float32(0.9999))
    assert_same(found.buffers, schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.0195)))
    load_ldm(plain, out)
    assert_same(dict(plain.first_stage_model.state_dict()), dict(trained.first_stage_model.state_dict()))


def test_which_averages_are_exported_is_a_flag(run, tmp_path, capsys):
    folder = run[0]
    for choice, offset in (("0.9", 0.0), ("0.9999", 1.0), ("none", 0.0)):
        exported(capsys, "--model_path", folder, "--out", tmp_path / "x.ckpt", "--ema", choice)
        found = read_ldm(tmp_path / "x.ckpt")
        assert torch.equal(found.ema["out.2.bias"], found.model["out.2.bias"] + offset), choice


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--out", "x.ckpt"], "--model_path is missing"),
        (["--model_path", "RUN"], "--out is missing"),
        (["--model_path", "RUN", "--out", "x.pt"], "must end in .ckpt or .safetensors"),
        (
            ["--model_path", "RUN", "--out", "x.ckpt", "--ema", "0.5"],
            "no averaged weights '0.5'; there are 0.9, 0.9999",
        ),
        (["--model_path", "RUN", "--outt", "x.ckpt"], r"unknown flag --outt \(did you mean out\?\)"),
    ],
)
def test_bad_export_flags_get_one_line(words, expected, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(run[0]) if word == "RUN" else word for word in words]
    assert re.search(expected, complaint(export_ldm.main, argv))
    assert not list(tmp_path.iterdir())


def test_the_scale_is_an_entry_only_where_it_was_measured(run, tmp_path, capsys):
    """LDM has the buffer with scale_by_std alone; else the number is in the YAML file."""
    exported(capsys, "--model_path", run[0], "--out", tmp_path / "x.ckpt")
    assert read_ldm(tmp_path / "x.ckpt").scale_factor is None
    assert OmegaConf.load(tmp_path / "x.yaml").model.params.scale_factor == 0.25
    measured = tmp_path / "measured"
    shutil.copytree(run[0], measured)
    file = measured / "checkpoints" / "step_00000042" / "config.yaml"
    file.write_text(file.read_text().replace("scale_factor: 0.25", "scale_by_std: true"))
    exported(capsys, "--model_path", measured, "--out", tmp_path / "y.ckpt")
    assert read_ldm(tmp_path / "y.ckpt").scale_factor == 0.25
    params = OmegaConf.load(tmp_path / "y.yaml").model.params
    assert params.scale_by_std and "scale_factor" not in params


def test_the_yaml_beside_it_has_ldms_keywords_alone(run, tmp_path, capsys):
    """Ours are gone, the classes have LDM's names, and our own code builds and loads the same model from the two files."""
    out = tmp_path / "x.ckpt"
    text = exported(capsys, "--model_path", run[0], "--out", out)
    assert "x.yaml: the configuration" in text
    config = OmegaConf.to_container(OmegaConf.load(tmp_path / "x.yaml"))
    params = config["model"]["params"]
    assert not any(key.startswith("mt_") for key in params) and "ckpt_path" not in params
    assert params["first_stage_config"]["params"]["lossconfig"] == {"target": "torch.nn.Identity"}
    built = instantiate({key: config["model"][key] for key in ("target", "params")}, "model")
    load_ldm(built, out, ema=True)
    assert_same(dict(built.cond_stage_model.state_dict()), dict(run[1].cond_stage_model.state_dict()))
    (tmp_path / "x.yaml").write_text("mine: 1\n")
    assert "is there and was not written by an export" in complaint(
        export_ldm.main, ["--model_path", str(run[0]), "--out", str(out)]
    )


def test_a_file_of_ldm_keeps_its_own_averages(tiny, run, tmp_path, capsys):
    content = parts_of(tiny)
    write_ldm(tmp_path / "x.ckpt", content)
    exported(capsys, "--model_path", tmp_path / "x.ckpt", "--out", tmp_path / "y.ckpt")
    found = read_ldm(tmp_path / "y.ckpt")
    assert_same(found.ema, {key: content.ema[key] for key in found.ema})
    assert (found.ema_updates, found.step, found.scale_factor) == (1234, 1234, float(np.float32(0.18215)))


@pytest.mark.parametrize("ema", ["", "none"])
def test_an_autoencoders_run_is_exported(ema, tiny, tmp_path, capsys):
    state = tiny.first_stage_model.state_dict()
    stage = PARAMS["first_stage_config"]
    slow = {key: value + 1 for key, value in state.items()}
    save_checkpoint(
        tmp_path / "ae",
        7,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create({"model": {"base_learning_rate": 1e-5, **stage}})),
        weights={"model": {**state, "loss.discriminator.x": torch.zeros(1)}, "ema_0.9": slow},
        training_state={},
        classes=None,
    )
    out = tmp_path / "x.ckpt"
    text = exported(capsys, "--model_path", tmp_path / "ae", "--out", out, *(["--ema", ema] if ema else []))
    assert f"left out, since only training needs it: {'loss' if ema else 'nothing'}" in text
    found, beside = read_state_dict(out, "autoencoder")
    assert_same(found, dict(state if ema else slow))
    assert beside["global_step"] == 7
    described = OmegaConf.to_container(OmegaConf.load(tmp_path / "x.yaml"))["model"]
    described["params"]["ckpt_path"] = str(out)
    again = instantiate({key: described[key] for key in ("target", "params")}, "model")
    assert_same(dict(again.state_dict()), found)


def test_weights_without_their_configuration_cannot_be_exported(run, tmp_path):
    lonely = tmp_path / "model.safetensors"
    lonely.write_bytes((run[0] / "checkpoints" / "step_00000042" / "model.safetensors").read_bytes())
    text = complaint(export_ldm.main, ["--model_path", str(lonely), "--out", str(tmp_path / "x.ckpt")])
    assert "has no config.yaml beside it" in text and load_file(lonely)
