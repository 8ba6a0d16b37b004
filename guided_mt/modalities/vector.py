"""One vector per image, from an .npz beside the images: features, captions' embeddings, measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..data import ImageSource
from ..diffusion.random import SampleStreams
from ..errors import NPZ_ERRORS, UserError, reason
from .base import Gaussian, Images


class VectorModality(Gaussian):
    """x in R^D [B, D]: Gaussian head, encoded by the network from one token.

    file: .npz or .npy with row i for image i of the data, read by `prepare`; a row of NaN is an image without a vector.
    flag: what names the file, for messages.
    """

    def __init__(
        self,
        name: str,
        size: int,
        file: str = "",
        variance: Tensor | None = None,
        flag: str = "",
    ):
        super().__init__(name, variance)
        self.size, self.file = size, file
        self.flag = flag or f"--{name}_file"
        self.vectors: np.ndarray | None = None

    def prepare(self, images: ImageSource) -> None:
        """Read the vectors. Raises UserError where their number is not that of the images."""
        self.vectors = read_vectors(self.file, self.name, self.size, f"{self.flag} {self.file}", absent=True)
        if len(self.vectors) != len(images):
            raise UserError(
                f"{self.flag} {self.file}: has {len(self.vectors)} vectors for the {len(images)} images of {images.path}"
            )
        self.partly = bool(np.isnan(self.vectors[:, 0]).any())

    @override
    def load(self, indices: np.ndarray) -> Tensor | None:
        if self.vectors is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(self.vectors[indices], dtype=np.float32))

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        if self.name not in images.loaded:
            raise ValueError(f"modality '{self.name}' needs its vectors beside the images")
        return images.loaded[self.name].nan_to_num(0.0) if self.partly else images.loaded[self.name]

    @override
    def present(self, images: Images) -> Tensor | None:
        if self.name in images.present:
            return images.present[self.name]
        return ~images.loaded[self.name][:, 0].isnan() if self.partly else None

    @override
    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        return torch.zeros(len(streams), self.size, device=streams.device)

    @override
    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        vectors = read_vectors(text, self.name, self.size, f"--given {self.name}={text}")
        return torch.from_numpy(np.array(vectors, dtype=np.float32))


def read_vectors(file: str, name: str, size: int | None, where: str, absent: bool = False) -> np.ndarray:
    """Finite floats [N, D] of an .npz's array `name`, or arr_0, or of a .npy. where: the flag and its value, for messages. absent:
    a row may be NaN as a whole.

    Raises UserError for another shape or width.
    """
    path = Path(file).expanduser()
    try:
        content = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(content, np.ndarray):
            found = content
        else:
            with content:
                key = name if name in content.files else "arr_0"
                if key not in content.files:
                    raise UserError(
                        f"{where}: has neither an array '{name}' nor arr_0 (it has {', '.join(content.files)})"
                    )
                found = content[key]
    except UserError:
        raise
    except NPZ_ERRORS as error:
        raise UserError(f"{where}: can't be read as .npz or .npy ({reason(error)})") from None
    if found.ndim != 2 or found.dtype.kind != "f" or not found.size:
        raise UserError(f"{where}: vectors must be floats [N, D], not {found.dtype} {list(found.shape)}")
    if size is not None and found.shape[1] != size:
        raise UserError(f"{where}: has vectors of {found.shape[1]} numbers, this model takes {size}")
    with np.errstate(over="ignore"):  # larger numbers than float32 holds are infinite
        bad = ~np.isfinite(found.astype(np.float32, copy=False)).all(axis=1)
    missing = np.isnan(found).all(axis=1)
    if absent and not missing.all():
        bad &= ~missing
    if bad.any():
        also = "; a vector that is missing is a row of NaN" if absent else ""
        raise UserError(f"{where}: has values that are not finite, first in row {int(bad.argmax())}{also}")
    return found
