"""Going on with a run of ADM's own code: `modelNNNNNN.pt` with its `ema_RATE_NNNNNN.pt` and `optNNNNNN.pt` beside it.

As in ADM (train_util.py, classifier_train.py) the step is that of the file's name. What ADM doesn't save, the loss scale of fp16
and the state of a schedule sampler, begins anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..runs.weights import read_state, read_weights, refuse_not_finite
from .ema import Ema
from .optim import Optimizer

_MODEL = re.compile(r"model(\d{6,})\.pt")


@dataclass(frozen=True)
class ADMRun:
    """The files of one step of ADM's: weights, averages {rate: file}, the optimiser's state or None."""

    step: int
    weights: Path
    averages: dict[str, Path]
    optimizer: Path | None

    @classmethod
    def of(cls, weights: Path) -> ADMRun | None:
        """The run that a weights file is from; None for another file, or one that was copied without what lay beside it."""
        match = _MODEL.fullmatch(weights.name)
        if match is None:
            return None
        step, folder = match[1], weights.parent
        averages = {file.name.removeprefix("ema_").rpartition("_")[0]: file for file in folder.glob(f"ema_*_{step}.pt")}
        optimizer = folder / f"opt{step}.pt"
        if not averages and not optimizer.exists():
            return None
        return cls(int(step), weights, averages, optimizer if optimizer.exists() else None)


def named_as_adms(weights: Path) -> bool:
    """Whether ADM would take the step of the run from this file's name."""
    return _MODEL.fullmatch(weights.name) is not None


def go_on(run: ADMRun, model: nn.Module, optimizer: Optimizer, ema: Ema) -> str:
    """Load averages and optimiser of an ADM run whose weights `model` has already; returns what was found, in words.

    An average that ADM kept no file of goes on from the weights, as in ADM. Raises UserError for files that don't fit.
    """
    said = [f"step {run.step} of a run of guided-diffusion"]
    for rate in ema.averages:
        if rate in run.averages:
            state = read_weights(run.averages[rate])
            absent = [name for name in ema.names if name not in state]
            if absent:
                raise UserError(f"{run.averages[rate]}: lacks '{absent[0]}', so it is of another network")
            refuse_not_finite(state, run.averages[rate])
            ema.load(rate, state)
            said.append(run.averages[rate].name)
        else:
            kept = ", ".join(sorted(run.averages)) or "none"
            said.append(f"averages of rate {rate} from the weights (files of: {kept})")
    if run.optimizer is None:
        return ", ".join([*said, "no optimiser's state"])
    names = list(read_weights(run.weights, averaged=False))  # in the order of ADM's parameters
    own = dict(model.named_parameters())
    moments = by_name(
        read_state(run.optimizer), {name: own[name].shape for name in names if name in own}, run.optimizer
    )
    numbers = {name: k for k, name in enumerate(own)}
    state = optimizer.state_dict()["adamw"]
    state["state"] = {numbers[name]: entries for name, entries in moments.items()}
    try:
        optimizer.load_moments(state)
    except UserError as error:
        raise UserError(f"{run.optimizer}: {error}") from None
    return ", ".join([*said, run.optimizer.name])


def by_name(state: Any, shapes: Mapping[str, Sequence[int]], file: Path) -> dict[str, dict[str, Tensor]]:
    """{parameter: {step, exp_avg, exp_avg_sq}} of ADM's optimiser, for parameters of these shapes in ADM's order.

    With fp16 ADM's master weights are two flat tensors, of all vectors and of all others. Raises UserError for another optimiser's.
    """
    entries = state.get("state") if isinstance(state, Mapping) else None
    names = list(shapes)
    groups = [[name for name in names if (len(shapes[name]) <= 1) == vectors] for vectors in (True, False)]
    layout = [[name] for name in names] if entries is not None and len(entries) == len(names) else groups
    if not isinstance(entries, Mapping) or len(entries) != len(layout):
        raise UserError(
            f"{file}: is no optimiser's state of this network; leave it out of the folder to begin with a fresh one"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for number, members in enumerate(layout):
        entry = entries.get(number) or {}
        sizes = [int(torch.Size(shapes[name]).numel()) for name in members]
        for key in ("exp_avg", "exp_avg_sq"):
            if not isinstance(entry.get(key), Tensor) or entry[key].numel() != sum(sizes):
                raise UserError(
                    f"{file}: its entry {number} does not fit '{members[0]}'; leave it out of the folder to begin fresh"
                )
            for name, part in zip(members, entry[key].flatten().split(sizes), strict=True):
                found.setdefault(name, {})[key] = part.reshape(tuple(shapes[name])).float()
        for name in members:
            found[name]["step"] = torch.tensor(float(entry.get("step", 0)))
    return found
