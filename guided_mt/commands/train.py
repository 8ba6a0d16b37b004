"""Train a model of images and a second kind of data, or one of the single-task models it is compared with.

    mt-diffusion train --preset masked-digits --log_dir runs/first
    mt-diffusion train --preset masked-cifar10 --data_dir images --log_dir runs/mine
    mpiexec -n 8 mt-diffusion train --preset label-imagenet64-m --data_dir imagenet --log_dir runs/labels

The flags are those of guided-diffusion's image_train.py and ours. The same command again goes on where the run was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..generation.build import (
    build_model,
    check_labels,
    check_tasks,
    complete,
    count_classes,
    fit_to_data,
    needs_labels,
    open_images,
    run_sections,
    trained_process,
)
from ..modalities.weighting.settings import check_weighting
from ..runs import distributed
from ..runs.config import Config, parse
from ..runs.loop_config import TrainConfig
from ..runs.processes.claim import Claim
from ..runs.resume import refuse_other_run
from ..training.terms.alignment import check_alignment
from ..training.train_loop import TrainLoop
from .console import announce, run
from .training import check_run, keep_clipping, run_lines, saved_classes, train


def main(argv: Sequence[str]) -> None:
    """Train a model as `argv` says, or go on with it. Raises UserError."""
    config = parse(argv, run_sections(), description=__doc__, presets=True)
    if config.lr_anneal_steps and "total_steps" not in config.typed:
        config[TrainConfig].total_steps = config.lr_anneal_steps  # where ADM's loop stops
    validate(config)
    processes = distributed.setup(config.device)
    folder = run_folder(config)
    refuse_other_run(folder, "pixel", "--log_dir")
    keep_clipping(config, folder)
    # Built without memory, to refuse flags that don't fit together before anything is read.
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters()) / 1e6
    trained_process(config)
    if announce(config, processes, *run_lines(config, processes, folder, parameters), run=folder):
        return
    with processes.sole_writer(Claim(folder)):
        known = saved_classes(folder) if needs_labels(config) else None
        source = open_images(config, known, config.max_pixels)
        announced = config.num_classes
        count_classes(config, source)
        if processes.is_main and config.num_classes != announced:
            print(f"# num_classes {config.num_classes}: that of the data, and not {announced}", flush=True)
        check_labels(config, source)
        for line in fit_to_data(config, source):
            if processes.is_main:
                print(f"# {line}", flush=True)
        train(TrainLoop(config, processes, source, folder))


def validate(config: Config) -> None:
    """What can be said of the settings before anything is built, and what is left open filled in. Raises UserError."""
    check_tasks(config)
    complete(config)
    check_run(config)
    check_weighting(config)
    check_alignment(config)


def run_folder(config: Config) -> Path:
    """The folder of the run: --log_dir, else ADM's OPENAI_LOGDIR, else one named after task, form and image size."""
    if config.log_dir:
        return Path(config.log_dir)
    return Path(os.environ.get("OPENAI_LOGDIR") or f"runs/{config.mt_task}-{config.mt_variant}-{config.image_size}")


def console() -> None:
    """The script's door."""
    run(main)
