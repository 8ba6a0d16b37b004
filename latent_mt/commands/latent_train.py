"""Train a latent diffusion model, alone or with a second image as a modality.

    python scripts/latent_train.py --config latent_mt/configs/camvid_mt.yaml data.params.path=camvid.tar [key=value ...]

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
