"""The models that are compared: an image with no, one, two or all of some tasks, and all of them trained in other ways.

A model with tasks sees an image without any frame only where `--mt_drop_prob` says so. `alone` sees every image so, and has more
practice at what all of them are measured on; `unframed` is that model with as many such images in a step as the others have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from guided_mt.errors import UserError, nearest

IMAGE = "image alone"
UNFRAMED = "image alone, unframed share"
ALL = "all tasks"
GROUPS = ("alone", "unframed", "each", "pairs", "all")
METHODS: dict[str, tuple[str, ...]] = {  # what a model of all tasks is trained with beside: flags of `train`
    "uncertainty": ("--mt_task_weighting", "uncertainty"),
    "pcgrad": ("--mt_task_weighting", "pcgrad"),
    "nash": ("--mt_task_weighting", "nash"),
    "routing": ("--mt_routing", "dtr"),
    "min-snr": ("--timestep_weights", "min-snr"),
    "p2": ("--timestep_weights", "p2"),
}


@dataclass(frozen=True)
class Row:
    """A model: its name, its tasks beside the image, and more flags of `train`."""

    name: str
    tasks: tuple[str, ...]
    flags: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """As words of `train`."""
        return ["--mt_task", ",".join(self.tasks) or "none", *self.flags]

    @property
    def folder(self) -> str:
        """As a name of folders."""
        return self.name.replace(", ", "_").replace(" ", "-").replace("+-", "with_")


def unframed_images(batch: int, drop_prob: float) -> int:
    """How many of a batch's images are seen without a frame, on average: a whole number, 0 only where there are none."""
    return max(1, round(batch * drop_prob)) if drop_prob > 0 else 0


def rows_of(tasks: Sequence[str], wanted: str, unframed: int) -> list[Row]:
    """The rows of GROUPS and METHODS named in `wanted`, with commas. unframed: how many images of a batch the models with tasks
    see without a frame, on average. Raises UserError for another name, for none, and for `unframed` where these are none."""
    names = [word.strip() for word in wanted.split(",") if word.strip()]
    known = [*GROUPS, *METHODS]
    for name in names:
        if name not in known:
            raise UserError(f"--rows {wanted}: '{name}' is none of {', '.join(known)}{nearest(name, known)}")
    if "unframed" in names and unframed < 1:
        raise UserError(
            f"--rows {wanted}: with --mt_drop_prob 0 no model with tasks sees an image without a frame, so 'unframed' would have "
            "none to train on; raise it, or leave that row out"
        )
    found: dict[str, Row] = {}
    for name in names:
        for row in _group(tasks, name, unframed):
            found.setdefault(row.name, row)
    if not found:
        raise UserError(
            f"--rows {wanted}: names no model of {', '.join(tasks) or 'no task'}; take some of {', '.join(known)}"
        )
    return list(found.values())


def _group(tasks: Sequence[str], name: str, unframed: int) -> list[Row]:
    if name == "alone":
        return [Row(IMAGE, ())]
    if name == "unframed":
        size = str(unframed)
        return [Row(UNFRAMED, (), ("--global_batch_size", size, "--batch_size", size))]
    if name == "each":
        return [Row(f"+ {task}", (task,)) for task in tasks]
    if name == "pairs":
        return [Row(f"+ {a}, {b}", (a, b)) for a, b in combinations(tasks, 2)]
    if len(tasks) < 2:
        return []  # of one task all tasks are that one
    return [Row(ALL, tuple(tasks)) if name == "all" else Row(f"{ALL}, {name}", tuple(tasks), METHODS[name])]
