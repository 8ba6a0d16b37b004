"""Write a text-to-image model as a folder in the layout of Hugging Face's diffusers, which its StableDiffusionPipeline loads.

    mt-diffusion export diffusers --model_path 768-v-ema.ckpt --config v2-inference-v.yaml --out sd2
    mt-diffusion export diffusers --model_path runs/my_text_model --out my_text_model

Takes what latent-sample takes, where the condition is a text by CLIP: a run, or a checkpoint with its YAML file. Heads and
condition inputs have no place there; the printed lines say what was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from guided_mt.commands.console import keep_inputs, run
from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import find_weights
from guided_mt.runs.config import option, parse

from ..runs.bare import refuse_transformer
from ..runs.hugging_face import write_pipeline
from ..runs.ldm_yaml import refuse_changed_network
from .loading import load_model, read_saved


@dataclass
class ExportConfig:
    """Export"""

    model_path: str = option("", "run folder, checkpoint folder or weights file, such as Stable Diffusion's .ckpt")
    config: str = option("", "YAML file of a foreign --model_path, such as v2-inference.yaml")
    ema: str = option("", "which averaged weights to write, '0.9999' or 'none'; empty: the slowest")
    out: str = option("", "the folder to write")


def main(argv: Sequence[str]) -> None:
    """Write a text-to-image model in diffusers' layout. Raises UserError."""
    config = parse(argv, (ExportConfig,), description=__doc__)
    if not config.out:
        raise UserError("--out is missing: the folder to write")
    keep_inputs(config, config.out)
    weights = find_weights(config.model_path, config.ema)
    saved = read_saved(weights, config.config)
    model = load_model(saved, weights, torch.device("cpu"), averaged=config.ema != "none")
    refuse_transformer(model.network.state_dict(), weights, "diffusers' StableDiffusionPipeline")
    refuse_changed_network(saved["model"].get("params") or {}, weights, "diffusers")
    left = write_pipeline(Path(config.out), model, saved)
    print(f"{config.out}: unet, vae, text_encoder, tokenizer and scheduler of {weights}")
    unused = getattr(model.cond_stage_model, "unused", [])
    if unused:
        print(f"left out of the text encoder, which doesn't use them: {len(unused)} entries, such as {unused[-1]}")
    print(f"left out, since diffusers has no place for them: {', '.join(left) or 'nothing'}")


def console() -> None:
    """The script's door."""
    run(main)
