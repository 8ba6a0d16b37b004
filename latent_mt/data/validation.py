"""The validation split as training sees it, in order and without anything random."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from guided_mt.data import Batch, load_images
from guided_mt.data.dataset import captions_of
from guided_mt.data.images import from_uint8

from . import StreamedData

VAL_IMAGES = 64  # of the split, from its beginning


def val_batches(data: StreamedData, limit: int = VAL_IMAGES) -> Iterator[Batch]:
    """The first items of the validation split (without one, of the training split), in batches of the training's size."""
    source = data.val_source or data.source
    loaded = load_images(source, data.image_size, limit=limit)
    for start in range(0, len(loaded.images), data.batch_size):
        part = slice(start, start + data.batch_size)
        labels = None if loaded.labels is None else loaded.labels[part]
        present = {name: x[part] for name, x in loaded.present.items()}
        numbers = loaded.indices[part]
        captions = captions_of(source, numbers.numpy())
        yield Batch(loaded.images[part], labels, numbers, numbers, present=present, captions=captions)


def val_sides(data: StreamedData, count: int) -> tuple[list[Tensor], Tensor | None]:
    """The first images of the validation split by side, float32 [B, 3, H, W] in [-1, 1] each, and their classes [B] if any."""
    source = data.pixel_source(data.splits[1] or data.splits[0])
    loaded = load_images(source, data.image_size, limit=count)
    images = from_uint8(loaded.images)
    return list(images.chunk(images.shape[1] // 3, dim=1)), loaded.labels
