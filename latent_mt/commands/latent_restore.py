"""Restore masked images with a latent model that was trained with masked images, or with the methods it is compared with.

    mt-diffusion latent-restore --model_path RUN --data_dir images.zip --mask patches:10

Writes what `mt-diffusion restore` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from guided_mt.commands.console import announce, run
from guided_mt.commands.restore import RestoreConfig, join_mask, restore_images, restored_path
from guided_mt.runs import distributed
from guided_mt.runs.config import Config, SampleConfig, parse, redefined

from ..model.generate import LatentGenerator
from .loading import load_generator


@dataclass
class LatentRestoreConfig(SampleConfig):
    """Sampling"""

    clip_denoised: bool = redefined(
        SampleConfig,
        "clip_denoised",
        False,
        "clip the predicted z_0 to [-1, 1]; for a first stage whose latents lie there",
    )


def main(argv: Sequence[str]) -> None:
    config = parse(join_mask(argv), (LatentRestoreConfig, RestoreConfig), description=__doc__)
    processes = distributed.setup(config.device)
    if not announce(config, processes, f"writing {restored_path(config)}"):
        restore_images(config, processes, load)


def load(config: Config, device: torch.device) -> LatentGenerator:
    return load_generator(config.model_path, config.ema, device)


def console() -> None:
    run(main)
