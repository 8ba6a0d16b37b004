"""The .npz files of `mt-diffusion restore`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import EvaluationError
from .npz import open_npz, read_array


@dataclass(frozen=True)
class Restoration:
    """The images of one file: uint8 [N, H, W, 3] and `mask` bool [N, H, W], True where pixels were hidden."""

    original: np.ndarray
    masked: np.ndarray
    restored: np.ndarray
    mask: np.ndarray


def read(path: Path) -> Restoration:
    """A file of `restore`. Raises EvaluationError for everything else; pickled arrays are not loaded."""
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; mt-diffusion restore writes them")
    with open_npz(path) as file:
        names = ["original", "masked", "restored" if "restored" in file.files else "arr_0", "mask"]
        missing = [name for name in names if name not in file.files]
        if missing:
            raise EvaluationError(
                f"{path}: no array {', '.join(missing)}, only {', '.join(file.files) or 'nothing'}; "
                "mt-diffusion restore writes files with all of them"
            )
        arrays = {name: np.asarray(read_array(file, name, path)) for name in names}
    original, masked, restored, mask = (arrays[name] for name in names)
    for name in names[:3]:
        if arrays[name].ndim != 4 or arrays[name].shape[-1] != 3 or arrays[name].shape != original.shape:
            raise EvaluationError(
                f"{path}: {name} has shape {list(arrays[name].shape)}, not that of images [N, H, W, 3]"
                + (f" like original, {list(original.shape)}" if name != "original" else "")
            )
        if arrays[name].dtype != np.uint8:
            raise EvaluationError(f"{path}: {name} is {arrays[name].dtype}, not uint8 (pixels 0 to 255)")
    if mask.shape != original.shape[:3]:
        raise EvaluationError(f"{path}: mask has shape {list(mask.shape)}, the images need {list(original.shape[:3])}")
    if not original.size:
        raise EvaluationError(f"{path}: has no image (shape {list(original.shape)})")
    if mask.dtype != bool:
        if mask.dtype != np.uint8 or not np.isin(mask, (0, 255)).all():
            raise EvaluationError(
                f"{path}: mask must be uint8 of 0 (given) and 255 (masked), or bool; it is {mask.dtype} "
                f"from {mask.min()} to {mask.max()}"
            )
        mask = mask > 127
    return Restoration(original, masked, restored, mask)
