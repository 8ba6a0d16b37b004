"""Weights of the tasks against each other: the image, and each modality (docs/method.md, section 7.2).

A row of TASK_WEIGHTINGS makes a `TaskWeighting` of the tasks' names and of the interval of each timestep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from . import on_gradients

UNCERTAINTY_RATE = 0.025  # the learning rate of s in ANT, whatever the network's


class TaskWeighting(nn.Module):
    """Eq. 6 as it stands: the sum of the tasks' objectives. tasks: their names; interval_of: int64 [T]."""

    learning_rate: float | None = None  # of its parameters, where it has some
    least_tasks = 1
    by_interval = False  # whether it weighs by intervals of the timesteps
    solver: on_gradients.Solver | None = (
        None  # the tasks' weights of the Gramian of their gradients, where it asks for that
    )

    def __init__(self, tasks: Sequence[str], interval_of: Tensor):
        super().__init__()
        self.tasks = list(tasks)

    def forward(self, objectives: Mapping[str, Tensor], taught: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """The loss [B] of the objectives {task: [B]} at t [B], the image's first, each as it stands in eq. 6.

        taught {modality: [B]}: 1 where a sample teaches a modality, else 0.
        """
        return sum_of(objectives)

    def factors(self) -> Tensor | None:
        """What each task is multiplied by now, [tasks], in the mean over the intervals; None: 1."""
        return None


class TaskUncertainty(TaskWeighting):
    """Kendall et al. 2018 as in ANT, over intervals and modalities: 1/2 (exp(-s) L + s) with one s for each interval and task.

    s = 0 at first, with a learning rate of its own (UNCERTAINTY_RATE) and no weight decay. Here without the 1/2, which AdamW does
    not see, so that the image starts at 1 and a modality at its lambda: the first step is that of eq. 6.
    """

    learning_rate = UNCERTAINTY_RATE
    by_interval = True
    interval_of: Tensor  # [T]

    def __init__(self, tasks: Sequence[str], interval_of: Tensor):
        super().__init__(tasks, interval_of)
        self.register_buffer("interval_of", interval_of, persistent=False)
        self.s = nn.Parameter(torch.zeros(int(interval_of.max()) + 1, len(self.tasks)))

    def forward(self, objectives: Mapping[str, Tensor], taught: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """As above, with exp(-s) L + s in the place of each objective that a sample is taught."""
        own = self.s[self.interval_of[t]]  # (B, tasks)
        terms = {}
        for k, name in enumerate(self.tasks):
            s = own[:, k]
            terms[name] = torch.exp(-s) * objectives[name] + (taught[name] * s if name in taught else s)
        return sum_of({**objectives, **terms})

    @override
    @torch.no_grad()
    def factors(self) -> Tensor:
        return torch.exp(-self.s).mean(0)


class GradientWeighting(TaskWeighting):
    """Weights that `measure` finds by the tasks' gradients every few steps; between two measurements they stay as they are.

    The weighted sum of the losses has the gradient that the method combines of the tasks' own, where these are taken on the middle
    features. There the Gramian of the gradients is a sum over samples, so parts of a batch and processes add up to it.
    """

    least_tasks = 2
    weights: Tensor  # [tasks]

    def __init__(self, tasks: Sequence[str], interval_of: Tensor):
        super().__init__(tasks, interval_of)
        self.register_buffer("weights", torch.ones(len(self.tasks)))
        assert self.solver is not None
        self.solve = self.solver.load(len(self.tasks))

    def forward(self, objectives: Mapping[str, Tensor], taught: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """As above, each objective times its weight."""
        return sum_of({**objectives, **{name: self.weights[k] * objectives[name] for k, name in enumerate(self.tasks)}})

    @torch.no_grad()
    def measure(self, gramian: Tensor, seed: int) -> None:
        """Take the weights for this Gramian [tasks, tasks]. seed: of what the method draws.

        Where they can't be had, as where a gradient is not finite, the old ones stay. The host waits for the device, once.
        """
        found = on_gradients.solved(self.solve, gramian.cpu().double(), seed)
        if found is not None:
            self.weights.copy_(found)

    @override
    def factors(self) -> Tensor:
        return self.weights


class PCGrad(GradientWeighting):
    """Yu et al. 2020, as torchjd has it: of each task's gradient what points against another task's is taken off, in random order;
    the sum of what is left. Without a conflict all weights are 1."""

    solver = on_gradients.PCGRAD


class Nash(GradientWeighting):
    """Navon et al. 2022 (Nash-MTL), as torchjd has it: weights a with (G a)_k = 1 / a_k, the tasks' bargain.

    A task's step doesn't depend on the scale of its loss, so lambda plays no part. Here scaled to a mean of 1, since AdamW does not
    see a common factor; the authors' clipping of the norm, which rests on that factor, is left out.
    """

    solver = on_gradients.NASH


def sum_of(objectives: Mapping[str, Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    first, *others = objectives.values()
    for other in others:
        first = first + other
    return first


# {name of --mt_task_weighting: (tasks, interval_of) -> the weighting}
TASK_WEIGHTINGS: dict[str, type[TaskWeighting]] = {
    "fixed": TaskWeighting,
    "uncertainty": TaskUncertainty,
    "pcgrad": PCGrad,
    "nash": Nash,
}


def parameter_group(module: nn.Module, learning_rate: float | None) -> list[dict[str, Any]]:
    """The parameters as a group of an optimiser, without weight decay; [] where there are none. learning_rate: None: the run's."""
    parameters = list(module.parameters())
    return [{"params": parameters, "weight_decay": 0.0, "own_lr": learning_rate}] if parameters else []
