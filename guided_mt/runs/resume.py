"""Going on with a run: what is checked before its newest checkpoint is taken up. Raises UserError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, reason
from . import checkpoint
from .distributed import Processes
from .recognise import RUNS, run_family
from .weights import refuse_not_finite


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder; None where there is none."""
    found = checkpoint.checkpoints(folder)
    return found[-1] if found else None


def refuse_other_run(folder: Path, family: str, setting: str) -> None:
    """UserError where `folder` holds checkpoints of another kind of run than `family`, a key of RUNS. setting: how it was named."""
    newest = newest_checkpoint(folder)
    found = run_family(checkpoint.read_config(newest / "model.safetensors") or {}) if newest else ""
    if found not in (family, ""):
        raise UserError(f"{setting} {folder}: is the run of {RUNS[found][0]}; take another folder")


def refuse_other_settings(newest: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], otherwise: str) -> None:
    """UserError where the run in `newest` was saved with other values of `wanted`. otherwise: the way out."""
    different = checkpoint.differing_keys(saved, wanted)
    if different:
        raise UserError(
            f"{newest}: was trained with other settings: {', '.join(different)}; repeat them to resume, or {otherwise}"
        )


def read_average(newest: Path, rate: str, setting: str) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint by their rate. setting: how the user spells `ema_rate`. UserError where it has none."""
    file = newest / f"ema_{rate}.safetensors"
    if not file.exists():
        raise UserError(f"{newest}: has no averaged weights for {setting} {rate}; keep the run's ema_rate")
    state = checkpoint.read_weights(file)
    refuse_not_finite(state, file)
    return state


@contextlib.contextmanager
def fitting(newest: Path) -> Iterator[None]:
    """Inside, what goes wrong when objects take up the checkpoint's training state is told as a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{newest / 'training_state.pt'}: {error}") from None
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{newest / 'training_state.pt'}: does not fit this run ({reason(error)})") from None


def agree_on_step(folder: Path, step: int, processes: Processes) -> None:
    """UserError on all processes where they have reached different steps."""
    reached = processes.all_gather(torch.tensor([step], device=processes.device)).tolist()
    if len(set(reached)) > 1:
        raise UserError(
            f"{folder}: the processes see different checkpoints (steps {reached}); is the folder shared by all?"
        )
