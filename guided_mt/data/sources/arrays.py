"""Images that come as arrays: .npz files as ADM writes them, and scikit-learn's digits."""

from __future__ import annotations

import logging
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import NPZ_ERRORS, UserError, nearest
from .base import ArraySource
from .classes import UnknownClassError, class_places, numbers_of

logger = logging.getLogger("guided_mt.data")

BUILTIN = ("digits", "digits-test")
_DIGITS_HELD_OUT = 5  # every fifth digit is held out
MAX_CLASSES = 2**20  # there is a name, and a row of weights, for each id up to the largest


class NpzSource(ArraySource):
    """ADM's sample files and batches: arr_0 uint8 [N, H, W, 3], and maybe arr_1, class ids [N], -1 for no class."""

    file: Path

    def __reduce__(self) -> tuple[Any, ...]:
        # by its path: a mapped array would be pickled with all its pixels
        return open_npz, (self.path, self.file, self.class_names or None)


def open_npz(path: str, file: Path, class_names: Sequence[str] | None) -> NpzSource:
    """Open an .npz; an uncompressed one is mapped, not read. Raises UserError for another layout, type or length."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in found:
                raise UserError(f"{file}: no array arr_0 (it has {', '.join(found) or 'none'}); save it as arr_0")
            images = _load(file, archive, "arr_0")
            labels = _load(file, archive, "arr_1") if "arr_1" in found else None
    except NPZ_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a whole .npz file ({error}); copy or write it again") from error
    _check_images(file, images)
    names: list[str] = []
    if labels is not None:
        labels, names = _check_labels(file, labels, len(images), class_names)
    source = NpzSource(path, images, labels, names)
    source.file = file.absolute()
    return source


def open_builtin(path: str, class_names: Sequence[str] | None) -> ArraySource:
    """builtin:digits (four fifths of scikit-learn's digits) or builtin:digits-test (each fifth): 8x8 pixels, grey."""
    name = path.removeprefix("builtin:")
    if name not in BUILTIN:
        raise UserError(f"{path}: no such built-in data{nearest(name, BUILTIN)}; there is builtin:{BUILTIN[0]}")
    from sklearn.datasets import load_digits  # here: a second to import, and only digits need it

    digits = load_digits()
    held_out = np.arange(len(digits.images)) % _DIGITS_HELD_OUT == 0
    chosen = held_out if name == "digits-test" else ~held_out
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]  # the scans have 17 levels
    labels = digits.target[chosen].astype(np.int64)
    found = [str(digit) for digit in range(10)]
    known = found if class_names is None else list(class_names)
    places = class_places(path, found, known)
    ids = np.array([places[digit] for digit in found], dtype=np.int64)
    return ArraySource(path, images, ids[labels], known)


def _load(file: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array. Pickled ones are refused by their header, before anything of them is read."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(member)
        if dtype.hasobject:
            raise UserError(f"{file}: {name} holds pickled objects, which are never loaded; save a plain array")
        header_bytes = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[name]
    with file.open("rb") as handle:
        handle.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4)))
    return np.memmap(file, dtype, "r", start + header_bytes, shape, order="F" if fortran else "C")


def _check_images(file: Path, images: np.ndarray) -> None:
    shape = list(images.shape)
    if images.ndim == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        raise UserError(f"{file}: arr_0 is {shape}, channels first; save images.transpose(0, 2, 3, 1)")
    if images.ndim != 4 or shape[3] not in (1, 3):
        raise UserError(f"{file}: arr_0 is {shape}; images must be [N, height, width, 3]")
    if images.dtype != np.uint8:
        raise UserError(f"{file}: arr_0 is {images.dtype}; images must be uint8, 0 to 255")
    if 0 in shape:
        raise UserError(f"{file}: arr_0 is {shape}: no images")


def _check_labels(
    file: Path, labels: np.ndarray, count: int, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """(int64 ids [N], names), or (None, []) where all ids are -1. Names have equal length, so that they sort as ids do."""
    if labels.shape != (count,):
        raise UserError(f"{file}: arr_1 is {list(labels.shape)} for {count} images; it must be one class id per image")
    numbers = labels.dtype.kind in "iuf"
    if labels.dtype.kind not in "iu" or labels.min() < -1 or labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{file}: arr_1 must be class ids 0, 1, 2, ... below {MAX_CLASSES:,}, or -1 for an image without a class "
            f"(it is {labels.dtype}{f', from {labels.min()} to {labels.max()}' if numbers else ''})"
        )
    labels = labels.astype(np.int64)
    largest = int(labels.max())
    if largest < 0:
        return None, []
    if class_names is None:
        return labels, [str(i).zfill(len(str(largest))) for i in range(largest + 1)]
    labels = _by_number(file, labels, class_names)
    if labels.max() >= len(class_names):
        raise UnknownClassError(
            f"{file}: class id {largest} in arr_1, but there are {len(class_names)} saved classes; leave it out of the data"
        )
    return labels, list(class_names)


def _by_number(file: Path, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Ids [N] of labels [N]: where the saved classes are called by numbers, a label is the class of its number, not the id.

    Where there is a label that no class is called, all are ids. Says what was taken where the two differ.
    """
    numbers = numbers_of(class_names)
    if numbers is None or all(number == place for number, place in numbers.items()):
        return labels
    found = np.unique(labels[labels >= 0]).tolist()
    other = next((k for k in found if k not in numbers), None)
    if other is not None:
        if other < len(class_names):
            text = "%s: no class is called %d, so that arr_1 is taken for ids and not for the names of classes: %d is class %s"
            logger.warning(text, file, other, other, class_names[other])
        return labels
    example = next((k for k in found if numbers[k] != k), found[0])
    text = "%s: arr_1 is taken for the names of classes, which are numbers, and not for ids: class %d has the id %d"
    logger.info(text, file, example, numbers[example])
    return np.array([-1 if k < 0 else numbers[k] for k in labels.tolist()], dtype=np.int64)
