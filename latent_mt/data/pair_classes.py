"""Classes of pairs, from the names of their files."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from guided_mt.data import ImageSource
from guided_mt.data.sources.classes import by_folder, find_places, ordered, other_folders
from guided_mt.errors import UserError

logger = logging.getLogger("latent_mt.data")

CLASSES_FROM = ("prefix", "folder")


def classes_of(names: Sequence[str], rule: str, known: Sequence[str] | None = None) -> list[str | None]:
    """The class of each file, None where it has none.

    prefix: its name before the first "_", as ADM's; folder: the one it lies in, as `guided_mt.data` finds classes of folders.
    known: the classes of training; of what folders may say, that is taken which most of these files are known by.
    """
    if rule == "prefix":
        parts = [name.rpartition("/")[2].partition("_") for name in names]
        return [prefix if underscore and prefix else None for prefix, underscore, _ in parts]
    naming = by_folder(names)
    if naming is None:
        return [name.rpartition("/")[0].rpartition("/")[2] or None for name in names]
    if known is not None:
        naming = max((naming, *other_folders(names)), key=lambda naming: _known(naming.classes, known))
    return [name or None for name in naming.classes]


def _known(classes: Sequence[str], known: Sequence[str]) -> int:
    places = find_places(classes, known)
    return sum(places[name] is not None for name in classes)


def class_names_of(path: str, names: Sequence[str], rule: str) -> list[str]:
    """The classes of these files, numbers by their value. Raises UserError where they tell nothing apart."""
    found = ordered({label for label in classes_of(names, rule) if label is not None})
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
    classes = classes_of([source.name(k) for k in range(len(source))], rule, known)
    rank = find_places((name for name in classes if name is not None), known)
    places = [None if name is None else rank[name] for name in classes]
    labels = np.array([-1 if place is None else place for place in places], dtype=np.int64)
    source.labels, source.class_names = labels, list(known)
    unknown = sorted(name for name, place in rank.items() if place is None)
    lacking = int((labels < 0).sum())
    if lacking:
        not_trained = f" ({', '.join(unknown[:5])}{', ...' * (len(unknown) > 5)}: not in training)" if unknown else ""
        logger.info("%s: %d of %d items have no class%s", source.path, lacking, len(labels), not_trained)
