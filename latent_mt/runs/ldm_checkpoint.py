"""LDM's checkpoints, `.ckpt` or .safetensors of the same entries: reading, writing, and loading into a LatentMTDiffusion.

    state_dict:  model.diffusion_model.*   the U-Net
                 first_stage_model.*       the autoencoder
                 cond_stage_model.*        what encodes the condition
                 model_ema.*               averages of the U-Net's parameters: their names without dots, decay, num_updates
                 betas, alphas_cumprod ... the noise schedule;  scale_factor, logvar
    global_step: optimiser steps so far

Nothing is unpickled: files that hold more than tensors are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.errors import UserError, reason
from guided_mt.runs import checkpoint
from guided_mt.runs.recognise import LDM_UNET as MODEL
from guided_mt.runs.weights import find_state, refuse_foreign, refuse_not_finite

from . import hugging_face
from .bare import PROJECTORS, completed, holds_network_alone, is_bare

FIRST_STAGE, COND_STAGE, EMA = "first_stage_model.", "cond_stage_model.", "model_ema."
SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
OTHER_BUFFERS = ("lvlb_weights", "logvar", "cond_ids")
# What Lightning keeps in a checkpoint beside the weights, for going on with its own training.
LIGHTNING = (
    "state_dict",
    "global_step",
    "epoch",
    "pytorch-lightning_version",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "hparams_name",
    "hyper_parameters",
    "native_amp_scaling_state",
    "amp_scaling_state",
)
# What other trainers keep there.
TRAINERS = (
    "model",
    "ema",
    "opt",
    "optimizer",
    "scheduler",
    "args",
    "config",
    "step",
    "steps",
    "iteration",
    "n_averaged",
)
AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "quantize.")
TRAINING_ONLY = ("loss.", "model_ema.")  # entries of an autoencoder that only its own training needs
log = logging.getLogger("latent_mt")


@dataclass
class LDMCheckpoint:
    """The parts of a checkpoint as state dicts of the modules that they belong to: no prefixes.

    model, ema: of the U-Net; first_stage, cond_stage: of the autoencoder and of what encodes the condition; buffers: the
    schedule, float32 [T] each, and logvar. None and {} are what a file lacks. unknown: entries that are none of LDM's, by name.
    alone: whether it is a transformer's file, which holds the network and nothing else.
    """

    model: dict[str, Tensor]
    first_stage: dict[str, Tensor] = field(default_factory=dict)
    cond_stage: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] | None = None
    ema_decay: float | None = None
    ema_updates: int | None = None
    scale_factor: float | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    step: int | None = None
    unknown: list[str] = field(default_factory=list)
    alone: bool = False


# ---------------------------------------------------------------- reading


def read_state_dict(
    path: str | Path, kind: str, averaged: bool = True, lazily: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the state dict, what stands beside it) of a .ckpt, .pt or .safetensors file of `kind` "diffusion" or "autoencoder".

    averaged, lazily: see `weights.find_state`. Raises UserError for a damaged file, one with objects of a program, and one of
    another kind.
    """
    path = Path(path)
    if hugging_face.is_pipeline(path) and kind == "diffusion":
        betas = hugging_face.betas_of(path)
        return ({} if lazily else hugging_face.read_state(path)) | schedule_buffers(betas), {}
    read = find_state(path, averaged, lazily)
    state, beside = read.state, read.beside
    if kind == "diffusion" and is_bare(state):
        return {MODEL + key: value for key, value in state.items() if not key.startswith(PROJECTORS)}, beside
    refuse_foreign(state, path, "latent", "first stage", "pixel", "classifier")
    found = kind_of(state)
    if found == kind:
        return state, beside
    if found == "autoencoder":
        raise UserError(
            f"{path}: is an autoencoder's checkpoint, but a diffusion model's is expected; give it as ckpt_path of "
            "first_stage_config.params"
        )
    if found == "diffusion":
        raise UserError(
            f"{path}: is a diffusion model's checkpoint, but an autoencoder's is expected; load it as ckpt_path of "
            "model.params, which brings its first stage along"
        )
    refuse_foreign(state, path, "latent" if kind == "diffusion" else "first stage")
    raise UserError(
        f"{path}: is no checkpoint of latent-diffusion: no entry begins with {MODEL} or encoder. (first: '{next(iter(state))}')"
    )


def kind_of(state: Iterable[str]) -> str:
    """ "diffusion", "autoencoder" or "other", from the names of a state dict's entries."""
    names = list(state)
    if any(name.startswith((MODEL, EMA + "diffusion_model")) for name in names):
        return "diffusion"
    return "autoencoder" if any(name.startswith(AUTOENCODER) for name in names) else "other"


def read_ldm(
    path: str | Path, names: Iterable[str] = (), ignore: Sequence[str] = (), averaged: bool = True
) -> LDMCheckpoint:
    """A diffusion model's checkpoint in parts. averaged: see `weights.find_state`.

    names: the U-Net's parameters, for the averages of a file without the U-Net itself (names in the file are known anyway).
    ignore: entries that begin with one of these are left out. Raises UserError as `read_state_dict` does.
    """
    state, beside = read_state_dict(path, "diffusion", averaged)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(ignore))} if ignore else state
    found = LDMCheckpoint({}, step=_whole_number(beside.get("global_step")), alone=holds_network_alone(state))
    averages: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(EMA):
            averages[key.removeprefix(EMA)] = value
        elif key == "scale_factor" and value.numel() == 1:
            found.scale_factor = float(value)
        elif key in SCHEDULE_BUFFERS + OTHER_BUFFERS:
            found.buffers[key] = value
        else:
            parts = {MODEL: found.model, FIRST_STAGE: found.first_stage, COND_STAGE: found.cond_stage}
            prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
            if prefix is None:
                found.unknown.append(key)
            else:
                parts[prefix][key.removeprefix(prefix)] = value
    _read_averages(found, averages, names)
    found.unknown += [key for key in beside if key not in (*LIGHTNING, *TRAINERS)]
    return found


def _read_averages(found: LDMCheckpoint, averages: dict[str, Tensor], names: Iterable[str]) -> None:
    """`averages` {name without dots: tensor} -> the fields ema, ema_decay and ema_updates."""
    if "decay" in averages:
        found.ema_decay = float(averages.pop("decay"))
    if "num_updates" in averages:
        found.ema_updates = int(averages.pop("num_updates"))
    dotted = {average_name(name): name for name in (*found.model, *names)}
    for key, value in averages.items():
        if key not in dotted:
            found.unknown.append(EMA + key)
            continue
        found.ema = found.ema or {}
        found.ema[dotted[key]] = value


def _whole_number(value: Any) -> int | None:
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def average_name(name: str) -> str:
    """How LDM's averages call a parameter of the U-Net: dots can't be in a buffer's name, so it drops them."""
    return f"diffusion_model.{name}".replace(".", "")


# ---------------------------------------------------------------- writing


def write_ldm(path: str | Path, content: LDMCheckpoint) -> None:
    """Write `content` as a .ckpt or .safetensors file, under a temporary name until it is complete.

    LDM's own samplers use the averages (`ema_scope`), which begin as random weights where a file has none: give `ema`.
    `content.unknown` is names alone and is not written. Raises UserError.
    """
    write_state(Path(path), _whole(content), content.step)


def write_state(path: Path, state: Mapping[str, Tensor], step: int | None) -> None:
    """Write {"state_dict": state, "global_step": step} as LDM does. Raises UserError."""
    if path.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"{path}: the file to write must end in .ckpt or .safetensors")
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    temporary = path.with_name(f".tmp_{path.name}")
    beside = {} if step is None else {"global_step": step}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ckpt":
            torch.save({"state_dict": state, **beside}, temporary)
        else:
            save_file(state, str(temporary), metadata={key: json.dumps(value) for key, value in beside.items()} or None)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: can't be written ({reason(error)})") from None


def _whole(content: LDMCheckpoint) -> dict[str, Tensor]:
    """The state dict as LDM names it; every tensor has memory of its own."""
    state = {MODEL + key: value for key, value in content.model.items()}
    state |= {FIRST_STAGE + key: value for key, value in content.first_stage.items()}
    state |= {COND_STAGE + key: value for key, value in content.cond_stage.items()}
    if content.ema is not None:
        averages = {EMA + average_name(key): value for key, value in content.ema.items()}
        if len(averages) != len(content.ema):
            raise UserError("two of the U-Net's parameters have the same name without dots, so LDM can't average them")
        state |= averages
    if content.ema_decay is not None:
        state[EMA + "decay"] = torch.tensor(content.ema_decay, dtype=torch.float32)
    if content.ema_updates is not None:
        state[EMA + "num_updates"] = torch.tensor(content.ema_updates, dtype=torch.int32)
    state |= content.buffers
    if content.scale_factor is not None:
        state["scale_factor"] = torch.tensor(content.scale_factor, dtype=torch.float32)
    return state


def schedule_buffers(betas: np.ndarray) -> dict[str, Tensor]:
    """The entries that LDM keeps of a noise schedule, float32 [T], from betas [T] (its v_posterior is 0)."""
    diffusion = GaussianDiffusion(betas=np.asarray(betas, dtype=np.float64), model_mean_type="v")  # no table is v's
    tables = {name: getattr(diffusion, name) for name in SCHEDULE_BUFFERS}
    # ADM gives t = 0 the logarithm of the next timestep's variance; LDM bounds it from below.
    tables["posterior_log_variance_clipped"] = np.log(np.maximum(diffusion.posterior_variance, 1e-20))
    return {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}


# ---------------------------------------------------------------- loading


def load_ldm(
    module: Any, path: str | Path, ignore_keys: Sequence[str] = (), *, only_unet: bool = False, ema: bool = False
) -> LDMCheckpoint:
    """Load a checkpoint into `module`, a LatentMTDiffusion; float16 files are widened. Returns what the file holds.

    ignore_keys: entries that begin with one of these are left out, as in LDM. only_unet: first and conditioning stage stay as
    they are, as they do where the file holds a transformer alone. ema: take the averaged weights, which LDM
    samples with, where the file has some (it may have no others). Heads and condition inputs of ours may be new, and then change
    nothing (guided_mt.runs.checkpoint.load_weights). Raises UserError for parts that differ, for entries that the model has no
    place for, and for another noise schedule.
    """
    network = module.model.diffusion_model
    found = read_ldm(path, network.state_dict(), ignore_keys, averaged=ema)
    # Averages are of parameters alone; buffers, if any, come from the network itself.
    weights = {**found.model, **found.ema} if found.ema is not None and (ema or not found.model) else found.model
    _load_part(network, completed(network, weights), f"{path}: network", "unet_config", new=True)
    if not only_unet and not found.alone:
        if found.unknown:
            first = found.unknown[0]
            raise UserError(
                f"{path}: has {len(found.unknown)} entries that are none of latent-diffusion's, first '{first}'; leave them out "
                f"by ignore_keys: [{first.partition('.')[0]}]"
            )
        _check_schedule(module, found, path)
        _load_stages(module, found, path)
        if found.scale_factor is not None:
            module.scale_factor.fill_(found.scale_factor)
    return found


def _load_stages(module: Any, found: LDMCheckpoint, path: str | Path) -> None:
    dropped = [key for key in found.first_stage if key.startswith(TRAINING_ONLY)]
    if dropped:
        log.info("%s: %d entries of the first stage not loaded: they belong to its training", path, len(dropped))
    first = {key: value for key, value in found.first_stage.items() if key not in dropped}
    if module.first_stage_model.state_dict() or first:
        _load_part(module.first_stage_model, first, f"{path}: first stage", "first_stage_config")
    stage = getattr(module, "cond_stage_model", None)
    if stage is not None:
        _refuse_another_stage(stage, found.cond_stage, path)
        _load_part(stage, _fitted(stage, found.cond_stage, path), f"{path}: conditioning stage", "cond_stage_config")
    elif found.cond_stage.keys() - found.first_stage.keys():  # __is_first_stage__: LDM writes the same module twice
        first_key = next(iter(found.cond_stage))
        raise UserError(
            f"{path}: conditioning stage: it has {len(found.cond_stage)} entries that the model lacks, first '{first_key}'; "
            "set cond_stage_config, or leave them out by ignore_keys: [cond_stage_model]"
        )


# LDM's conditioning stages by how their entries begin.
STAGES = {
    "model.transformer.resblocks.": "FrozenOpenCLIPEmbedder",
    "transformer.text_model.": "FrozenCLIPEmbedder",
    "transformer.attn_layers.": "BERTEmbedder or TransformerEmbedder",
    "embedding.": "ClassEmbedder",
    "channel_mapper.": "SpatialRescaler",
}


def _refuse_another_stage(stage: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """UserError where the entries are those of another class of stage."""
    theirs, ours = (
        next((name for start, name in STAGES.items() if any(key.startswith(start) for key in keys)), "")
        for keys in (state, stage.state_dict())
    )
    if theirs and theirs != ours:
        raise UserError(
            f"{path}: conditioning stage: it has the entries of a {theirs}, and model.params.cond_stage_config is a "
            f"{type(stage).__name__}; take the YAML file that belongs to the checkpoint"
        )


def _fitted(stage: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The entries of `state` that are weights; a conditioning stage leaves out what isn't used and `state` lacks."""
    missing = leave_out(stage, state) if state else []
    if missing:
        log.info("%s: %d entries of the conditioning stage are not there, and not used: left out", path, len(missing))
    return {key: value for key, value in state.items() if key not in getattr(stage, "not_weights", ())}


def leave_out(stage: nn.Module, names: Collection[str]) -> list[str]:
    """The entries that the conditioning stage doesn't use and that `names` lacks: they are taken out of it."""
    missing = [key for key in getattr(stage, "unused", ()) if key not in names]
    if missing:
        stage.leave_out(missing)  # type: ignore[operator]
    return missing


def _load_part(module: nn.Module, state: Mapping[str, Tensor], where: str, key: str, new: bool = False) -> None:
    if not state and module.state_dict():
        raise UserError(f"{where}: the file holds nothing of it; take a checkpoint with all parts")
    what = checkpoint.difference(state, module.state_dict(), optional=checkpoint.is_own if new else None)
    if what:
        raise UserError(f"{where}: another architecture: {what}; compare model.params.{key}")
    refuse_not_finite(state, where)
    checkpoint.fill(module, state)


def _check_schedule(module: Any, found: LDMCheckpoint, path: str | Path) -> None:
    saved, own = found.buffers.get("betas"), torch.as_tensor(module.diffusion.betas, dtype=torch.float32)
    if saved is not None and (saved.shape != own.shape or not torch.allclose(saved.float(), own, rtol=1e-3, atol=0)):
        ends = [f"{len(b)} betas from {float(b[0]):.4g} to {float(b[-1]):.4g}" for b in (saved, own)]
        raise UserError(
            f"{path}: was trained with another noise schedule: {ends[0]} there, {ends[1]} here; compare timesteps, "
            "beta_schedule, linear_start and linear_end, or leave it out by ignore_keys: [betas]"
        )
