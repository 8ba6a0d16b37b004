"""How the classes of images follow from the names of their files, and class ids from classes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UserError, nearest

logger = logging.getLogger("guided_mt.data")

# Names of folders that say which part of a data set, or that there are images in it, and nothing of what they show.
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_PICTURES = frozenset(
    ("images", "image", "imgs", "img", "jpegimages", "photos", "photo", "pictures", "picture", "frames", "rgb")
)
_SHOWN = 3  # names in a message


class UnknownClassError(UserError):
    """The data have a class that a checkpoint's classes don't hold."""


@dataclass(frozen=True)
class Naming:
    """The class of each file by one rule; rule: which, in words; note: what was guessed on the way, "" for nothing."""

    classes: list[str]
    rule: str
    note: str = ""


def class_ids(
    path: str, names: Sequence[str], class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """(int64 ids [N] or None, class names) of files by their names.

    class_names: the known names, whose places are the ids; None: those of these files, in the order of `ordered`. Says in one
    line what was guessed. Raises UnknownClassError for a class that is not known by any rule.
    """
    naming = guess(names)
    if class_names is not None:
        naming = _known_naming(path, names, naming, class_names)
    if naming is None:
        return None, []
    found = set(naming.classes)
    known = ordered(found) if class_names is None else list(class_names)
    if class_names is None:
        notes = [note for note in (naming.note, _gaps(known)) if note]
        if notes:
            logger.info("%s: %s", path, "; ".join(notes))
    places = class_places(path, found, known)
    return np.array([places[name] for name in naming.classes], dtype=np.int64), known


def guess(names: Sequence[str]) -> Naming | None:
    """The class of each file: its folder where all files have one that says something, else ADM's prefix NAME_..., else None.

    A last folder `images` that all share (CLASS/images/x.jpg) is no class, nor are train, val and test beside each other;
    folders of the same name at different places are told apart by their path below the folder that all lie in.
    """
    naming = by_folder(names)
    if naming is None or not any(naming.classes):
        return by_prefix(names)
    return naming if all(naming.classes) else None  # train has folders of classes, val and test beside it have not


def by_folder(names: Sequence[str]) -> Naming | None:
    """The folder that names each file's class, "" where none does. None where a file lies in no folder."""
    parents = [name.rpartition("/")[0] for name in names]
    if not all(parents):
        return None
    of_folder, note = _classes_of_folders(dict.fromkeys(parents))
    return Naming([of_folder[parent] for parent in parents], "by their folders", note)


def _classes_of_folders(folders: Iterable[str]) -> tuple[dict[str, str], str]:
    """({folder: class, "" for a folder that names none}, what was guessed)."""
    paths, notes = _without_splits({folder: tuple(folder.split("/")) for folder in folders})
    while any(len(path) > 1 for path in paths.values()) and _all_end_in(_PICTURES, paths.values()):
        notes.append(f"the folders {next(iter(paths.values()))[-1]} are no classes, but those above them are")
        paths = {folder: path[:-1] for folder, path in paths.items()}
    depth = _common(paths.values())
    paths = {folder: path[depth:] for folder, path in paths.items()}
    distinct = set(paths.values())
    if len(distinct) == 1 and _all_end_in(_SPLITS | _PICTURES, distinct):
        return dict.fromkeys(paths, ""), ""
    if len({path[-1:] for path in distinct}) == len(distinct):
        return {folder: path[-1] if path else "" for folder, path in paths.items()}, "; ".join(notes)
    same = ", ".join(_first_with_equal_last(distinct))
    notes.append(f"folders of the same name at different places are classes of their own, named by their paths: {same}")
    return {folder: "/".join(path) for folder, path in paths.items()}, "; ".join(notes)


def _all_end_in(words: frozenset[str], paths: Iterable[tuple[str, ...]]) -> bool:
    """Whether the last folders of all paths are the same one of `words`."""
    lasts = {path[-1].lower() if path else "" for path in paths}
    return len(lasts) == 1 and lasts <= words


def _without_splits(paths: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The paths without train, val, ..., where several of these lie beside each other, and a note of it."""
    depth = _common(paths.values())
    firsts = sorted({path[depth] for path in paths.values()})
    if len(firsts) < 2 or not {first.lower() for first in firsts} <= _SPLITS:
        return dict(paths), []
    cut = {folder: path[:depth] + path[depth + 1 :] for folder, path in paths.items()}
    return cut, [f"{' and '.join(firsts)} are read together, and a class is the same in each"]


def _common(paths: Iterable[tuple[str, ...]]) -> int:
    """How many first folders all paths share, but for a last one."""
    paths = list(paths)
    first, last = min(paths), max(paths)  # what these two share, all share
    shared = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, max(0, min(map(len, paths)) - 1))


def _first_with_equal_last(paths: Iterable[tuple[str, ...]]) -> list[str]:
    by_last: dict[str, list[str]] = {}
    for path in sorted(paths):
        by_last.setdefault(path[-1] if path else "", []).append("/".join(path))
    return next(same for same in by_last.values() if len(same) > 1)[:_SHOWN]


def by_prefix(names: Sequence[str]) -> Naming | None:
    """ADM's rule: what stands before the first "_" of each file's name. None where a file has no such prefix.

    None too where all files have the prefix val, img or the like, as Tiny ImageNet's val_0.JPEG.
    """
    parts = [name.rpartition("/")[2].partition("_") for name in names]
    if not all(prefix and underscore for prefix, underscore, _ in parts):
        return None
    classes = [prefix for prefix, _, _ in parts]
    if {prefix.lower() for prefix in classes} <= _SPLITS | _PICTURES and len(set(classes)) == 1:
        return None
    return Naming(classes, "by what stands before the first _ of their names")


def first_without_class(names: Sequence[str]) -> str:
    """Of files that `guess` finds no classes for: one that has none, and why where it lies in a folder."""
    in_folders, naming = any("/" in name for name in names), by_folder(names)
    if naming is not None:
        first = next(name for name, found in zip(names, naming.classes, strict=True) if not found)
        return f"{first} (whose folder names no class; lists such as val_annotations.txt are not read)"
    lacking = (name for name in names if ("/" not in name if in_folders else not all(name.partition("_")[:2])))
    return next(lacking, names[0])  # where all have the prefix val_: the first


# ---------------------------------------------------------------- names that are known already


def _known_naming(path: str, names: Sequence[str], guessed: Naming | None, known: Sequence[str]) -> Naming | None:
    """The first rule by which all classes are known; the guess where there is none.

    A model's classes may have been named by a rule of an earlier version, and a part of the data may not show what the whole
    did: of indoor/chair and outdoor/chair alone, the second is `chair`.
    """
    if guessed is not None and None not in find_places(guessed.classes, known).values():
        return guessed
    for naming in (*other_folders(names), *filter(None, [by_prefix(names)])):
        if None not in find_places(naming.classes, known).values():
            logger.info("%s: the saved classes are found %s", path, naming.rule)
            return naming
    return guessed


def other_folders(names: Sequence[str]) -> list[Naming]:
    """What else folders may say, for classes that are known; none where a file lies in no folder."""
    parents = [name.rpartition("/")[0] for name in names]
    if not all(parents):
        return []
    return [
        Naming([parent.rpartition("/")[2] for parent in parents], "by the last folders"),
        Naming(parents, "by the whole paths of the folders"),
        Naming([parent.partition("/")[0] for parent in parents], "by the first folders"),
    ]


def class_places(path: str, found: Iterable[str], known: Sequence[str]) -> dict[str, int]:
    """{class of the data: its place among the known ones}. Of numbers the value counts: 2 is the known class 02.

    Raises UnknownClassError for a class that is not among them.
    """
    places = find_places(found, known)
    unknown = sorted(name for name, place in places.items() if place is None)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UnknownClassError(
            f"{path}: class {unknown[0]!r}{more} is not one of the {len(known)} saved classes"
            f"{nearest(unknown[0], known)}; rename it, or leave it out of the data"
        )
    return {name: place for name, place in places.items() if place is not None}


def find_places(found: Iterable[str], known: Sequence[str]) -> dict[str, int | None]:
    """The same, None for a class that is not among the known ones."""
    exact = {name: place for place, name in enumerate(known)}
    numbers = numbers_of(known) or {}
    return {name: exact.get(name, numbers.get(int(name)) if is_number(name) else None) for name in set(found)}


def renumbered(path: str, labels: np.ndarray, names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Ids [N], places in `names`, as places in `known`; -1 stays. Raises UnknownClassError."""
    places = class_places(path, names, known)
    ids = np.array([*(places[name] for name in names), -1], dtype=np.int64)  # the id -1 finds the last
    return ids[labels]


def check_classes(path: str, found: Iterable[str], known: Sequence[str]) -> None:
    """Raises UnknownClassError for a class of the data that is not among the known ones."""
    class_places(path, found, known)


# ---------------------------------------------------------------- numbers


def is_number(name: str) -> bool:
    """Whether a name is a whole number in ASCII digits."""
    return name.isascii() and name.isdecimal()


def ordered(names: Iterable[str]) -> list[str]:
    """The order of class ids: that of the numbers where all names are numbers, so that 10 comes after 2, else that of the words."""
    names = set(names)
    if all(map(is_number, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def numbers_of(names: Sequence[str]) -> dict[int, int] | None:
    """{number: its place} where all names are numbers, each another one; None otherwise."""
    if not names or not all(map(is_number, names)):
        return None
    places = {int(name): place for place, name in enumerate(names)}
    return places if len(places) == len(names) else None


def _gaps(known: Sequence[str]) -> str:
    """What to say where classes are numbers, but not 0 to K - 1: then ids are not the numbers."""
    numbers = numbers_of(known)
    if not numbers or set(numbers) == set(range(len(known))):
        return ""
    return (
        f"the {len(known)} classes are numbers from {known[0]} to {known[-1]}, not 0 to {len(known) - 1}, so that ids are their "
        f"ranks: id 0 is class {known[0]}"
    )
