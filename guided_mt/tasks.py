"""The registry of modalities, and everything that is built from a configuration: model, process and modalities.

A row of TASKS brings a modality's own flags (a dataclass), its class and its head; command line, training, sampling,
checkpoints and tests take it from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .aggregation import WEIGHTS
from .checkpoint import read_config
from .config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig, check_keys, option
from .errors import UserError, nearest
from .gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from .heads import ImageHead
from .modalities import MaskedImage, Modality
from .model import VARIANTS, MTModel
from .respacing import create_gaussian_diffusion
from .unet import UNetModel, create_model


@dataclass
class MaskConfig:
    """Masked images (--mt_task masked)"""

    mask_patch: int = option(-1, "side of a masked patch in pixels; -1: image_size / 4", least=1)
    mask_max_patches: int = option(10, "most patches per image; their number is uniform in 0..this", least=0)
    mask_full_prob: float = option(
        0.1, "share of samples trained with the complete mask; 0 is the paper", least=0, most=1
    )


@dataclass(frozen=True)
class Task:
    """A modality's flags, and how to build it (`variance` is its head's, or None) and its head from a configuration."""

    options: type
    modality: Callable[[Config, Tensor | None], Modality]
    head: Callable[[Config, UNetModel], nn.Module]


def mask_patch(config: Config) -> int:
    """The side of a masked patch in pixels: a quarter of the image (16 at the paper's 64) unless given."""
    return config.mask_patch if config.mask_patch > 0 else max(1, config.image_size // 4)


def _masked_image(config: Config, variance: Tensor | None) -> Modality:
    return MaskedImage(
        patch=mask_patch(config),
        max_patches=config.mask_max_patches,
        full_prob=config.mask_full_prob,
        variance=variance,
    )


TASKS: dict[str, Task] = {
    "masked": Task(MaskConfig, _masked_image, lambda config, unet: ImageHead(unet)),
}


@dataclass
class MTConfig:
    """Multi-modal diffusion"""

    mt_task: str = option("none", f"second kind of data: none or {', '.join(TASKS)}")
    mt_variant: str = option("X", "U: the network sees z_t alone; X: it is also given the second modality", VARIANTS)
    mt_weights: str = option("paper", "aggregation weights w_t", WEIGHTS)
    mt_loss_weight: float = option(0.1, "lambda of eq. 6; 0 trains the purely conditional twin", least=0)
    mt_drop_prob: float = option(0.0, "share of samples trained as pure generation", least=0, most=1)


def model_sections() -> tuple[type, ...]:
    """What a checkpoint has to carry so that the same network, process and modalities can be built again."""
    return (ModelConfig, DiffusionConfig, MTConfig, *(task.options for task in TASKS.values()))


def run_sections() -> tuple[type, ...]:
    """What a training run's config.yaml holds."""
    return (*model_sections(), DataConfig, TrainConfig)


def sampling_may_change() -> set[str]:
    """Keys of `model_sections` that another value than in training makes sense for: they change no weight's meaning."""
    options = {field for task in TASKS.values() for field in task.options.__dataclass_fields__}
    return options | {
        "precision",
        "use_fp16",
        "use_checkpoint",
        "compile",
        "timestep_respacing",
        "dropout",
        "sigma_small",
    }


def saved_config(weights: Path) -> dict[str, Any]:
    """The configuration beside a weights file; empty for a foreign file. Raises UserError for a key that no run has."""
    known = [field for section in run_sections() for field in section.__dataclass_fields__]
    return check_keys(read_config(weights) or {}, known, weights.parent / "config.yaml")


def task_names(config: Config) -> list[str]:
    """The modalities of `--mt_task`. Raises UserError for an unknown one."""
    names = [name.strip() for name in config.mt_task.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in TASKS:
            raise UserError(f"--mt_task: unknown '{name}'{nearest(name, TASKS)}; choose from none, {', '.join(TASKS)}")
    return names


def build_model(config: Config) -> MTModel:
    """The untrained network of a configuration."""
    names = task_names(config)
    model_options = config.as_dict(ModelConfig)
    del model_options["compile"]
    del model_options["use_fp16"]  # parsing has turned it into the precision
    conditions = build_modalities(config) if config.mt_variant == "X" else {}
    factory = partial(
        MTModel,
        heads={name: partial(TASKS[name].head, config) for name in names},
        condition_names=tuple(conditions),
        variant=config.mt_variant if names else "U",
        num_timesteps=config.diffusion_steps,
    )
    condition_channels = sum(modality.condition_channels for modality in conditions.values())
    return create_model(
        **model_options, learn_sigma=config.learn_sigma, condition_channels=condition_channels, factory=factory
    )


def build_diffusion(config: Config, timestep_respacing: str = "") -> GaussianDiffusion:
    """The process of a configuration, on all its timesteps or on those kept by `timestep_respacing`.

    Raises UserError where --diffusion_steps are too few for the schedule.
    """
    steps, schedule = config.diffusion_steps, config.noise_schedule
    most = float(get_named_beta_schedule(schedule, steps).max())
    if most >= 1:  # linear: beta_T = 20 / T, and abar_T would be 0
        raise UserError(
            f"--diffusion_steps {steps} is too small for --noise_schedule {schedule}, whose last beta would be {most:.3g}; "
            f"take at least {int(steps * most) + 1}, or --noise_schedule cosine"
        )
    options: dict[str, Any] = config.as_dict(DiffusionConfig)
    options["steps"] = options.pop("diffusion_steps")
    options["timestep_respacing"] = timestep_respacing
    return create_gaussian_diffusion(**options, mt_weights=dict.fromkeys(task_names(config), config.mt_weights))


def build_modalities(config: Config, model: MTModel | None = None) -> dict[str, Modality]:
    """{name: modality}; with a trained `model` their heads' variances are filled in."""
    tracked = model.head_variance if model is not None else {}
    variances = {name: v.value() for name, v in tracked.items() if bool(v.error_count.any())}
    return {name: TASKS[name].modality(config, variances.get(name)) for name in task_names(config)}
