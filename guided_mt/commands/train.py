"""Train MT-Diffusion, or one of the single-task models it is compared with (ADM's image_train.py and its flags)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import distributed
from ..checkpoint import checkpoints, read_classes
from ..config import Config, TrainConfig, parse
from ..data import open_source
from ..errors import UserError
from ..tasks import build_diffusion, build_model, run_sections, task_names
from ..train_loop import TrainLoop, batch_sizes
from .console import announce, run


def main(argv: Sequence[str]) -> None:
    config = parse(argv, run_sections(), description=__doc__, presets=True)
    if config.lr_anneal_steps and "total_steps" not in config.given:
        config[TrainConfig].total_steps = config.lr_anneal_steps  # where ADM's loop stops
    validate(config)
    processes = distributed.setup(config.device)
    global_batch, local_batch, microbatch = batch_sizes(config, processes.world_size)
    folder = run_folder(config)
    where = f"{processes.world_size} process(es) by {processes.launcher}, first on {processes.device}"
    sizes = f"{global_batch} images per step: {local_batch} per process, {microbatch} per pass"
    # Built without memory, to refuse flags that don't fit together before anything is read.
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters()) / 1e6
    build_diffusion(config)
    if announce(config, processes, f"run folder {folder}", where, sizes, f"{parameters:.2f} M parameters"):
        return
    source = open_source(config.data_dir, class_names=_saved_classes(folder) if config.class_cond else None)
    _check_classes(config, source)
    loop = TrainLoop(config, processes, source, folder)
    if processes.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(loop.resolved_yaml())
        except OSError as error:
            raise UserError(f"--log_dir {folder}: can't be written ({error.strerror}); name another folder") from None
        print(f"# {len(source)} images, {f'resuming after step {loop.step}' if loop.step else 'starting'}", flush=True)
    loop.run_loop()
    processes.close()


def validate(config: Config) -> None:
    """What can be said of the settings before anything is built. Raises UserError."""
    task_names(config)
    if config.timestep_respacing:
        raise UserError("--timestep_respacing is for sampling; training uses all of --diffusion_steps")
    for rate in config.ema_rate.split(","):
        try:
            inside = 0 <= float(rate) < 1
        except ValueError:
            inside = False
        if not inside:
            raise UserError(
                f"--ema_rate '{config.ema_rate}': write rates between 0 and 1, such as '0.9999' or '0.999,0.9999'"
            )
    if not config.data_dir:
        raise UserError("--data_dir is missing: a folder, .tar or .zip of images, an .npz, or builtin:digits")


def run_folder(config: Config) -> Path:
    if config.log_dir:
        return Path(config.log_dir)
    return Path(os.environ.get("OPENAI_LOGDIR") or f"runs/{config.mt_task}-{config.mt_variant}-{config.image_size}")


def _saved_classes(folder: Path) -> list[str] | None:
    found = checkpoints(folder)
    return read_classes(found[-1]) if found else None


def _check_classes(config: Config, source) -> None:
    if not config.class_cond:
        return
    if source.labels is None:
        raise UserError(
            f"{config.data_dir}: --class_cond True needs classes (sub-folders, or names like CLASS_0001.png)"
        )
    most = int(source.labels.max()) + 1
    if most > config.num_classes:
        raise UserError(f"{config.data_dir}: has {most} classes; raise --num_classes {config.num_classes} to {most}")


def console() -> None:
    run(main)
