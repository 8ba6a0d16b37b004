"""What the denoisers and the noisy classifier have in common: the inputs that they can take, and their arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .layers import FastLayout

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(x: Tensor, precision: str) -> torch.autocast:
    """Mixed precision on x's device as `precision` of PRECISIONS says, whatever the caller's autocast."""
    enabled = precision != "fp32"
    return torch.autocast(x.device.type, dtype=PRECISIONS[precision] if enabled else None, enabled=enabled)


class CheckedInputs(FastLayout):
    """A network on images that says in one line what is wrong with its inputs, and computes in its own precision."""

    image_size: int
    in_channels: int
    num_classes: int | None
    context_dim: int | None
    condition_channels: int
    precision: str
    size_divisor: int  # of height and width

    def set_precision(self, precision: str) -> None:
        """ "fp32", "bf16" or "fp16". Raises UserError for another."""
        if precision not in PRECISIONS:
            raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.precision = precision

    def autocast(self, x: Tensor) -> torch.autocast:
        """Mixed precision as `self.precision` says, whatever the caller's autocast."""
        return autocast(x, self.precision)

    def check_inputs(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, context: Tensor | None, condition: Tensor | None
    ) -> None:
        """UserError for inputs this network can't take. Looks at shapes only, so it costs nothing when compiled."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"x must be [B, {self.in_channels}, H, W], not {list(x.shape)}")
        batch, _, height, width = x.shape
        if height % self.size_divisor or width % self.size_divisor:
            raise UserError(
                f"height and width must be multiples of {self.size_divisor} for this network, not {height} x {width}"
            )
        if timesteps.shape != (batch,):
            raise UserError(f"timesteps must be [{batch}], not {list(timesteps.shape)}")
        if y is None and self.num_classes is not None:
            raise UserError("y is missing: the model is class-conditional")
        if y is not None and self.num_classes is None:
            raise UserError("y given to a model without classes")
        if y is not None and y.shape != (batch,):
            raise UserError(f"y must be [{batch}], not {list(y.shape)}")
        if condition is None and self.condition_channels:
            raise UserError(f"condition [B, {self.condition_channels}, H, W] is missing")
        if condition is not None and not self.condition_channels:
            raise UserError("condition given to a model without condition_channels")
        if condition is not None and condition.shape != (batch, self.condition_channels, height, width):
            raise UserError(
                f"condition must be {[batch, self.condition_channels, height, width]}, not {list(condition.shape)}"
            )
        if context is not None and self.context_dim is None:
            raise UserError("context given to a model without context_dim")
        if context is not None and (
            context.ndim != 3 or context.shape[0] != batch or context.shape[2] != self.context_dim
        ):
            raise UserError(f"context must be [{batch}, L, {self.context_dim}], not {list(context.shape)}")
