"""Write a model's weights as guided-diffusion's own code loads them, or a transformer's as facebookresearch/DiT's does: a .pt state
dict without heads and inputs of modalities.

    mt-diffusion export adm --model_path runs/first --out first.pt

The printed line says what was left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..runs.checkpoint import adm_state_dict, find_weights, read_config, read_weights
from ..runs.config import option, parse
from ..runs.weights import refuse_foreign, refuse_not_finite
from .console import keep_inputs, run

# {key of a run: what guided-diffusion's code has, its default first}
KNOWN_TO_ADM = {
    "mt_routing": ("none",),
    "mt_time": ("steps",),
    "noise_schedule": ("linear", "cosine"),
    "prediction": ("eps", "x0", "previous"),
}


@dataclass
class ExportConfig:
    """Export"""

    model_path: str = option("", "run folder, checkpoint folder or weights file")
    ema: str = option("", "which averaged weights to use, '0.9999' or 'none'; empty: the slowest")
    out: str = option("", "the .pt file to write")


def main(argv: Sequence[str]) -> None:
    """Write a run's weights as the backbone's own code loads them. Raises UserError."""
    config = parse(argv, (ExportConfig,), description=__doc__)
    if not config.out.endswith(".pt"):
        raise UserError(
            f"--out {config.out}: the name must end in .pt" if config.out else "--out is missing: the .pt file to write"
        )
    keep_inputs(config, config.out)
    weights = find_weights(config.model_path, config.ema)
    saved = read_config(weights) or {}
    for key, known in KNOWN_TO_ADM.items():
        if saved.get(key, known[0]) not in known:
            raise UserError(
                f"{weights}: was trained with --{key} {saved[key]}, which guided-diffusion's code does not have: it would draw "
                "something else"
            )
    state = read_weights(weights, averaged=config.ema != "none")
    refuse_foreign(state, weights, "pixel", "classifier", known=True)
    exported = adm_state_dict(state)
    refuse_not_finite(exported, weights)
    out = Path(config.out)
    temporary = out.with_name(f".tmp_{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(exported, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        raise UserError(f"--out {out}: can't be written ({error})") from None
    left = sorted({key.split(".")[0] for key in state} - {key.split(".")[0] for key in exported})
    print(f"{out}: {len(exported)} tensors from {weights}; left out: {', '.join(left) or 'nothing'}")


def console() -> None:
    """The script's door."""
    run(main)
