"""Sides that are computed from a photo instead of read: edges, a blurred or a grey picture of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter
from typing_extensions import override

from guided_mt.errors import UserError, nearest

from .pairs import PairSource, Side

_EDGE_BLUR = 0.7  # standard deviation in pixels, before differences are taken: JPEG blocks and grain are no edges
_EDGE_FLOOR, _EDGE_FULL = 5.0, 40.0  # differences per pixel, of 255, that are drawn black and white


def edges(image: np.ndarray) -> np.ndarray:
    """Sobel's magnitude of the square root of the luma, white on black. uint8 [s, s, 3] -> uint8 [s, s, 3].

    The root draws the edges within shadows too, which the luma itself would lose beside those against the sky.
    """
    luma = np.asarray(_luma(image).filter(ImageFilter.GaussianBlur(_EDGE_BLUR)), dtype=np.float32)
    y = np.pad(np.sqrt(255 * luma), 1, mode="edge")  # [s + 2, s + 2], 0 to 255
    smooth_rows = (y[:-2] + 2 * y[1:-1] + y[2:]) / 4  # [s, s + 2]
    smooth_columns = (y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]) / 4
    across = (smooth_rows[:, 2:] - smooth_rows[:, :-2]) / 2
    down = (smooth_columns[2:] - smooth_columns[:-2]) / 2
    strength = (np.hypot(across, down) - _EDGE_FLOOR) / (_EDGE_FULL - _EDGE_FLOOR)
    return _three(np.rint(255 * strength.clip(0, 1)).astype(np.uint8))


def blurred(image: np.ndarray) -> np.ndarray:
    """Gaussian blur of radius s / 16. uint8 [s, s, 3] -> uint8 [s, s, 3]."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(len(image) / 16)))


def grey(image: np.ndarray) -> np.ndarray:
    """The luma, three times. uint8 [s, s, 3] -> uint8 [s, s, 3]."""
    return _three(np.asarray(_luma(image)))


# {name: a pure function of a cropped photo, uint8 [s, s, 3] -> uint8 [s, s, 3]}. A new row is a new value of `computed`.
FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"edges": edges, "blurred": blurred, "grey": grey}


class Computed(PairSource):
    """Pairs, and after their two sides those that `filters` {side: name in FILTERS} compute from the first photo among them.

    They are made of the photo as it was cropped. Raises UserError for a filter there isn't, and a name that is taken.
    """

    def __init__(self, pairs: PairSource, filters: Mapping[str, str]):
        check_filters(filters)
        for side in filters:
            if side in pairs.side_names:
                raise UserError(f"data.params.computed: {pairs.path} has a side {side} already; give another name")
        super().__init__(pairs.path, [*pairs.sides, *map(Side, filters)], pairs.label_reader)
        self.pairs, self.filters, self.direction = pairs, dict(filters), pairs.direction
        self._photo = next(k for k, side in enumerate(pairs.sides) if side.kind == "image")

    def __len__(self) -> int:
        return len(self.pairs)

    @override
    def name(self, index: int) -> str:
        return self.pairs.name(index)

    @override
    def label_map(self, index: int, image_size: int) -> np.ndarray:
        return self.pairs.label_map(index, image_size)

    @override
    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        read = self.pairs.decode(index, image_size, uniforms)
        photo = np.ascontiguousarray(read[3 * self._photo : 3 * self._photo + 3].transpose(1, 2, 0))
        made = [FILTERS[name](photo).transpose(2, 0, 1) for name in self.filters.values()]
        return np.concatenate([read, *made])


def check_filters(filters: Mapping[str, str]) -> None:
    """Raises UserError for a filter there isn't."""
    for side, name in filters.items():
        if name not in FILTERS:
            raise UserError(
                f"data.params.computed.{side} {name!r}: must be one of {', '.join(FILTERS)}{nearest(str(name), FILTERS)}"
            )


def _luma(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).convert("L")


def _three(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2)
