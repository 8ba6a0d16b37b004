"""The one reader of weights: as other tools save them, under other names, and what is no weights file at all."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import pickle
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import load_weights, save_checkpoint, sync
from guided_mt.runs.weights import find_state, read_weights, refuse_not_finite, unwrapped


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


STATE = {key: torch.randn(value.shape) if value.ndim else value for key, value in network().state_dict().items()}
OTHER = {key: torch.zeros_like(value) for key, value in STATE.items()}


def under(prefix: str, state: dict = STATE) -> dict:
    return {prefix + key: value for key, value in state.items()}


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 500
    assert "weights_only" not in text and "torch.load" not in text and "PyTorch 2.6" not in text
    return text.removeprefix(str(path))


def same(state: dict) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[key], value) for key, value in STATE.items())


# ---------------------------------------------------------------- as other tools save them

WRAPPED = {
    "plain": STATE,
    "DistributedDataParallel": under("module."),
    "compiled": under("_orig_mod."),
    "compiled, then DistributedDataParallel": under("module._orig_mod."),
    "DistributedDataParallel, then compiled": under("_orig_mod.module."),
    "twice": under("module.module._orig_mod."),
    "a part compiled": {key.replace("0.", "0._orig_mod.", 1): value for key, value in STATE.items()},
    "FSDP": under("_fsdp_wrapped_module."),
    "AveragedModel": {"n_averaged": torch.tensor(7), **under("module.")},
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "state_dict, compiled": {"state_dict": under("_orig_mod."), "epoch": 3},
    "model": {"model": STATE, "optimizer": {"state": {}, "param_groups": []}, "args": {}},
    "averages": {"model": OTHER, "ema": STATE, "opt": {}, "args": argparse.Namespace(lr=1.0, data=Path("x"))},
    "averages inside": {"state_dict": OTHER, "ema": {"state_dict": under("module."), "decay": 0.9}},
    "DeepSpeed": {"module": under("module."), "global_steps": 3},
    "OmegaConf beside": {"state_dict": STATE, "hyper_parameters": OmegaConf.create({"a": {"b": [1, "x", 2.0, None]}})},
    "numpy beside": {"state_dict": STATE, "best": np.float64(0.5), "curve": np.arange(3)},
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_other_tools_save_is_read(name, zipped, tmp_path, caplog):
    torch.save(WRAPPED[name], tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with caplog.at_level("INFO"):
        assert same(read_weights(tmp_path / "x.pt"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == name.startswith("averages")
    assert all("takes its averages 'ema', not '" in line for line in said)
    model = network()
    assert load_weights(model, tmp_path / "x.pt") == [] and same(model.state_dict())


def test_the_weights_themselves_are_taken_on_request(tmp_path):
    torch.save({"model": STATE, "ema": OTHER}, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt", averaged=False))
    torch.save({"ema": STATE}, tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt", averaged=False))  # there are no others


def test_half_precision_is_widened(tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}, tmp_path / "x.pt")
    model = network()
    load_weights(model, tmp_path / "x.pt")
    assert all(torch.allclose(value, STATE[key], atol=1e-3) for key, value in model.state_dict().items())


def test_names_that_only_look_wrapped_stay():
    odd = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert unwrapped(odd).keys() == odd.keys()
    assert list(unwrapped({"model_ema.diffusion_model_orig_modout0bias": torch.zeros(1)})) == [
        "model_ema.diffusion_modelout0bias"
    ]
    clash = {"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)}
    assert unwrapped(clash).keys() == clash.keys()


# ---------------------------------------------------------------- names and content


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors", ".bin", ""])
def test_content_decides_not_the_name(suffix, tmp_path):
    save_file(STATE, tmp_path / f"s{suffix}", metadata={"global_step": "3"})
    torch.save(STATE, tmp_path / f"t{suffix}")
    assert same(read_weights(tmp_path / f"s{suffix}")) and same(read_weights(tmp_path / f"t{suffix}"))
    assert find_state(tmp_path / f"s{suffix}").beside == {"global_step": "3"}


def zipped(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return content.getvalue()


def saved(function, *arguments) -> bytes:
    content = io.BytesIO()
    function(*arguments, content)
    return content.getvalue()


def a_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    return content.getvalue()


WHOLE = saved(torch.save, STATE)
NO_WEIGHTS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2133074\n", "is a Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "is a web page (HTML)"),
    "page in capitals": (b"<HTML>", "is a web page (HTML)"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML document"),
    "json": (json.dumps({"weight_map": {}}).encode(), "is a JSON file"),
    "text": (b"404: Not Found", "is text, '404: Not Found'"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(9000), "nothing but zeros"),
    "cut": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "cut at once": (WHOLE[:3], "truncated"),
    "legacy, cut": (saved(lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False), STATE)[:-90], "truncated"),
    "safetensors, cut": (b"\x40\0\0\0\0\0\0\0{\"x\":", "truncated"),
    "images": (zipped(a__png=b"", b__jpg=b""), "is a zip archive of 2 pictures, first 'a.png'"),
    "zip": (zipped(a__txt=b""), "is a zip archive of 1 files, first 'a.txt'"),
    "npz": (saved(lambda x, f: np.savez(f, arr_0=x), np.zeros(2)), "is a NumPy .npz file (arr_0.npy)"),
    "npy": (saved(lambda x, f: np.save(f, x), np.zeros(2)), "is a NumPy array"),
    "tar": (a_tar(), "is a tar archive"),
    "gzip": (b"\x1f\x8b\x08\0\0\0", "compressed by gzip"),
    "png": (b"\x89PNG\r\n\x1a\n", "is a PNG picture"),
    "pickle": (pickle.dumps({"a": list(range(30))}), "refused, it is a Python pickle"),
    "model": (saved(torch.save, network()), "refused"),
    "noise": (b"\xfe\xdc\xba\x98" * 30, "unknown kind"),
    "optimiser": (saved(torch.save, torch.optim.Adam(network().parameters()).state_dict()), "an optimiser's state"),
    "number": (saved(torch.save, {"a": 1}), "holds no state dict of tensors, but 'a'"),
    "list": (saved(torch.save, [torch.zeros(1)]), "holds no state dict of tensors, but a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_weights_file_is_told_what_it_is(name, suffix, tmp_path):
    content, expected = NO_WEIGHTS[name]
    (tmp_path / f"x{suffix}").write_bytes(content)
    assert expected in complaint(tmp_path / f"x{suffix}")


def test_a_torchscript_program_and_a_missing_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", b"")
    assert "is a TorchScript program" in complaint(tmp_path / "x.pt")
    assert "No such file" in complaint(tmp_path / "gone.pt")


# ---------------------------------------------------------------- another architecture


def test_another_architecture_is_told_what_it_looks_like(tmp_path):
    from tiny import adm_unet

    state = {f"model.diffusion_model.{key}": value for key, value in adm_unet().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    with pytest.raises(
        UserError, match=r"has the keys of a latent-diffusion .* this model is an unconditional model of"
    ):
        load_weights(adm_unet(), tmp_path / "ldm.ckpt")


# ---------------------------------------------------------------- numbers that are none


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    bad = {**STATE, "0.weight": STATE["0.weight"].clone(), "1.bias": torch.full((3,), float("inf")).half()}
    bad["0.weight"][0, 0] = float("nan")
    torch.save(bad, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x.pt: 2 of 7 entries hold NaN or infinity \('0.weight', '1.bias'\)"):
        load_weights(network(), tmp_path / "x.pt")
    fine = {"attn_mask": torch.full((2, 2), -torch.inf), "count": torch.tensor(3), "none": torch.zeros(0)}
    refuse_not_finite(fine, "x")


# ---------------------------------------------------------------- file systems with fewer abilities


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EBADF])
def test_a_file_system_that_cannot_sync_folders_is_no_failure(code, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, "no")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    written = save_checkpoint(
        tmp_path, 5, config_yaml="a: 1\n", weights={"model": {"w": torch.zeros(2)}}, training_state={}, classes=None
    )
    assert (written / "model.safetensors").exists()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        sync(tmp_path)
