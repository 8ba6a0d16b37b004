"""Write a model's weights as guided-diffusion's own code loads them, or a transformer's as facebookresearch/DiT's does: a .pt state
dict without heads and inputs of modalities.

    mt-diffusion export adm --model_path runs/first --out first.pt
    mt-diffusion export adm --model_path runs/cityscapes_dit_mt --out dit.pt

Of a latent model with a transformer it is the transformer alone; others are for export ldm. The printed line says what was left
out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..runs.checkpoint import adm_state_dict, find_weights, read_config, read_weights
from ..runs.config import option, parse
from ..runs.recognise import DIT_CLASSES, DIT_PATCHES, LDM_UNET, recognise
from ..runs.weights import refuse_foreign, refuse_not_finite, shapes_of
from .console import keep_inputs, run

# {key of a run: what guided-diffusion's code has, its default first}
KNOWN_TO_ADM = {
    "mt_routing": ("none",),
    "mt_time": ("steps",),
    "noise_schedule": ("linear", "cosine"),
    "prediction": ("eps", "x0", "previous"),
    "beta_schedule": ("linear", "cosine", "sqrt_linear", "sqrt"),  # of latent models, as the next
    "parameterization": ("eps", "x0"),
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
    state = read_weights(weights, averaged=config.ema != "none")
    inside = transformer_in(state)
    saved = read_config(weights) or {}
    settings = {**saved, **((saved.get("model") or {}).get("params") or {})}
    other = {key: settings[key] for key, known in KNOWN_TO_ADM.items() if settings.get(key, known[0]) not in known}
    for key, value in other.items():
        if DIT_PATCHES not in (inside or state):
            raise UserError(
                f"{weights}: was trained with --{key} {value}, which guided-diffusion's code does not have: it would draw "
                "something else"
            )
    if inside is None:
        refuse_foreign(state, weights, "pixel", "classifier", known=True)
    exported = adm_state_dict(state if inside is None else inside)
    refuse_not_finite(exported, weights)
    out = Path(config.out)
    temporary = out.with_name(f".tmp_{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(exported, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        raise UserError(f"--out {out}: can't be written ({error})") from None
    left = sorted({key.split(".")[0] for key in inside or state} - {key.split(".")[0] for key in exported})
    left += [] if inside is None else sorted({key.split(".")[0] for key in state if not key.startswith(LDM_UNET)})
    if other:
        said = ", ".join(f"{key} {value}" for key, value in other.items())
        print(
            f"# trained with {said}: DiT's own code would draw something else; take one that samples so, such as SiT's"
        )
    print(f"{out}: {len(exported)} tensors from {weights}; left out: {', '.join(left) or 'nothing'}")


def transformer_in(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The transformer in a latent model's state dict, or that is a whole file, as DiT's own code has it; None for anything else.

    That code always has classes. A network without any gets one that says nothing: num_classes=1, class_dropout_prob=0, y = 0.
    """
    found = {key.removeprefix(LDM_UNET): value for key, value in state.items() if key.startswith(LDM_UNET)}
    kind = recognise(shapes_of(state))
    if not found and kind is not None and kind.family == "latent":
        found = dict(state)
    if DIT_PATCHES not in found:
        return None
    if DIT_CLASSES not in found:
        found[DIT_CLASSES] = torch.zeros(1, len(found[DIT_PATCHES]))
    return found


def console() -> None:
    """The script's door."""
    run(main)
