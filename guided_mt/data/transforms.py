"""Any image to uint8 RGB at the training size, with ADM's crops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """RGB as ADM makes it: alpha is dropped, EXIF orientation ignored, of several frames the first is taken.

    16-bit grey is scaled to 8 bits. Raises ValueError for pixels that are no colours: floating-point and 32-bit ones.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("32-bit pixels")
        image = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; the direct way prints a warning per image
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy one that is RGB already


def center_crop_arr(image: Image.Image | np.ndarray, image_size: int) -> np.ndarray:
    """ADM's centre crop: the short side to `image_size`, then the middle. uint8 [image_size, image_size, 3]."""
    if isinstance(image, np.ndarray) and image.shape == (image_size, image_size, 3):
        return image
    return crop_window(resize_short_side(to_rgb(image), image_size), image_size)


def random_crop_arr(
    image: Image.Image | np.ndarray,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    *,
    uniforms: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """ADM's random crop: a crop of `min_crop_frac` to `max_crop_frac` of the short side, scaled to `image_size`.

    uniforms: three numbers in [0, 1) that choose the scale, the top and the left. uint8 [image_size, image_size, 3].
    """
    short_side = random_short_side(image_size, min_crop_frac, max_crop_frac, uniform=uniforms[0])
    return crop_window(resize_short_side(to_rgb(image), short_side), image_size, uniforms)


def random_short_side(
    image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0, *, uniform: float
) -> int:
    """What ADM's random crop makes of the image's short side, pixels."""
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    return smallest + int(uniform * (largest - smallest + 1))


def crop_window(array: np.ndarray, image_size: int, uniforms: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """The middle of an array [H, W, ...], or the window that uniforms[1] and uniforms[2] place: [image_size, image_size, ...]."""
    spare_height, spare_width = array.shape[0] - image_size, array.shape[1] - image_size
    if uniforms is None:
        top, left = spare_height // 2, spare_width // 2
    else:
        top, left = int(uniforms[1] * (spare_height + 1)), int(uniforms[2] * (spare_width + 1))
    return array[top : top + image_size, left : left + image_size]


def sizes_to(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """ADM's steps to a short side of `size`: halved while the result stays at least that, then the last size. (width, height)."""
    steps = [(width, height)]
    while min(steps[-1]) >= 2 * size:
        steps.append((steps[-1][0] // 2, steps[-1][1] // 2))
    width, height = steps[-1]
    scale = size / min(width, height)
    return [*steps[1:], (round(width * scale), round(height * scale))]


def resize_short_side(image: Image.Image, size: int, last: tuple[int, int] | None = None) -> np.ndarray:
    """Halve with BOX while the result stays at least `size`, then BICUBIC. uint8 [H, W, 3], min(H, W) = size.

    last: (width, height) to end at, where that of another image is to be met exactly.
    """
    *halves, own = sizes_to(*image.size, size)
    for half in halves:
        image = image.resize(half, resample=Image.Resampling.BOX)
    size_of_last = last or own
    return np.asarray(
        image if image.size == size_of_last else image.resize(size_of_last, resample=Image.Resampling.BICUBIC)
    )


def same_aspect(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Equal, or one scaled from the other with its sides rounded to whole pixels. (width, height)."""
    if a[0] == b[0] or a[1] == b[1]:
        return a == b
    return abs(a[0] * b[1] - a[1] * b[0]) < max(*a, *b)
