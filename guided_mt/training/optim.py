"""AdamW with gradient clipping, the fp16 loss scale, and skipped non-finite steps, without a wait for the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..runs.processes.shards import divided, total_norm
from ..runs.skipped import SkippedSteps
from ..runs.weights import is_finite

INITIAL_LOG2_SCALE = 20.0  # ADM's INITIAL_LOG_LOSS_SCALE


class Optimizer:
    """Fused AdamW. A step whose gradient is not finite changes nothing but the counts of `skipped`.

    beside: further groups of parameters, with a `weight_decay` of their own, and `own_lr`, a learning rate of their own, or None.
    fp16: scale the loss by 2^s; s grows by `scale_growth` per good step, falls by 1 per bad one (ADM), and never below 0.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        weight_decay: float = 0.0,
        grad_clip: float = 0.0,
        fp16: bool = False,
        scale_growth: float = 1e-3,
        beside: Sequence[dict[str, Any]] = (),
    ):
        groups = [{"params": list(parameters)}, *beside]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, fused=True)
        self.grad_clip, self.fp16, self.scale_growth = grad_clip, fp16, scale_growth
        device = self.parameters[0].device
        self.log2_scale = torch.tensor(INITIAL_LOG2_SCALE if fp16 else 0.0, device=device)
        self.skipped = SkippedSteps(device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the current loss scale of fp16; the loss itself in other precisions."""
        return loss * torch.exp2(self.log2_scale) if self.fp16 else loss

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """One update from the parameters' gradients; returns their norm before clipping (0-dim, on the device)."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = torch.exp2(self.log2_scale) if self.fp16 else None
        norm, bad = guard_step(self.adamw, grads, self.grad_clip, scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr if group.get("own_lr") is None else group["own_lr"]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.skipped.count(bad, scale)
        if self.fp16:
            self.log2_scale = torch.where(bad > 0, self.log2_scale - 1, self.log2_scale + self.scale_growth).clamp(
                min=0.0
            )
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, the loss scale and the number of skipped steps."""
        return {"adamw": self.adamw.state_dict(), "log2_scale": self.log2_scale, "skipped": self.skipped.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, with the weight decay of this run."""
        self.load_moments(state["adamw"])
        self.log2_scale = state["log2_scale"].to(self.log2_scale)
        self.skipped.load_total(state["skipped"])

    def load_moments(self, state: Mapping[str, Any]) -> None:
        """A state dict of `adamw`. Raises UserError for moments that are not finite."""
        weight_decay = self.adamw.param_groups[0]["weight_decay"]
        load_optimizer(self.adamw, state)
        self.adamw.param_groups[0]["weight_decay"] = weight_decay  # this run's setting, not the saved one


@torch.no_grad()
def guard_step(
    optimizer: torch.optim.Optimizer, grads: Sequence[Tensor], grad_clip: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Prepare one step of a fused optimiser; returns (gradient norm, 1 where it is not finite else 0), both 0-dim.

    grad_clip: largest norm, 0 for none. scale: what the loss was multiplied by. The fused kernel divides by grad_scale and does
    nothing where found_inf is 1: clipping, unscaling and skipping in the one pass over the weights that the update makes anyway.
    """
    norm = total_norm(grads)
    norm = norm if scale is None else norm / scale
    bad = (norm * 0 != 0).float()  # 0 times infinity, or times NaN, is NaN
    if grad_clip > 0:
        too_long = (norm / grad_clip).clamp(min=1.0)
        scale = too_long if scale is None else scale * too_long
    # What torch's fused kernels read, and no stub knows.
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    return norm, bad


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, with every moment in its parameter's memory format.

    Runs on GPUs save them channels-last, and fused kernels walk through memory without a look at strides: resumed on a CPU, the
    moments of other weights would be read. Where the parameters are spread over the processes, each takes its part of the
    moments. Raises UserError for moments that are not finite.
    """
    moments_of = {f"{k}.{name}": x for k, own in state["state"].items() for name, x in own.items()}
    bad = [name for name, x in moments_of.items() if torch.is_tensor(x) and not is_finite(x)]
    if bad:
        raise UserError(
            f"{len(bad)} of the optimiser's moments hold NaN or infinity (first {bad[0]}); go on from an earlier checkpoint, or "
            "begin a run with these weights"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict(divided(state, parameters))
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def learning_rate(step: int, lr: float, warmup_steps: int, anneal_steps: int, lag: int = 0) -> float:
    """The rate of 0-based `step`: linear warm-up, and ADM's linear fall to 0 over `anneal_steps` of the whole run.

    lag: by how many steps the fall comes late: 1 in ADM's image_train.py, which sets the rate after each step, 0 in its
    classifier_train.py, which sets it before.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = max(0.0, 1 - max(0, step - lag) / anneal_steps) if anneal_steps else 1.0
    return lr * warm * left
