"""Loaded images as the batches that modalities draw their data from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..data.dataset import LoadedImages
from ..data.images import from_uint8
from ..modalities import Images, Modality


def take_images(
    loaded: LoadedImages, rows: slice | Sequence[int], modalities: Mapping[str, Modality], device: torch.device | str
) -> Images:
    """Some of the loaded images as a batch on `device`, with what the modalities keep beside them."""
    labels = None if loaded.labels is None else loaded.labels[rows].to(device)
    beside = {name: modality.load(loaded.indices[rows].numpy()) for name, modality in modalities.items()}
    found = {name: x.to(device) for name, x in beside.items() if x is not None}
    return Images(from_uint8(loaded.images[rows].to(device)), labels, found)
