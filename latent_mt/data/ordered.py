"""A source's items once, in order, decoded ahead by worker processes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from guided_mt.data import Batch, ImageSource
from guided_mt.data.dataset import BrokenImage, BrokenImages, decode, present_of
from guided_mt.data.loader import start_loader, stop_loader
from guided_mt.errors import UserError


def ordered_batches(
    source: ImageSource, image_size: int, batch_size: int, num_workers: int = 0
) -> Generator[Batch, None, None]:
    """Batches of up to batch_size items, centre-cropped; positions and indices are the items' numbers.

    Broken items are left out with a warning. Raises UserError where over 1 % are. Close it to end the workers early.
    """
    broken = BrokenImages(source)
    chunks = _Chunks(source, image_size, batch_size)
    items = start_loader(chunks, range(len(chunks)), 0 if source.is_array else num_workers)
    try:
        for item in items:
            if "refused" in item:
                raise UserError(item["refused"])
            for index, why in item["broken"]:
                broken.add(index, why)
            numbers = item["indices"]
            if len(numbers):
                labels = None if source.labels is None else torch.from_numpy(source.labels[numbers.numpy()])
                present = present_of(source, numbers.numpy())
                yield Batch(item["images"], labels, numbers, numbers, present=present)
    finally:
        stop_loader(items)


class _Chunks(torch.utils.data.Dataset):
    """Item k: images of the source number k * size and on; see StepDataset for what becomes of errors."""

    def __init__(self, source: ImageSource, image_size: int, size: int):
        self.source, self.image_size, self.size = source, image_size, size

    def __len__(self) -> int:
        return -(-len(self.source) // self.size)

    def __getitem__(self, chunk: int) -> dict[str, Any]:
        kept: list[int] = []
        broken: list[tuple[int, str]] = []
        numbers = range(len(self.source))[chunk * self.size : (chunk + 1) * self.size]
        try:
            images = np.empty((len(numbers), *self.source.item_shape(self.image_size)), dtype=self.source.dtype)
            for index in numbers:
                try:
                    images[len(kept)] = decode(self.source, index, self.image_size)
                    kept.append(index)
                except BrokenImage as error:
                    broken.append((index, str(error)))
        except UserError as error:
            return {"refused": str(error)}
        return {"images": torch.from_numpy(images[: len(kept)]), "indices": torch.tensor(kept), "broken": broken}
