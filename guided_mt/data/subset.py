"""Some images of a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from typing_extensions import override

from .sources import ImageSource


class Subset(ImageSource):
    """Images number `numbers` [n] of a source, in that order."""

    def __init__(self, source: ImageSource, numbers: np.ndarray):
        self.source, self.numbers = source, numbers
        self.path, self.class_names, self.is_array = source.path, source.class_names, source.is_array
        self.dtype, self.side_names = source.dtype, source.side_names
        self.present = {name: present[numbers] for name, present in source.present.items()}
        self.labels = None if source.labels is None else source.labels[numbers]
        self.captions = None if source.captions is None else _Chosen(source.captions, numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def read(self, index: int) -> Image.Image | np.ndarray:
        return self.source.read(int(self.numbers[index]))

    @override
    def item_shape(self, image_size: int) -> tuple[int, ...]:
        return self.source.item_shape(image_size)

    @override
    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        return self.source.decode(int(self.numbers[index]), image_size, uniforms)

    @override
    def name(self, index: int) -> str:
        return self.source.name(int(self.numbers[index]))

    @override
    def without_class(self) -> str:
        return self.source.without_class()


class _Chosen(Sequence[Sequence[str]]):
    """Captions number `numbers` [n], read when they are asked for."""

    def __init__(self, captions: Sequence[Sequence[str]], numbers: np.ndarray):
        self.captions, self.numbers = captions, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def __getitem__(self, index: int) -> Sequence[str]:  # type: ignore[override]  # one by one alone
        return self.captions[int(self.numbers[index])]


def spread(source: ImageSource, count: int) -> Subset:
    """`count` images evenly spread over the source, since its first ones are often of one class; all where it has fewer."""
    count = min(count, len(source))
    return Subset(source, np.arange(count) * len(source) // max(1, count))
