"""The tasks' gradients on the features that they share, and what torchjd makes of them (the extra `tasks`)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError, how_to_install

Solve = Callable[[Tensor], Tensor]  # the Gramian of K gradients, float64 [K, K] on the host -> their weights [K]

NASH_TOLERANCE = 0.05  # by how much (G a)_k a_k may differ between tasks, as a share of their mean


@dataclass(frozen=True)
class Solver:
    """name: of --mt_task_weighting. packages: what it needs. make(K): the rule for K tasks."""

    name: str
    packages: Sequence[str]
    make: Callable[[int], Solve]

    def load(self, tasks: int) -> Solve:
        """The rule for so many tasks. Raises UserError where a package is missing."""
        for package in self.packages:
            try:
                __import__(package)
            except ImportError:
                raise UserError(
                    f"mt_task_weighting {self.name}: the package {package} is missing: {how_to_install(package)}"
                ) from None
        return self.make(tasks)


def _pcgrad(tasks: int) -> Solve:
    from torchjd.aggregation import PCGradWeighting

    return PCGradWeighting()


def _nash(tasks: int) -> Solve:
    from torchjd.aggregation import NashMTL

    def solve(gramian: Tensor) -> Tensor:
        # The bargain of gradients of length 1, whose weights then take up the lengths: the solver meets numbers of one size.
        lengths = gramian.diagonal().sqrt()
        if not bool((lengths > 0).all()):  # a task that can gain nothing, as where its output layer is still zero
            return torch.full_like(lengths, torch.nan)
        values, vectors = torch.linalg.eigh(gramian / lengths[:, None] / lengths)
        gradients = vectors * values.clamp(min=0).sqrt()  # rows with this Gramian
        # A new one each time: its warm start would be a state that a resumed run lacks.
        weights = NashMTL(tasks, max_norm=0.0).weighting(gradients) / lengths
        gains = weights * (gramian @ weights)
        agreed = (gains - gains.mean()).abs().max() <= NASH_TOLERANCE * gains.mean().abs()
        return weights * (tasks / weights.sum()) if bool(agreed) else torch.full_like(weights, torch.nan)

    return solve


PCGRAD = Solver("pcgrad", ("torchjd",), _pcgrad)
NASH = Solver("nash", ("torchjd", "cvxpy", "ecos"), _nash)


def solved(solve: Solve, gramian: Tensor, seed: int) -> Tensor | None:
    """The weights [K] of a Gramian [K, K]; None where it, or they, are not finite and positive."""
    if not bool(torch.isfinite(gramian).all()) or not bool(gramian.diagonal().any()):
        return None
    scaled = gramian / gramian.diagonal().max()  # the weights are the same, and the solver sees numbers of size 1
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's advice to those who wrote the problem
        torch.manual_seed(seed)
        weights = solve(scaled)
    usable = bool((torch.isfinite(weights) & (weights >= 0)).all()) and bool(weights.any())
    return weights if usable else None


@contextlib.contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the module returns in passes that have a gradient is kept in the list."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            kept.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def gramian_of(
    objectives: Mapping[str, Tensor], features: Tensor, scale: Callable[[Tensor], Tensor] = lambda loss: loss
) -> Tensor:
    """Inner products of the gradients of K objectives, 0-dim each, on the features [B, ...] that they share: [K, K].

    scale: that of the loss in fp16, where small gradients would else be lost.
    """
    rows = []
    for objective in objectives.values():
        (gradient,) = torch.autograd.grad(
            scale(objective), features, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(gradient.float().flatten() / scale(torch.ones_like(objective)))
    gradients = torch.stack(rows)
    return gradients @ gradients.T
