"""A trained latent model from its weights and the configuration beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from guided_mt.data import ImageSource
from guided_mt.errors import UserError
from guided_mt.networks.inputs import PRECISIONS
from guided_mt.runs import precision
from guided_mt.runs.checkpoint import find_weights, read_classes, read_config
from guided_mt.runs.config import Config
from guided_mt.runs.processes.launcher import rank_of_launcher

from ..data import StreamedData
from ..model.generate import LatentGenerator
from ..model.latent_diffusion import LatentMTDiffusion
from ..runs import hugging_face
from ..runs.configuration import load_config
from ..runs.ldm_checkpoint import load_ldm, read_state_dict
from ..runs.targets import instantiate


def read_saved(weights: Path, file: str | None = None) -> dict[str, Any]:
    """The configuration of the run that the weights lie in, or that of `file`. Raises UserError where there is none.

    file: what the command's --config names; None for a command that has no such flag.
    """
    if not file and hugging_face.is_pipeline(weights):
        return hugging_face.configuration(weights)
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
    own = weights.parent.name.startswith("step_")  # a run's, which was begun from a file with these keys
    found = load_ldm(model, weights, () if own else params.get("ignore_keys") or (), ema=averaged)
    lacking = model.network.state_dict().keys() - found.model.keys() - (found.ema or {}).keys()
    if lacking:
        raise UserError(
            f"{weights}: has no heads or condition inputs ({len(lacking)} entries, such as '{min(lacking)}'), as "
            "latent-diffusion's own models have none: take mt_sides and mt_tasks out of the YAML file, or give a run's own weights"
        )
    return model.to(device).to_fast_layout().eval().requires_grad_(False)


def settle_precision(model: LatentMTDiffusion, wanted: str = "") -> LatentMTDiffusion:
    """The model with the network's arithmetic chosen for the device that it is on; the main process says where it changes.

    wanted: what the user asks for, '' for the model's own. Raises UserError for another word.
    """
    network, device = model.network, model.scale_factor.device
    if wanted and wanted not in PRECISIONS:
        raise UserError(f"--precision {wanted}: choose from {', '.join(PRECISIONS)}")
    network.precision, lines = precision.choose(wanted or network.precision, device, typed=bool(wanted))
    # CPUs imitate it; GPUs are what it is there for.
    if not wanted and network.precision == "fp16" and device.type == "cpu":
        network.precision, lines = "fp32", ["precision fp32 and not fp16, which is for GPUs"]
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


def open_split(config: Config, saved: Mapping[str, Any]) -> tuple[ImageSource, int]:
    """(the data of the split, their size in pixels). Raises UserError."""
    data = saved.get("data") or {}
    params = {**(data.get("params") or {}), "latents": None, "limit": None}
    if config.data_dir:
        params["path"] = config.data_dir
    opened = instantiate({"target": data.get("target"), "params": params}, "data")
    if not isinstance(opened, StreamedData):
        raise UserError(f"{data.get('target')}: the data of this run can't be opened anew")
    split = config.split or opened.splits[1] or opened.splits[0]
    return opened.pixel_source(split), opened.image_size
