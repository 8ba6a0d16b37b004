"""Train a latent diffusion model, alone or with a second image as a modality.

    python scripts/latent_train.py --config latent_mt/configs/camvid_mt.yaml data.params.path=camvid.tar [key=value ...]

The YAML file has latent-diffusion's shape (model, data, lightning) and a `run` section of ours. The same command again resumes.
"""

from __future__ import annotations

from collections.abc import Sequence

from guided_mt.commands.console import run

from ..model.latent_diffusion import LatentMTDiffusion
from .training import check_first_stage, read_command, train


def main(argv: Sequence[str]) -> None:
    command = read_command(argv, __doc__, LatentMTDiffusion)
    train(command, check=check_first_stage)


def console() -> None:
    run(main)
