"""A trained latent model from its weights and the configuration beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError
from guided_mt.runs import precision
from guided_mt.runs.checkpoint import find_weights, read_classes, read_config
from guided_mt.runs.processes.launcher import rank_of_launcher

from ..model.generate import LatentGenerator
from ..model.latent_diffusion import LatentMTDiffusion
from ..runs.configuration import load_config
from ..runs.ldm_checkpoint import load_ldm, read_state_dict
from ..runs.targets import instantiate


def read_saved(weights: Path, file: str | None = None) -> dict[str, Any]:
    """The configuration of the run that the weights lie in, or that of `file`. Raises UserError where there is none.

    file: what the command's --config names; None for a command that has no such flag.
    """
    if not file and read_config(weights, "latent") is None:
        read_state_dict(weights, "diffusion", lazily=True)  # says what a file of another kind is
        way = ", or name it by --config FILE" if file is not None else ""
        raise UserError(
            f"{weights}: has no config.yaml beside it; copy the YAML file that describes it there under that name{way}"
        )
    return load_config(file or weights.parent / "config.yaml")


def load_model(
    saved: Mapping[str, Any], weights: Path, device: torch.device, averaged: bool = True
) -> LatentMTDiffusion:
    """The trained model, ready to draw from. averaged: take the averages of a foreign file. Raises UserError."""
    # Another kind of file is told before the model is built.
    read_state_dict(weights, "diffusion", averaged, lazily=True)
    # The weights file holds the first stage too: where either began is not read again.
    params = _without_file(saved["model"].get("params"))
    stage = params.get("first_stage_config")
    if isinstance(stage, Mapping):
        params["first_stage_config"] = {**stage, "params": _without_file(stage.get("params"))}
    model = instantiate({"target": saved["model"]["target"], "params": params}, "model")
    if not isinstance(model, LatentMTDiffusion):
        raise UserError(f"{weights}: is no latent diffusion model but {saved['model']['target']}")
    found = load_ldm(model, weights, ema=averaged)
    lacking = model.network.state_dict().keys() - found.model.keys() - (found.ema or {}).keys()
    if lacking:
        raise UserError(
            f"{weights}: has no heads or condition inputs ({len(lacking)} entries, such as '{min(lacking)}'), as "
            "latent-diffusion's own models have none: take mt_sides and mt_tasks out of the YAML file, or give a run's own weights"
        )
    return model.to(device).to_fast_layout().eval().requires_grad_(False)


def settle_precision(model: LatentMTDiffusion) -> LatentMTDiffusion:
    """The model with the network's arithmetic chosen for the device that it is on; the main process says where it changes."""
    network, device = model.network, model.scale_factor.device
    network.precision, lines = precision.choose(network.precision, device, typed=False)
    for line in lines if rank_of_launcher() == 0 else ():
        print(f"# {line}", flush=True)
    return model


def _without_file(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (params or {}).items() if key != "ckpt_path"}


def load_generator(path: str, ema: str, device: torch.device, file: str | None = None) -> LatentGenerator:
    """What draws from the model of `path`. ema: as `--ema`; file: see `read_saved`. Raises UserError."""
    weights = find_weights(path, ema)
    model = settle_precision(load_model(read_saved(weights, file), weights, device, averaged=ema != "none"))
    return LatentGenerator(model, classes=read_classes(weights.parent))


def class_condition(model: LatentMTDiffusion, seeds: Sequence[int], class_id: int) -> dict[str, Any]:
    """LDM's condition for samples: a class, chosen or each sample's own. Raises UserError for other kinds of condition."""
    if model.conditioning_key is None and (model.sides or model.network.num_classes is None):
        if class_id >= 0:
            raise UserError(f"--class_id {class_id}: this model knows of no classes; leave the flag out")
        return {}
    stage: Any = getattr(model, "cond_stage_model", None)
    by_class = model.cond_stage_key == "class_label" and model.conditioning_key == "crossattn" and stage is not None
    by_label = model.conditioning_key in (None, "adm") and model.network.num_classes is not None  # ADM's own way
    if not by_class and not by_label:
        raise UserError(
            f"this model is conditioned on {model.cond_stage_key} ({model.conditioning_key}), which has no flag; in Python, pass "
            "it as `conditions` of LatentGenerator.pairs"
        )
    count: int = stage.embedding.num_embeddings if by_class else model.network.num_classes or 0
    if class_id >= count:
        raise UserError(f"--class_id {class_id}: this model has classes 0 to {count - 1}")
    own = SampleStreams(
        torch.as_tensor(list(seeds)), index=Stream.LATENT_CLASS, device=model.scale_factor.device
    ).integers(count)
    classes = own if class_id < 0 else torch.full_like(own, class_id)
    return {"c_crossattn": stage({stage.key: classes})} if by_class else {"y": classes}
