"""Do the tasks pull the shared network the same way? The picture of positive and negative transfer (appendix E.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from ...runs.distributed import Processes


def conflict_names(tasks: Sequence[str]) -> list[str]:
    """The names of what `task_conflict` measures."""
    return [f"grad_norm_{task}" for task in tasks] + [f"grad_cos_{a}_{b}" for a, b in combinations(tasks, 2)]


def task_conflict(
    objectives: Mapping[str, Tensor],
    shared: Sequence[nn.Parameter],
    processes: Processes,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Norm of each objective's gradient on the parameters `shared`, and the cosine of each pair, 0-dim on the device.

    objectives {task: mean loss of this process's images, weighted as in the whole loss}; gradients are averaged over processes.
    scale: that of the loss in fp16, where small gradients would else be lost. The parameters' own .grad stay as they are.
    """
    gradients = {}
    for task, objective in objectives.items():
        parts = torch.autograd.grad(scale(objective), shared, retain_graph=True, materialize_grads=True)
        factor = scale(torch.ones_like(objective))
        gradients[task] = processes.mean(torch.cat([part.flatten() for part in parts])) / factor
    norms = {task: gradient.norm() for task, gradient in gradients.items()}
    found = {f"grad_norm_{task}": norm for task, norm in norms.items()}
    for a, b in combinations(gradients, 2):
        found[f"grad_cos_{a}_{b}"] = gradients[a] @ gradients[b] / (norms[a] * norms[b]).clamp(min=1e-30)
    return found
