"""Flags of the weights, and what they can't go together with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...diffusion.intervals import INTERVALS, timestep_intervals
from ...diffusion.process import GaussianDiffusion
from ...diffusion.resample import SCHEDULE_SAMPLERS, STRATA
from ...diffusion.weighting import LEARNED, TIMESTEP_WEIGHTS
from ...errors import UserError, nearest
from ...runs.config import Config, option
from ..row_config import per_modality
from ..settings import loss_weights, task_names
from .over_tasks import TASK_WEIGHTINGS, GradientWeighting, TaskWeighting, parameter_group
from .over_time import IMAGE, OverTime


@dataclass
class WeightingConfig:
    """Weights of the loss's terms over timesteps and tasks"""

    mt_timestep_weights: str = option(
        "uniform",
        "factors on the modalities' terms by timestep, or one each: masked=min-snr,label=learned",
        names=TIMESTEP_WEIGHTS,
    )
    mt_task_weighting: str = option(
        "fixed",
        "how the image and the modalities are weighed against each other; fixed: by mt_loss_weight alone",
        TASK_WEIGHTINGS,
    )
    mt_task_weighting_interval: int = option(
        25, "steps between measuring the tasks' gradients, for pcgrad and nash", least=1
    )
    mt_timestep_intervals: int = option(
        STRATA, "intervals of the timesteps, for mt_task_weighting uncertainty and schedule_sampler stratified", least=1
    )
    mt_interval_rule: str = option("uniform", "where these intervals end: of equal length, or by log SNR", INTERVALS)


def timestep_rows(config: Config, image: str) -> dict[str, str]:
    """{term: its row of TIMESTEP_WEIGHTS}: the image's as given, then each modality's. Raises UserError for an unknown one."""

    def known(name: str) -> str:
        if name not in TIMESTEP_WEIGHTS:
            raise UserError(
                f"--mt_timestep_weights: '{name}' is none of {', '.join(TIMESTEP_WEIGHTS)}{nearest(name, TIMESTEP_WEIGHTS)}"
            )
        return name

    of_modalities = per_modality(config, "mt_timestep_weights", known, WeightingConfig.mt_timestep_weights)
    return {IMAGE: image, **of_modalities}


def weighed_tasks(config: Config) -> list[str]:
    """The tasks that a weighting weighs: the image, and the modalities whose lambda is not 0."""
    lambdas = loss_weights(config)
    return [IMAGE, *(name for name in task_names(config) if lambdas[name] > 0)]


def check_weighting(config: Config) -> None:
    """Raises UserError for weights that can't be had, and for flags that contradict each other."""
    rows = timestep_rows(config, config.timestep_weights)
    learned = [term for term, row in rows.items() if row == LEARNED]
    flag = f"--{'mt_' if IMAGE not in learned else ''}timestep_weights {LEARNED}" if learned else ""
    if config.mt_task_weighting == "uncertainty":
        flag = "--mt_task_weighting uncertainty"
    if flag and config.schedule_sampler == "loss-second-moment":
        raise UserError(
            f"{flag} with --schedule_sampler loss-second-moment: that draws timesteps by the size of their losses, which "
            "this brings to the same size; take uniform or stratified"
        )
    check_tasks_weighed(config, "--")
    if _uses_intervals(config) and config.mt_timestep_intervals > config.diffusion_steps:
        raise UserError(
            f"--mt_timestep_intervals {config.mt_timestep_intervals}: there are {config.diffusion_steps} timesteps "
            "(--diffusion_steps)"
        )


def check_tasks_weighed(config: Config, key: str) -> None:
    """Raises UserError where the weighting over tasks has too few of them. key: what stands before an option's name."""
    name, tasks = config.mt_task_weighting, weighed_tasks(config)
    least = TASK_WEIGHTINGS[name].least_tasks
    taught = tasks if config.mt_drop_prob < 1 else tasks[:1]
    if len(taught) < least:
        why = f"{key}mt_drop_prob {config.mt_drop_prob:g} teaches" if taught != tasks else "these settings train"
        raise UserError(
            f"{key}mt_task_weighting {name} weighs at least {least} tasks against each other, and {why} the image alone; add a "
            "modality whose weight of the loss is not 0, or take fixed"
        )
    if name == "uncertainty" and len(taught) == 1 and config.mt_timestep_intervals == 1:
        raise UserError(
            f"{key}mt_task_weighting uncertainty: one task and one interval leave nothing to weigh; raise "
            f"{key}mt_timestep_intervals"
        )


def _uses_intervals(config: Config) -> bool:
    """Whether anything is by interval; in latents there is no schedule_sampler."""
    sampler = SCHEDULE_SAMPLERS[getattr(config, "schedule_sampler", "uniform")]
    return TASK_WEIGHTINGS[config.mt_task_weighting].by_interval or sampler.by_interval


def intervals_of(config: Config, diffusion: GaussianDiffusion) -> Tensor:
    """The interval of each timestep of the process, int64 [T]; one for all where nothing is by interval. Raises UserError for more
    intervals than timesteps."""
    count = config.mt_timestep_intervals if _uses_intervals(config) else 1
    try:
        found = timestep_intervals(config.mt_interval_rule, diffusion.alphas_cumprod, count)
    except ValueError as error:
        raise UserError(f"mt_timestep_intervals: {error}") from None
    return torch.from_numpy(found)


class Weighting(nn.Module):
    """The weights of a run, over time and over tasks. Its state dict is what a resumed run has to find again of them; nothing of it
    belongs to the model. Raises UserError where a package is missing."""

    def __init__(self, config: Config, diffusion: GaussianDiffusion):
        super().__init__()
        self.over_time = OverTime(timestep_rows(config, diffusion.timestep_weights), diffusion)
        make = TASK_WEIGHTINGS[config.mt_task_weighting]
        self.over_tasks: TaskWeighting = make(weighed_tasks(config), intervals_of(config, diffusion))

    def parameter_groups(self) -> list[dict]:
        """Its parameters as groups of an optimiser, see `over_tasks.parameter_group`."""
        return [
            *parameter_group(self.over_time, None),
            *parameter_group(self.over_tasks, self.over_tasks.learning_rate),
        ]

    @property
    def on_gradients(self) -> GradientWeighting | None:
        """The weighting over tasks, where it wants to measure gradients."""
        return self.over_tasks if isinstance(self.over_tasks, GradientWeighting) else None

    def columns(self) -> Sequence[str]:
        """The log's columns of `factors`."""
        return (
            [f"task_weight_{task}" for task in self.over_tasks.tasks] if self.over_tasks.factors() is not None else []
        )
