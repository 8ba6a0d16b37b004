"""Any image to uint8 RGB at the training size, with ADM's crops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """RGB as ADM makes it: alpha is dropped, EXIF orientation ignored; 16-bit grey keeps its upper 8 bits' scale."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; the direct way prints a warning per image
    return image.convert("RGB")


def center_crop_arr(image: Image.Image | np.ndarray, image_size: int) -> np.ndarray:
    """ADM's centre crop: the short side to `image_size`, then the middle. uint8 [image_size, image_size, 3]."""
    if isinstance(image, np.ndarray) and image.shape == (image_size, image_size, 3):
        return image
    array = _resize_short_side(to_rgb(image), image_size)
    top, left = (array.shape[0] - image_size) // 2, (array.shape[1] - image_size) // 2
    return array[top : top + image_size, left : left + image_size]


def random_crop_arr(
    image: Image.Image | np.ndarray,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    *,
    uniforms: Sequence[float],
) -> np.ndarray:
    """ADM's random crop: a crop of `min_crop_frac` to `max_crop_frac` of the short side, scaled to `image_size`.

    uniforms: three numbers in [0, 1) that choose the scale, the top and the left. uint8 [image_size, image_size, 3].
    """
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    short_side = smallest + int(uniforms[0] * (largest - smallest + 1))
    array = _resize_short_side(to_rgb(image), short_side)
    top = int(uniforms[1] * (array.shape[0] - image_size + 1))
    left = int(uniforms[2] * (array.shape[1] - image_size + 1))
    return array[top : top + image_size, left : left + image_size]


def _resize_short_side(image: Image.Image, size: int) -> np.ndarray:
    """Halve with BOX while the result stays at least `size`, then BICUBIC. uint8 [H, W, 3], min(H, W) = size."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
