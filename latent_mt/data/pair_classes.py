"""Classes of pairs, from the names of their files."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from guided_mt.data import ImageSource
from guided_mt.errors import UserError

logger = logging.getLogger("latent_mt")

CLASSES_FROM = ("prefix", "folder")


def class_of(name: str, rule: str) -> str | None:
    """prefix: the file's name before the first "_", as ADM's; folder: the one the file lies in. None: there is none."""
    folder, _, file = name.rpartition("/")
    if rule == "folder":
        return folder.rpartition("/")[2] or None
    prefix, underscore, _ = file.partition("_")
    return prefix if underscore and prefix else None


def class_names_of(path: str, names: Sequence[str], rule: str) -> list[str]:
    """The classes of these files, sorted. Raises UserError where they tell nothing apart."""
    found = sorted({label for name in names if (label := class_of(name, rule)) is not None})
    if len(found) > 1:
        return found
    what = f"are all of class {found[0]}" if found else "have no class"
    other = next(word for word in CLASSES_FROM if word != rule)
    raise UserError(
        f"{path}: by data.params.labels {rule} the files ({names[0]}, ...) {what}; try {other}, or leave out labels"
    )


def set_classes(source: ImageSource, rule: str, known: Sequence[str]) -> None:
    """Give a source labels: places in `known`, the classes of training, and -1 for an item of none of them.

    Says how many are of none.
    """
    rank = {name: i for i, name in enumerate(known)}
    classes = [class_of(source.name(k), rule) for k in range(len(source))]
    labels = np.array([-1 if name is None else rank.get(name, -1) for name in classes], dtype=np.int64)
    source.labels, source.class_names = labels, list(known)
    unknown = sorted({name for name in classes if name is not None} - set(known))
    lacking = int((labels < 0).sum())
    if lacking:
        not_trained = f" ({', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}: not in training)" if unknown else ""
        logger.info("%s: %d of %d items have no class%s", source.path, lacking, len(labels), not_trained)
