"""The losses of every form on one batch of the loop, and their gradients, against a network in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.training.train_loop import TrainLoop

from ..forms import COMPARED, FORMS, TINY, batches, make_loop
from ..runner import Stage, within
from .arithmetic import FLOAT32, as_double, distance, float64, joined, precisions

# The bound divides small differences by small variances, and timesteps go up to 1000: see arithmetic.MAX_TIMESTEP.
LOSS_FACTOR = 4.0
FP16_SCALE = 2.0**12  # of the loss, as the optimiser's: gradients of a mean over pixels are too small for fp16
TIMESTEPS = 1000


def run(stage: Stage) -> None:
    for form in FORMS:
        stage.check(f"loss: {form}", lambda form=form: compare(form, stage), 3.0)


def compare(form: str, stage: Stage) -> dict[str, Any]:
    """The relative errors of the loss of each sample, of its terms, and of the gradient."""
    size = TINY if stage.tiny else COMPARED.with_batch(8)
    cpu = make_loop(form, size, torch.device("cpu"), stage.folder)
    batch = batches(cpu, 1)[0]
    loop = make_loop(form, size, stage.device, stage.folder) if stage.device.type == "cuda" else cpu
    found: dict[str, Any] = {}
    measured = {}
    for precision in precisions(stage.device)[: 1 if stage.tiny else None]:  # on a CPU `networks` has the others
        with precision.active(loop.model):
            _prepare(loop)
            scale = FP16_SCALE if precision.flag == "fp16" else 1.0
            measured[precision] = _losses(loop, batch.to(stage.device), scale)
    widen(cpu.model)
    with float64():
        _prepare(cpu)
        reference, slope = _losses(cpu, batch)
    for precision, (losses, gradient) in measured.items():
        allowed = LOSS_FACTOR * (precision.tolerance(cpu.model) + TIMESTEPS * FLOAT32)
        for name, values in losses.items():
            found[f"{precision.name} {name}"] = distance(values, reference[name])
            within(found[f"{precision.name} {name}"], allowed, **found)
        found[f"{precision.name} gradient"] = distance(gradient, slope)
        allowed = LOSS_FACTOR * (precision.tolerance(cpu.model, backward=True) + TIMESTEPS * FLOAT32)
        within(found[f"{precision.name} gradient"], allowed, **found)
    return found


def _prepare(loop: TrainLoop) -> None:
    for modality in loop.modalities.values():
        modality.before_step(0, loop.processes)


def widen(model: nn.Module) -> None:
    """Turn a network to float64, whatever it is called with."""
    forward = model.double().forward

    def widened(z: Tensor, t: Tensor, modalities: dict[str, Tensor], **options: Any) -> Any:
        return forward(as_double(z), t, {name: as_double(x) for name, x in modalities.items()}, **options)

    model.forward = widened  # type: ignore[method-assign]


def _losses(loop: TrainLoop, batch: Any, scale: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    """({name: values of each sample}, gradient of the mean loss). scale: of the loss in the backward pass."""
    loop.model.zero_grad(set_to_none=True)
    loss, record = loop.losses(batch, slice(0, len(batch.images)))
    (loss * scale).backward()
    gradient = joined(p.grad for _, p in sorted(loop.model.named_parameters()) if p.grad is not None) / scale
    return {name: record.rows(name)[0] for name in ("loss", *loop.terms)}, gradient
