"""The units of modalities that have some, measured on the first batches before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..modalities import Images, Modality

UNIT_IMAGES = 2048  # enough for a mean and a standard deviation


def batches_to_measure(images_per_batch: int) -> int:
    """How many batches of this size hold UNIT_IMAGES, at most 8 where batches are small."""
    return max(1, min(8, UNIT_IMAGES // images_per_batch))


@torch.no_grad()
def measure_units(modalities: Mapping[str, Modality], batches: Iterable[Images]) -> None:
    """Tell those `modalities` that are `unmeasured` the mean and the standard deviation of what they measure of `batches`.

    Every process is to see the same batches, whatever their number. Raises UserError as `Modality.use_measured`.
    """
    sums: dict[str, Tensor] = {}  # name: [3, D], count, sum and sum of squares
    for images in batches:
        for name, modality in modalities.items():
            if modality.unmeasured:
                v = modality.measured(images).double()  # (B, D)
                part = torch.stack([torch.ones_like(v).sum(0), v.sum(0), v.square().sum(0)])
                sums[name] = sums[name] + part if name in sums else part
    for name, (count, total, squares) in sums.items():
        mean = total / count
        spread = (squares / count - mean.square()).clamp(min=0).sqrt()
        modalities[name].use_measured(mean.float(), spread.float())
