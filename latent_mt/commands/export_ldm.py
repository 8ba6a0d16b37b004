"""Write a run's weights as latent-diffusion's own code loads them: a .ckpt (or .safetensors) without heads and condition inputs.

    mt-diffusion export ldm --model_path runs/camvid_mt --out camvid.ckpt

Beside it stands the YAML file that describes it. Takes runs of diffusion models and of autoencoders; the printed lines say what
was left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from guided_mt.commands.console import keep_inputs, run
from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import adm_state_dict, checkpoint_step, find_weights, read_config
from guided_mt.runs.config import option, parse
from guided_mt.runs.weights import find_state, refuse_not_finite

from ..model.schedules import make_beta_schedule
from ..runs import hugging_face
from ..runs.bare import refuse_transformer
from ..runs.ldm_checkpoint import (
    TRAINING_ONLY,
    LDMCheckpoint,
    kind_of,
    read_ldm,
    read_state_dict,
    schedule_buffers,
    write_ldm,
    write_state,
)
from ..runs.ldm_yaml import check_beside, ldm_yaml, missing_in_ldm, refuse_changed_network, refuse_flow


@dataclass
class ExportConfig:
    """Export"""

    model_path: str = option("", "run folder, checkpoint folder or weights file")
    ema: str = option("", "which averaged weights to write as LDM's, '0.9999' or 'none'; empty: the slowest")
    out: str = option("", "the .ckpt or .safetensors file to write")


def main(argv: Sequence[str]) -> None:
    """Write a run's weights as latent-diffusion's .ckpt. Raises UserError."""
    config = parse(argv, (ExportConfig,), description=__doc__)
    if not config.out:
        raise UserError("--out is missing: the .ckpt file to write")
    keep_inputs(config, config.out)
    raw, averaged = find_weights(config.model_path, "none"), find_weights(config.model_path, config.ema)
    described = check_beside(Path(config.out))
    pipeline = hugging_face.is_pipeline(raw)
    if not pipeline and kind_of(find_state(raw, averaged=config.ema != "none").state) == "autoencoder":
        text = export_autoencoder(averaged, Path(config.out), config.ema != "none")
    else:
        text = export_diffusion(raw, averaged, Path(config.out), config.ema != "none")
    if text:
        described.write_text(text)
        print(f"{described}: the configuration, for latent-diffusion's own code")


def export_diffusion(raw: Path, averaged: Path, out: Path, with_averages: bool) -> str:
    """Write a diffusion model; returns the YAML file's text, '' for a file without a configuration."""
    found = read_ldm(raw, averaged=with_averages)
    saved = hugging_face.configuration(raw) if hugging_face.is_pipeline(raw) else read_config(raw) or {}
    params = (saved.get("model") or {}).get("params") or {}
    refuse_transformer(found.model, raw, "latent-diffusion's code")
    refuse_changed_network(params, raw, "latent-diffusion's code")
    refuse_flow(params, raw)
    exported = LDMCheckpoint(
        adm_state_dict(found.model),
        found.first_stage,
        found.first_stage if params.get("cond_stage_config") == "__is_first_stage__" else found.cond_stage,
        buffers=found.buffers or schedule_buffers(_betas(raw)),
        step=checkpoint_step(raw.parent) if raw.parent.name.startswith("step_") else found.step or 0,
    )
    if not params or params.get("scale_by_std"):  # else LDM takes the number from its YAML file
        exported.scale_factor = found.scale_factor
    if params.get("use_ema", True):
        _add_averages(exported, found, raw, averaged, saved, with_averages)
    # One by one, since their names are alike.
    for part in (exported.model, exported.ema or {}, exported.first_stage, exported.cond_stage):
        refuse_not_finite(part, raw)
    write_ldm(out, exported)
    left = sorted({key.split(".")[0] for key in found.model.keys() - exported.model.keys()} | set(found.unknown))
    parts = f"{len(exported.model)} of the U-Net, {len(found.first_stage)} of the first stage, {len(found.cond_stage)} of the"
    print(f"{out}: step {exported.step} from {raw.parent}, averages from {averaged.name}; tensors: {parts} condition's")
    print(f"left out, since LDM has no place for them: {', '.join(left) or 'nothing'}")
    for what in missing_in_ldm(params):
        print(f"latent-diffusion's code knows of no {what}: Stable Diffusion's does")
    if not params:
        return ""
    roles = exported.model.get("label_emb.weight")
    return ldm_yaml(
        saved,
        scale_factor=None if params.get("scale_by_std") else found.scale_factor,
        unet_config__params__num_classes=None if roles is None else len(roles),
    )


def _add_averages(
    exported: LDMCheckpoint, found: LDMCheckpoint, raw: Path, averaged: Path, saved: Mapping[str, Any], wanted: bool
) -> None:
    """LDM samples with its averages, so without any the weights themselves stand in their place."""
    exported.ema, exported.ema_decay = adm_state_dict(found.model), _rate(averaged)
    exported.ema_updates = -1  # LDM's sign for a fixed decay
    if averaged != raw:
        exported.ema = adm_state_dict(read_ldm(averaged).model)
        if (saved.get("run") or {}).get("ema_warmup"):
            exported.ema_updates = exported.step
    elif found.ema is not None and wanted:  # a file of LDM's has its own
        exported.ema = {**exported.ema, **adm_state_dict(found.ema)}
        exported.ema_decay, exported.ema_updates = found.ema_decay or exported.ema_decay, found.ema_updates


def export_autoencoder(weights: Path, out: Path, with_averages: bool) -> str:
    """Write a first stage; returns the YAML file's text, '' for a file without a configuration."""
    state, beside = read_state_dict(weights, "autoencoder", with_averages)
    kept: dict[str, Tensor] = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    refuse_not_finite(kept, weights)
    step = checkpoint_step(weights.parent) if weights.parent.name.startswith("step_") else beside.get("global_step")
    write_state(out, kept, step)
    left = sorted({key.split(".")[0] for key in state.keys() - kept.keys()})
    print(f"{out}: {len(kept)} tensors of the autoencoder from {weights}")
    print(f"left out, since only training needs it: {', '.join(left) or 'nothing'}")
    saved = read_config(weights) or {}
    return ldm_yaml(saved) if isinstance(saved.get("model"), dict) and saved["model"].get("target") else ""


def _rate(weights: Path) -> float:
    """The rate of an ema_RATE.safetensors; of others LDM's default."""
    try:
        return float(weights.stem.removeprefix("ema_"))
    except ValueError:
        return 0.9999


def _betas(weights: Path) -> Any:
    """betas [T] by the configuration beside the weights. Raises UserError where there is none."""
    config = read_config(weights)
    if config is None:
        raise UserError(
            f"{weights}: has no config.yaml beside it, which says the noise schedule; give the run's folder"
        )
    params = (config.get("model") or {}).get("params") or {}
    if params.get("given_betas") is not None:
        return params["given_betas"]
    chosen = {key: params[key] for key in ("linear_start", "linear_end", "cosine_s") if key in params}
    return make_beta_schedule(params.get("beta_schedule", "linear"), params.get("timesteps", 1000), **chosen)


def console() -> None:
    """The script's door."""
    run(main)
