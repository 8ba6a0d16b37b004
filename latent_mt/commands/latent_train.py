"""Train a latent diffusion model: of images alone, or of several images of each item, labels and masked images with them.

    mt-diffusion latent-train --config camvid_mt data.params.path=camvid-256.tar [key=value ...]

The YAML file has latent-diffusion's shape (model, data, lightning) and a `run` section of ours. The same command again resumes.
"""

from __future__ import annotations

from collections.abc import Sequence

from guided_mt.commands.console import run

from .arguments import read_arguments


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv, __doc__)
    # Lightning takes seconds, which --help need not wait for.
    from ..model.latent_diffusion import LatentMTDiffusion
    from ..training.latent_diffusion import LatentTraining
    from .training import check_first_stage, read_command, train

    train(read_command(arguments, LatentMTDiffusion), check=check_first_stage, wrap=LatentTraining)


def console() -> None:
    run(main)
