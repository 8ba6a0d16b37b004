"""A whole pipeline folder: read as latent-diffusion's configuration and entries, and written from a model."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from guided_mt.errors import UserError, reason
from guided_mt.networks.clip import vocabulary
from guided_mt.runs.checkpoint import PIPELINE as INDEX
from guided_mt.runs.checkpoint import adm_state_dict
from guided_mt.runs.weights import read_weights

from ..targets import instantiate
from . import scheduler, text_encoder, unet, vae
from .values import number, swapped, whole

CLASS = "StableDiffusionPipeline"
log = logging.getLogger("latent_mt")
UNET, FIRST_STAGE = "ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.models.autoencoder.AutoencoderKL"
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
# Each part's weights, the first that is there: diffusers' names, then transformers'.
_FILES = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".safetensors.index.fp16.json",
    ".bin",
    ".bin.index.json",
    ".fp16.bin",
    ".bin.index.fp16.json",
)


def is_pipeline(path: str | Path) -> bool:
    """Whether a weights file stands for a whole folder of this layout."""
    return Path(path).name == INDEX


# ---------------------------------------------------------------- reading


def configuration(index: Path) -> dict[str, Any]:
    """{"model": {target, params}} as a YAML file of LDM's says it. index: the folder's model_index.json.

    Raises UserError for another pipeline, and for parts that LDM's classes can't be.
    """
    folder, pipeline = index.parent, _json(index)
    name = pipeline.get("_class_name")
    if name != CLASS:
        what = f"a {name}" if name else "no pipeline, without a _class_name"
        raise UserError(
            f"{index}: is {what}; of diffusers' pipelines {CLASS} alone is read, which draws from text and no more"
        )
    configs = {part: _json(folder / part / "config.json") for part in PREFIXES}
    schedule_file = folder / "scheduler" / "scheduler_config.json"
    for part, cls in (("unet", unet.CLASS), ("vae", vae.CLASS)):
        if configs[part].get("_class_name", cls) != cls:
            raise UserError(
                f"{folder / part / 'config.json'}: is a {configs[part]['_class_name']}, but a {cls} is expected"
            )
    where = {part: str(folder / part / "config.json") for part in PREFIXES}
    network = unet.to_ldm(configs["unet"], where["unet"])
    stage = text_encoder.to_stage(configs["text_encoder"], where["text_encoder"])
    _compare_padding(folder / "tokenizer" / "special_tokens_map.json", stage["target"])
    params = {
        **scheduler.to_ldm(_json(schedule_file), str(schedule_file)),
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": network["image_size"],
        "channels": whole(configs["vae"], "latent_channels", where["vae"], 4),
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": number(configs["vae"], "scaling_factor", where["vae"], 0.18215),
        "use_ema": False,
        "unet_config": {"target": UNET, "params": network},
        "first_stage_config": {"target": FIRST_STAGE, "params": vae.to_ldm(configs["vae"], where["vae"])},
        "cond_stage_config": stage,
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


@functools.cache  # said once
def _compare_padding(file: Path, target: str) -> None:
    """Say where a folder's tokenizer fills texts up with another token than the stage does; a folder may lack the file."""
    told = text_encoder.padding_of(_json(file)) if file.is_file() else None
    if told not in (None, text_encoder.PADDING[target]):
        log.warning(
            "%s: texts are filled up with token %d there, and with %d here, as a %s has it: images will differ from diffusers'",
            *(file, told, text_encoder.PADDING[target], target.rpartition(".")[2]),
        )


def read_state(index: Path) -> dict[str, Tensor]:
    """The entries that LDM's checkpoint of the same model has; those that the layout doesn't hold are left out.

    Raises UserError as `configuration` does, and for weights that are missing, damaged, or another network's.
    """
    params = configuration(index)["model"]["params"]
    network, first = params["unet_config"]["params"], params["first_stage_config"]["params"]
    own = {}
    with torch.device("meta"):
        for part in ("unet", "first_stage"):
            own[part] = list(instantiate(params[f"{part}_config"], f"{index}: {part}").state_dict())
    folder, found = index.parent, {}
    names = swapped(unet.names(own["unet"], network["num_res_blocks"]))
    for key, value in _weights(folder / "unet").items():
        found[PREFIXES["unet"] + _known(names, key, folder / "unet")] = value
    levels, weights = len(first["ddconfig"]["ch_mult"]), _weights(folder / "vae")
    first_state = vae.state_to_ldm(weights, own["first_stage"], levels, str(folder / "vae"))
    found |= {PREFIXES["vae"] + key: value for key, value in first_state.items()}
    text = text_encoder.state_to_stage(_weights(folder / "text_encoder"), params["cond_stage_config"]["target"])
    found |= {PREFIXES["text_encoder"] + key: value for key, value in text.items()}
    return {**found, "scale_factor": torch.tensor(float(params["scale_factor"]))}


def autoencoder_folder(path: str | Path) -> Path | None:
    """The folder of an autoencoder that is meant: itself, or that of a whole pipeline; None where `path` is neither."""
    folder = Path(path) / "vae" if (Path(path) / INDEX).is_file() else Path(path)
    return folder if (folder / "config.json").is_file() else None


def autoencoder_params(folder: Path) -> dict[str, Any]:
    """LDM's `first_stage_config.params` of an autoencoder's folder. Raises UserError."""
    config, where = _json(folder / "config.json"), str(folder / "config.json")
    if config.get("_class_name", vae.CLASS) != vae.CLASS:
        raise UserError(f"{where}: is a {config['_class_name']}, but a {vae.CLASS} is expected")
    return vae.to_ldm(config, where)


def read_autoencoder(folder: Path) -> dict[str, Tensor]:
    """The entries of an autoencoder's folder, by diffusers' names. Raises UserError."""
    return _weights(folder)


def betas_of(index: Path) -> np.ndarray:
    """The noise schedule [T] of a folder. Raises UserError as `configuration` does."""
    file = index.parent / "scheduler" / "scheduler_config.json"
    config = _json(file)
    return scheduler.betas_of(scheduler.to_ldm(config, str(file)), config)


def _known(names: Mapping[str, str], key: str, part: Path) -> str:
    if key not in names:
        raise UserError(f"{part}: its entry '{key}' is none of the network that its config.json describes")
    return names[key]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; a pipeline's folder holds {', '.join(PREFIXES)} and scheduler"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read ({reason(error)}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is no JSON object; copy it again")
    return content


def _weights(part: Path) -> dict[str, Tensor]:
    candidates = [part / f"{name}{ending}" for ending in _ENDINGS for name in _FILES]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        there = sorted(file.name for file in part.iterdir() if file.name != "config.json") if part.is_dir() else []
        raise UserError(
            f"{part}: holds no weights ({_FILES[0]}.safetensors or {_FILES[1]}.safetensors), but "
            f"{', '.join(there[:5]) or 'nothing'}"
        )
    if file.suffix != ".json":
        return read_weights(file)
    shards = _json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{file}: its weight_map doesn't name the file of each entry; copy it again")
    state: dict[str, Tensor] = {}
    for shard in sorted({part / Path(shard).name for shard in shards.values()}):
        if not shard.is_file():
            raise UserError(f"{shard}: no such file, which {file.name} names; copy it, too")
        state |= read_weights(shard)
    return state


# ---------------------------------------------------------------- writing


def write_pipeline(folder: Path, model: Any, config: Mapping[str, Any]) -> list[str]:
    """Write a LatentMTDiffusion of text, built by `config`, under a temporary name until it is complete. Returns what was left out.

    Raises UserError for what the layout has no place for, and where the folder can't be written.
    """
    params = config["model"]["params"]
    folder, parts = folder.absolute(), _parts(model, params)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name another --out, or move it")
    temporary = folder.with_name(f".tmp_{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for part, (described, state) in parts.items():
            (temporary / part).mkdir(parents=True)
            name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            _write_json(temporary / part / "config.json", described)
            save_file(state, str(temporary / part / f"{name}.safetensors"), metadata={"format": "pt"})
        (temporary / "scheduler").mkdir()
        schedule = scheduler.to_diffusers(params, model.diffusion.betas)
        _write_json(temporary / "scheduler" / "scheduler_config.json", schedule)
        _write_tokenizer(temporary / "tokenizer", _text_target(model))
        _write_json(temporary / INDEX, _index(schedule["_class_name"]))
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: can't be written ({reason(error)})") from None
    network = model.network.state_dict()
    return sorted({key.partition(".")[0] for key in network.keys() - adm_state_dict(network).keys()})


def _text_target(model: Any) -> str:
    """The name of the text stage. Raises UserError where the model has none of CLIP's."""
    stage = type(getattr(model, "cond_stage_model", None)).__name__
    known = {target.rpartition(".")[2]: target for target in (text_encoder.CLIP, text_encoder.OPEN_CLIP)}
    if stage not in known:
        raise UserError(f"diffusers' {CLASS} draws from text by CLIP: cond_stage_config must be {' or '.join(known)}")
    return known[stage]


def _parts(model: Any, params: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """{part: (its config.json, its entries)}."""
    target = _text_target(model)
    network, first = params["unet_config"]["params"], params["first_stage_config"]["params"]
    if type(model.first_stage_model).__name__ != "AutoencoderKL":
        raise UserError(
            f"diffusers' {CLASS} has an AutoencoderKL: a {type(model.first_stage_model).__name__} has no place there"
        )
    unet_config = unet.to_diffusers(network, model.size)
    first_config = vae.to_diffusers(first, float(model.scale_factor))
    state = adm_state_dict(model.network.state_dict())
    names = unet.names(state, network["num_res_blocks"])
    first_state = {
        key: value for key, value in model.first_stage_model.state_dict().items() if not key.startswith("loss.")
    }
    first_names = vae.names(first_state, len(first["ddconfig"]["ch_mult"]))
    stage = model.cond_stage_model
    used = {key: value for key, value in stage.state_dict().items() if key not in stage.unused}
    text = text_encoder.state_to_transformers(used, target)
    return {
        "unet": (unet_config, {names[key]: value.contiguous() for key, value in state.items()}),
        "vae": (
            first_config,
            {first_names[k]: vae.reshaped(first_names[k], v, linear=True).contiguous() for k, v in first_state.items()},
        ),
        "text_encoder": (
            text_encoder.to_transformers(stage, target),
            {key: value.clone() for key, value in text.items()},
        ),
    }


def _index(schedule: str) -> dict[str, Any]:
    return {
        "_class_name": CLASS,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", schedule],
        "text_encoder": ["transformers", text_encoder.CLASS],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", unet.CLASS],
        "vae": ["diffusers", vae.CLASS],
    }


def _write_tokenizer(folder: Path, target: str) -> None:
    """CLIP's vocabulary as transformers' CLIPTokenizer reads it."""
    folder.mkdir()
    words, merges = vocabulary()
    padding = next(word for word, i in words.items() if i == text_encoder.PADDING[target])
    named = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": padding,
    }
    _write_json(folder / "vocab.json", words)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", named)
    _write_json(
        folder / "tokenizer_config.json",
        {**named, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"},
    )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
