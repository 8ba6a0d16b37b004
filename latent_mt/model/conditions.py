"""What a plain latent diffusion model is drawn under: a class, or a text with the text that it is to be unlike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_mt.data.text_file import read_lines
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError
from guided_mt.runs.config import Config, option
from guided_mt.runs.processes.launcher import rank_of_launcher

from .latent_diffusion import LatentMTDiffusion


@dataclass
class TextConfig:
    """Text to image"""

    prompt: str = option("", "what to draw, for a model that is conditioned on text, such as Stable Diffusion")
    prompt_file: str = option(
        "", "a text file with one prompt per line, instead of --prompt; samples take them in turn"
    )
    negative_prompt: str = option(
        "", "what the images are to be unlike, with --guidance_scale above 1; empty: the empty text"
    )
    height: int = option(
        -1, "of the images in pixels; -1: as the YAML file says, which is 512 in Stable Diffusion's", least=1
    )
    width: int = option(-1, "likewise", least=1)


@dataclass(frozen=True)
class Prompts:
    """texts: in turn for samples 0, 1, 2, ...; negative: what all of them are to be unlike."""

    texts: tuple[str, ...]
    negative: str = ""

    def of(self, sample: int) -> str:
        """The text of a sample by its index."""
        return self.texts[sample % len(self.texts)]

    def arrays(self, samples: Sequence[int]) -> dict[str, np.ndarray]:
        """{"prompt": the texts [B] of samples}, for the .npz that holds them."""
        return {"prompt": np.array([self.of(sample) for sample in samples])}


def read_prompts(config: Config) -> Prompts | None:
    """Those of the flags of TextConfig; None without any. Raises UserError for a bad file and for flags that say nothing."""
    if config.prompt and config.prompt_file:
        raise UserError("--prompt and --prompt_file: give one of them")
    if "prompt" not in config.typed and not config.prompt_file:
        if config.negative_prompt:
            raise UserError("--negative_prompt goes with --prompt or --prompt_file")
        return None
    texts = [config.prompt]
    if config.prompt_file:
        texts = read_lines(config.prompt_file, f"--prompt_file {config.prompt_file}")
        if not texts:
            raise UserError(f"--prompt_file {config.prompt_file}: holds no line with a prompt")
    if config.negative_prompt and config.guidance_scale == 1:
        raise UserError("--negative_prompt has no effect with --guidance_scale 1; Stable Diffusion is drawn with 7.5")
    return Prompts(tuple(texts), config.negative_prompt)


def reads_text(model: LatentMTDiffusion) -> bool:
    """Whether the model is conditioned on text."""
    stage = getattr(model, "cond_stage_model", None)
    return model.conditioning_key == "crossattn" and bool(getattr(stage, "reads_text", False))


def check_prompts(model: LatentMTDiffusion, prompts: Prompts | None, class_id: int = -1) -> None:
    """Raises UserError where the flags don't fit the model: a prompt for one that reads none, or none for one that does."""
    if prompts is not None and not reads_text(model):
        raise UserError("--prompt: this model is not conditioned on text (its cond_stage_config has no text encoder)")
    if prompts is None and reads_text(model):
        raise UserError(
            "this model draws what a text says: give it by --prompt TEXT or --prompt_file FILE ('' is a text, too)"
        )
    if prompts is not None and class_id >= 0:
        raise UserError("--class_id is of models that are conditioned on classes; leave it out beside --prompt")
    tokens = getattr(getattr(model, "cond_stage_model", None), "tokens", None)
    if prompts is not None and tokens is not None and rank_of_launcher() == 0:
        tokens([*prompts.texts, prompts.negative])  # says now which are too long


def conditions_of(
    model: LatentMTDiffusion, config: Config, prompts: Prompts | None, samples: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    """LDM's condition for these samples, {} for a model that has none: their prompts, or a class. Raises UserError."""
    if prompts is None:
        return class_condition(model, seeds, config.class_id)
    return text_condition(model, [prompts.of(k) for k in samples], prompts.negative, config.guidance_scale != 1)


@torch.no_grad()
def text_condition(model: LatentMTDiffusion, texts: Sequence[str], negative: str, guided: bool) -> dict[str, Tensor]:
    """LDM's condition for samples of these texts; guided: with that of the text they are to be unlike beside it."""
    stage = model.cond_stage_model
    found = {"c_crossattn": stage(list(texts))}
    return {**found, "c_unconditional": stage([negative])} if guided else found


def latent_size(model: LatentMTDiffusion, height: int, width: int) -> tuple[int, int]:
    """(h, w) of the latents of images of this size in pixels, -1 for the model's own. Raises UserError for a size that its first
    stage and U-Net can't halve as often as they do, and for another than the one of training where modalities have it."""
    scale, step = (
        model.first_stage_model.downsampling,
        model.first_stage_model.downsampling * model.network.size_divisor,
    )
    own = model.size * scale
    wanted = {"height": height if height > 0 else own, "width": width if width > 0 else own}
    for name, pixels in wanted.items():
        if pixels % step:
            below = max(step, pixels // step * step)
            near = f"{below} or {below + step}" if pixels > step else f"{below}"
            raise UserError(f"--{name} {pixels}: must be a multiple of {step} for this model, such as {near}")
        if pixels != own and model.modality_names:
            raise UserError(f"--{name} {pixels}: a model with modalities draws at the size of its training, {own}")
    return wanted["height"] // scale, wanted["width"] // scale


def class_condition(model: LatentMTDiffusion, seeds: Sequence[int], class_id: int) -> dict[str, Any]:
    """LDM's condition for samples: a class, chosen or each sample's own. Raises UserError for other kinds of condition."""
    if model.conditioning_key is None and not model.classes_told:
        if class_id >= 0:
            knows = "is told" if model.network.has_null_class else "knows of"
            raise UserError(f"--class_id {class_id}: this model {knows} no classes; leave the flag out")
        return {}
    stage: Any = getattr(model, "cond_stage_model", None)
    by_class = model.cond_stage_key == "class_label" and model.conditioning_key == "crossattn" and stage is not None
    by_label = (
        model.conditioning_key in (None, "adm") and model.network.num_classes is not None
    )  # ADM's and DiT's own way
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
