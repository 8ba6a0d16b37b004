"""Which names a modality may have: its values are a log column and an array of its name, beside those that every run writes."""

from __future__ import annotations

import re

from ..errors import UserError

_COLUMNS = (
    *("step", "samples", "loss", "mse", "l1", "vb", "role", "denoising", "align"),
    *("grad_norm", "lr", "skipped_steps", "log2_loss_scale", "images_per_second"),
)
_TAKEN = {
    "a column of progress.csv": rf"{'|'.join(_COLUMNS)}|(rms|spread|val|cos|grad_norm|grad_cos|task_weight)_.+|.+_q[0-3]",
    "an array of a sample file": r"arr_\d+|.+_(probabilities|draw)",
    "a word of --mt_task": "none",
}


def check_name(name: str) -> None:
    """Raises UserError for a name that isn't letters, digits, _ and -, and for one that a run gives to something else."""
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"modality '{name}': a name is made of letters, digits, _ and -")
    for what, pattern in _TAKEN.items():
        if re.fullmatch(pattern, name):
            raise UserError(f"modality '{name}': the name is that of {what}; choose another")
