"""Steps whose gradient was not finite: they change nothing, are counted, and stop a run when too many follow each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

MAX_SKIPPED_IN_ROW = 10


class SkippedSteps:
    """Counts on the device, read by the host now and then: all skipped steps, those in a row now, and the longest such row.

    total, in_row, longest_row: 0-dim. `longest_row` is what is looked at, since a row may begin and end between two looks.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.total = torch.zeros((), device=device)
        self.in_row = torch.zeros((), device=device)
        self.longest_row = torch.zeros((), device=device)

    def count(self, bad: Tensor, loss_scale: Tensor | None = None) -> None:
        """bad: 0-dim, 1 where this step's gradient was not finite, else 0. loss_scale: what fp16 multiplied its loss by, 0-dim.

        In fp16 a bad step first lowers the scale; only at a scale of 1 does it speak of the model and count as one of a row.
        """
        self.total += bad
        speaks = 1 if loss_scale is None else loss_scale <= 1
        self.in_row = (self.in_row + speaks) * bad
        self.longest_row = torch.maximum(self.longest_row, self.in_row)

    def load_total(self, total: Tensor) -> None:
        """Go on from a checkpoint's count; rows begin anew."""
        self.total = total.to(self.total)

    def refuse_divergence(self, step: int, advice: str) -> None:
        """Stop a run that has stopped learning: UserError with this advice. Waits for the device."""
        if (longest := int(self.longest_row)) >= MAX_SKIPPED_IN_ROW:
            raise UserError(
                f"step {step}: the loss or its gradient was not finite {longest} steps in a row, so training stopped; these "
                f"steps changed nothing and the checkpoints are from before: {advice}"
            )
