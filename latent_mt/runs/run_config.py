"""The `run` section of a YAML file: guided_mt's settings of a training run, with other defaults, and what latent runs add."""

from __future__ import annotations

from dataclasses import dataclass

from guided_mt.runs.config import option, redefined
from guided_mt.runs.loop_config import LoopConfig, TrainConfig


@dataclass
class RunConfig(LoopConfig):
    """Training: the `run` section of a YAML file"""

    log_dir: str = redefined(
        LoopConfig,
        "log_dir",
        help="folder of this run; the same command again resumes it. Empty: runs/NAME of the YAML file",
    )
    total_steps: int = redefined(LoopConfig, "total_steps", 100_000, help="optimiser steps of the whole run")
    log_interval: int = redefined(LoopConfig, "log_interval", 50)
    save_interval: int = redefined(LoopConfig, "save_interval", 5_000)
    ema_rate: str = redefined(LoopConfig, "ema_rate", help="rate of the averaged weights; empty: none")
    ema_warmup: bool = option(
        True,
        "let the averages begin at a low rate, min(ema_rate, (1 + n) / (10 + n)) at step n, as latent-diffusion does",
    )
    weight_decay: float = redefined(LoopConfig, "weight_decay", 0.01)
    sample_interval: int = redefined(TrainConfig, "sample_interval", help="steps between PNG grids; 0: none")
    val_interval: int = option(0, "steps between evaluations on the validation split; 0: none", least=0)
    images_per_step: int = option(
        -1,
        "images per step over all processes; -1: data.params.batch_size * processes * accumulate_grad_batches",
        least=1,
    )
