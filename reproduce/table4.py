"""The paper's Table 4: one side of a pair from the other, by a single-task model and by MT-Diffusion at equal budget.

    mt-diffusion table4 --preset camvid --autoencoder runs/autoencoder_kl_camvid data.params.path=camvid-256.tar
                        [--run runs/table4] [--seeds 0,1,2] [--sample_steps 25] [--latents FOLDER] [key=value ...]

Every seed trains RUN/NAME_single-SEED and RUN/NAME_mt-SEED as `latent-train` does, with `key=value` over both YAML files; what
is finished is left as it is, and the same command goes on with what is not. Then the validation split is translated as
`latent-sample` does it, whose flags are taken too. camvid and cityscapes: maps of photos, scored as `score segmentation`
does; daynight and night2day: day of night, scored by PSNR, SSIM, mean absolute error, FID and Inception Score. The last row is
the first stage alone: what is left of the true images after it has encoded and decoded them. Writes RUN/table4.md and .json.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from evaluations.errors import EvaluationError
from guided_mt.commands.console import rename_flag, run, split_flags
from guided_mt.errors import UserError, nearest
from guided_mt.runs.config import parse
from guided_mt.runs.processes.launcher import started
from latent_mt.commands.latent_sample import TranslateConfig
from latent_mt.model.generate import LatentSampleConfig

from .seeds import training_seeds
from .table4_presets import PRESETS

SET_HERE = ("run.log_dir", "run.seed")
SAMPLING = tuple(  # flags of latent-sample that are passed on
    field.name
    for section in (LatentSampleConfig, TranslateConfig)
    for field in dataclasses.fields(section)
    if field.name not in ("model_path", "out", "seeds", "dry_run", "config", "given", "route", "split", "class_id")
)


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, with `sampling`, words for latent-sample, and `overrides`, key=value. Raises UserError."""
    sampling, rest = split_flags(rename_flag(argv, "--sample_steps", "--steps"), SAMPLING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--preset", default="", metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--run", type=Path, default=Path("runs/table4"), help="folder of all that is written")
    parser.add_argument("--seeds", default="0,1,2", help="training seeds")
    parser.add_argument("--autoencoder", default="", help="first stage: run of autoencoder-train, or weights file")
    parser.add_argument("--latents", default="", help="folder of encode, written where it is missing")
    parser.add_argument("--inception", default="", metavar="FILE", help="Inception's weights, for FID and IS")
    parser.add_argument("--no_train", action="store_true", help="only sample and score runs that are finished")
    parser.add_argument("--dry_run", action="store_true", help="say what is left to train, then stop")
    parser.add_argument("--sample_steps", metavar="N", help="sampling steps (50); so are all flags of latent-sample")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of both YAML files")

    def refuse(message: str) -> None:
        raise UserError(message)

    parser.error = refuse
    arguments, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--")
        flags = [*SAMPLING, "sample_steps", *vars(arguments)]
        raise UserError(f"unknown flag --{name}{nearest(name, flags)}; --help lists all")
    if arguments.preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"--preset '{arguments.preset}' is none of {known}{nearest(arguments.preset, PRESETS)}")
    arguments.seeds, arguments.sampling = training_seeds(arguments.seeds), sampling
    for word in arguments.overrides:
        if word.partition("=")[0] in SET_HERE:
            raise UserError(f"{word}: is set by table4; use --run and --seeds")
    parse(sampling, (LatentSampleConfig, TranslateConfig), description="")  # before hours of training
    return arguments


def main(argv: Sequence[str]) -> None:
    """Make Table 4 as `argv` says. Raises UserError."""
    arguments = read_arguments(argv)
    if not started().alone:
        raise UserError("table4 is one process: train with several by latent-train, then start this by itself")
    # Lightning takes seconds, which --help need not wait for.
    from .table4_stages import Table4

    preset = PRESETS[arguments.preset]
    try:
        Table4(preset, arguments, shlex.join(["mt-diffusion", "table4", *argv])).main()
    except EvaluationError as error:
        raise UserError(str(error)) from None


def console() -> None:
    """The script's door."""
    run(main)
