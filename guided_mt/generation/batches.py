"""Loaded images as the batches that modalities draw their data from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import LoadedImages
from ..data.images import from_uint8
from ..modalities import Images, Modality


def load_beside(
    modalities: Mapping[str, Modality], indices: np.ndarray, captions: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """What the modalities keep beside the images of these numbers [B], on the host; what they make of `captions` [B], where a
    training step has some, goes before it."""
    found = {name: None if captions is None else modality.load_texts(captions) for name, modality in modalities.items()}
    found = {name: modalities[name].load(indices) if x is None else x for name, x in found.items()}
    return {name: x for name, x in found.items() if x is not None}


def split_sides(pixels: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """(images, {name: further image}), each [B, 3, H, W], of items [B, 3 sides, H, W]; names: those of all sides, () for one."""
    first, *others = pixels.chunk(max(1, len(names)), dim=1)
    return first, dict(zip(names[1:], others, strict=True))


def take_images(
    loaded: LoadedImages,
    rows: slice | Sequence[int],
    modalities: Mapping[str, Modality],
    device: torch.device | str,
    names: Sequence[str] = (),
) -> Images:
    """Some of the loaded images as a batch on `device`, with what the modalities keep beside them. names: of their sides."""
    labels = None if loaded.labels is None else loaded.labels[rows].to(device)
    beside = load_beside(modalities, loaded.indices[rows].numpy())
    x_start, sides = split_sides(from_uint8(loaded.images[rows].to(device)), names)
    present = {name: mask[rows].to(device) for name, mask in loaded.present.items()}
    return Images(x_start, labels, {name: x.to(device) for name, x in beside.items()}, sides, present)
