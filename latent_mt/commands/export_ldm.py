"""Write a run's weights as latent-diffusion's own code loads them: a .ckpt (or .safetensors) without heads and condition inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_mt.commands.console import run
from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import adm_state_dict, checkpoint_step, find_weights, read_config
from guided_mt.runs.config import option, parse

from ..model.schedules import make_beta_schedule
from ..runs.ldm_checkpoint import LDMCheckpoint, read_ldm, schedule_buffers, write_ldm


@dataclass
class ExportConfig:
    """Export"""

    model_path: str = option("", "run folder, checkpoint folder or weights file")
    ema: str = option("", "which averaged weights to write as LDM's, '0.9999' or 'none'; empty: the slowest")
    out: str = option("", "the .ckpt or .safetensors file to write")


def main(argv: Sequence[str]) -> None:
    config = parse(argv, (ExportConfig,), description=__doc__)
    if not config.out:
        raise UserError("--out is missing: the .ckpt file to write")
    raw, averaged = find_weights(config.model_path, "none"), find_weights(config.model_path, config.ema)
    found = read_ldm(raw)
    # LDM samples with its averages, so without any the weights themselves stand in their place.
    average = read_ldm(averaged).model if averaged != raw else found.model
    exported = LDMCheckpoint(
        adm_state_dict(found.model),
        found.first_stage,
        found.cond_stage,
        adm_state_dict(average),
        ema_decay=_rate(averaged),
        ema_updates=-1,  # LDM's sign for a fixed decay
        scale_factor=found.scale_factor,
        buffers=found.buffers or schedule_buffers(_betas(raw)),
        step=checkpoint_step(raw.parent) if raw.parent.name.startswith("step_") else found.step or 0,
    )
    write_ldm(config.out, exported)
    left = sorted({key.split(".")[0] for key in found.model.keys() - exported.model.keys()} | set(found.unknown))
    parts = f"{len(exported.model)} of the U-Net, {len(found.first_stage)} of the first stage, {len(found.cond_stage)} of the"
    print(
        f"{config.out}: step {exported.step} from {raw.parent}, averages from {averaged.name}; tensors: {parts} condition's"
    )
    print(f"left out, since LDM has no place for them: {', '.join(left) or 'nothing'}")


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
    run(main)
