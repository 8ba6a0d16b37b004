"""Settings of a training run. They come in by two doors: flags (guided_mt), and the `run` section of a YAML file (latent_mt).

What every run has stands in `LoopConfig` alone; a door adds what only it has, and may say another default by `redefined`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..diffusion.resample import SCHEDULE_SAMPLERS
from ..networks.alignment import ALIGNMENTS
from .config import option


@dataclass
class LoopConfig:
    """Training of anything"""

    log_dir: str = option(
        "", "folder of this run; the same command again resumes it. Empty: $OPENAI_LOGDIR or runs/TASK-SIZE"
    )
    total_steps: int = option(
        1_000_000,
        "optimiser steps of the whole run; where only lr_anneal_steps is given, that many, as in ADM",
        least=1,
    )
    log_interval: int = option(10, "steps between log lines", least=1)
    save_interval: int = option(10_000, "steps between checkpoints", least=1)
    keep_checkpoints: int = option(0, "how many checkpoints to keep; 0: all", least=0)
    ema_rate: str = option("0.9999", "comma-separated rates of the averaged weights")
    ema_device: str = option(
        "same",
        "where the averages are kept: same, beside the weights, or cpu, which every step waits for",
        ("same", "cpu"),
    )
    ema_dtype: str = option("fp32", "how the averages are kept; bf16 takes half the memory", ("fp32", "bf16"))
    lr_warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "weight decay of AdamW", least=0)
    grad_clip: float = option(
        0.0, "largest norm of the gradient; 0: no clipping, as in ADM and latent-diffusion", least=0
    )
    seed: int = option(0, "seed of initialisation, data order, noise and masks", least=0, most=2**32 - 1)


@dataclass
class FlagLoopConfig(LoopConfig):
    """Training of any network (ADM's flags)"""

    batch_size: int = option(-1, "images per process and pass; -1: global_batch_size / processes", least=1)
    global_batch_size: int = option(-1, "images per step over all processes; -1: batch_size * processes", least=1)
    microbatch: int = option(-1, "images per forward pass, accumulating gradients; -1: batch_size", least=1)
    lr: float = option(1e-4, "learning rate of AdamW", least=0)
    lr_anneal_steps: int = option(0, "steps over which the rate falls linearly to 0; 0: constant", least=0)
    schedule_sampler: str = option("uniform", "how training timesteps are drawn", SCHEDULE_SAMPLERS)
    fp16_scale_growth: float = option(1e-3, "growth per step of log2 of the fp16 loss scale", least=0)
    resume_checkpoint: str = option("", "weights to start from: an ADM .pt, a run, a checkpoint or a weights file")
    device: str = option("", "cpu, cuda, cuda:1 ...; empty: a GPU if there is one")
    dry_run: bool = option(False, "print the resolved configuration and the model's size, then stop")


@dataclass
class TrainConfig(FlagLoopConfig):
    """Training"""

    sample_interval: int = option(0, "steps between PNG grids of samples and restorations; 0: none", least=0)


@dataclass
class AlignmentConfig:
    """Alignment of the middle features with those of a frozen encoder"""

    align: str = option(
        "none",
        "what the middle features predict of the clean image's: repa, through three layers at each position; irepa, through a "
        "convolution, and spatially normalised",
        ALIGNMENTS,
    )
    align_encoder: str = option(
        "",
        "the frozen encoder: classifier:RUN_OR_FILE, the middle features of a noisy classifier at timestep 0, or efficientnet, "
        "EfficientNet-Lite0 of two packages of PyPI",
    )
    align_weight: float = option(0.5, "weight of the term, 1 minus the cosine, in the loss", least=0)
    align_width: int = option(2048, "repa: width of the projector", least=1)
    align_gamma: float = option(1.0, "irepa: how much of the mean over positions is taken off", least=0, most=1)
