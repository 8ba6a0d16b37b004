"""Train a classifier of noisy images, or go on with the one that a run with --mt_label_head E holds.

    mt-diffusion classifier-train --data_dir builtin:digits --image_size 16 --num_classes 10 --iterations 1000
    mt-diffusion classifier-train --data_dir imagenet --resume_checkpoint runs/e --log_dir runs/e-star

The flags are those of guided-diffusion's classifier_train.py and ours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data import ImageSource, open_source
from ..errors import UserError
from ..generation.noisy_classifier import build_classifier, build_process, saved_settings
from ..runs import distributed
from ..runs.checkpoint import (
    checkpoints,
    classifier_state,
    find_weights,
    read_classes,
    read_config,
    read_weights,
)
from ..runs.config import Config, parse
from ..runs.processes.claim import Claim
from ..runs.resume import refuse_other_run
from ..training.classifier_loop import ClassifierLoop, ClassifierLoopConfig, classifier_run_sections
from .console import announce, rename_flag, run
from .training import check_run, keep_clipping, run_lines, train

ADM_BATCH_SIZE = 4  # per process, where none is given


def main(argv: Sequence[str]) -> None:
    """Train a noisy classifier as `argv` says, or go on with it. Raises UserError."""
    config, classes = resolve(argv)
    check_run(config, averaged=False)
    if config.batch_size < 0 and config.global_batch_size < 0:
        config[ClassifierLoopConfig].batch_size = ADM_BATCH_SIZE
    if config.anneal_lr and not config.lr_anneal_steps:
        config[ClassifierLoopConfig].lr_anneal_steps = config.total_steps
    processes = distributed.setup(config.device)
    folder = run_folder(config)
    # Built without memory, to refuse flags that don't fit together before anything is read.
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_classifier(config).parameters()) / 1e6
    build_process(config)
    if announce(config, processes, *run_lines(config, processes, folder, parameters)):
        return
    with processes.sole_writer(Claim(folder)):
        source = open_classes(config, config.data_dir, classes)
        validation = open_classes(config, config.val_data_dir, source.class_names) if config.val_data_dir else None
        train(ClassifierLoop(config, processes, source, folder, validation))


def resolve(argv: Sequence[str]) -> tuple[Config, list[str] | None]:
    """The configuration, over that of the run in --resume_checkpoint, and the class names by id where they are known."""
    argv = rename_flag(argv, "--iterations", "--total_steps")
    sections = classifier_run_sections()
    first = parse(argv, sections, description=__doc__)
    refuse_other_run(run_folder(first), "classifier", "--log_dir")
    own = checkpoints(run_folder(first))
    if own:
        start = own[-1] / "model.safetensors"
    elif first.resume_checkpoint:
        start = find_weights(first.resume_checkpoint, "none", "--resume_checkpoint")
        classifier_state(read_weights(start, averaged=False), start)  # refuses what holds none before the data are read
    else:
        return first, None
    base = saved_settings(start) if first.resume_checkpoint else {}
    if own:  # runs of version 0.1 began with centre crops where nothing was said
        base |= {"random_crop": (read_config(start) or {}).get("random_crop", False)}
    config = parse(argv, sections, description=__doc__, base=base)
    keep_clipping(config, run_folder(config))
    return config, read_classes(start.parent)


def run_folder(config: Config) -> Path:
    """The folder of the run: --log_dir, else ADM's OPENAI_LOGDIR, else one named after the image size."""
    if config.log_dir:
        return Path(config.log_dir)
    return Path(os.environ.get("OPENAI_LOGDIR") or f"runs/classifier-{config.image_size}")


def open_classes(config: Config, path: str, classes: Sequence[str] | None) -> ImageSource:
    """Images with classes, whose ids are the places in `classes`. Raises UserError for none, unknown or too many."""
    source = open_source(path, class_names=classes, max_pixels=config.max_pixels)
    if source.labels is None:
        raise UserError(
            f"{path}: a classifier needs classes (sub-folders, names like CLASS_0001.png, or arr_1 in an .npz), "
            f"and {source.without_class()} has none"
        )
    lacking = int((source.labels < 0).sum())
    if lacking:
        raise UserError(
            f"{path}: {lacking} of {len(source)} images have no class, which a classifier needs; leave them out"
        )
    most = int(source.labels.max()) + 1
    if most > config.num_classes:
        raise UserError(f"{path}: has {most} classes; raise --num_classes {config.num_classes} to {most}")
    return source


def console() -> None:
    """The script's door."""
    run(main)
