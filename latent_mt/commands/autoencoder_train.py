"""Train a first stage, which turns images into latents and back; of pairs it takes both sides.

    mt-diffusion autoencoder-train --config autoencoder_kl_f8 data.params.path=images [key=value ...]

The YAML file has latent-diffusion's shape (model, data, lightning) and a `run` section of ours. The same command again resumes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from guided_mt.commands.console import run
from guided_mt.errors import UserError

from ..first_stage.first_stages import ConvolutionalAutoencoder
from ..runs.run_config import RunConfig
from .arguments import read_arguments

PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed")


def main(argv: Sequence[str]) -> None:
    arguments = read_arguments(argv, __doc__)
    # Lightning takes seconds, which --help need not wait for.
    from ..training.first_stage import AutoencoderTraining
    from .training import read_command, train

    command = read_command(arguments, ConvolutionalAutoencoder)
    if command.run.weight_decay not in (0, RunConfig().weight_decay):
        raise UserError("run.weight_decay: autoencoders are trained by Adam without weight decay; leave it out")
    command.config["run"]["weight_decay"] = command.run.weight_decay = 0.0
    options = (command.config.get("lightning") or {}).get("trainer") or {}
    if str(options.get("precision", 32)) not in PRECISIONS:
        raise UserError(
            f"lightning.trainer.precision {options['precision']}: first stages are trained with 32 or bf16-mixed, as nothing "
            "scales their losses"
        )
    parts = take_accumulation(command.config)
    train(command, check=check_images, wrap=functools.partial(AutoencoderTraining, microbatches=parts))


def take_accumulation(config: dict[str, Any]) -> int:
    """Takes accumulate_grad_batches of lightning.trainer out, as parts of a larger batch: Lightning has none for two optimisers."""
    options = (config.get("lightning") or {}).get("trainer") or {}
    parts = options.pop("accumulate_grad_batches", None)
    parts = 1 if parts is None else parts
    if type(parts) is not int or parts < 1:
        raise UserError(f"lightning.trainer.accumulate_grad_batches {parts}: write a whole number of 1 or more")
    params = config["data"].get("params") or {}
    if parts > 1 and type(params.get("batch_size")) is int:
        params["batch_size"] *= parts
    return parts


def check_images(model: ConvolutionalAutoencoder, data: Any) -> None:
    """Raises UserError where the first stage can't be trained on the data."""
    if getattr(data, "latents", None):
        raise UserError("data.params.latents: a first stage is trained on images; leave it out")
    model.check_size(data.image_size, data.image_size)
    channels, out = model.in_channels, model.ddconfig.out_ch
    if channels != 3 or out != channels:
        raise UserError(f"ddconfig: in_channels {channels} and out_ch {out} must be 3 for images as they are read here")


def console() -> None:
    run(main)
