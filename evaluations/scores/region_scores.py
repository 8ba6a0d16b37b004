"""Table 1's numbers: the metrics of restored images, and their means over a set of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .perceptual import LEAST_SIZE


@dataclass(frozen=True)
class Metric:
    """A column of numbers. `region`: the pixels that count; `pooled`: every pixel weighs the same, not every image."""

    label: str
    unit: str = ""
    digits: int = 4
    least_size: int = 1
    region: str = "full"
    pooled: bool = False


METRICS = {
    "lpips": Metric("LPIPS", least_size=LEAST_SIZE),
    "psnr": Metric("PSNR, masked region", " dB", digits=2, region="masked"),
    "ssim": Metric("SSIM, masked region", least_size=6, region="masked"),
    "mse": Metric("mean squared error, masked region, pixels in [-1, 1]", region="masked", pooled=True),
    "mae": Metric("mean absolute error, unmasked region, of a range of 2", region="unmasked", pooled=True),
}


@dataclass(frozen=True)
class Score:
    """A mean over images (or over the pixels of all of them) and what it is a mean of."""

    mean: float | None  # None: no image has such a number
    standard_error: float | None  # of the mean over images; None for one image and for means over pixels
    images: int
    without_region: int = 0  # left out: no pixel of the region
    exact: int = 0  # left out: PSNR is infinite where every masked pixel is right

    @classmethod
    def of(cls, values: np.ndarray, pixels: np.ndarray | None = None) -> Score:
        """From values [N] of images; weighted with `pixels` [N], their numbers of pixels, it's the mean over pixels."""
        left, exact = np.isnan(values), np.isposinf(values)
        kept = values[~left & ~exact].astype(np.float64)
        count, error = len(kept), None
        if pixels is not None:
            mean = float(np.average(kept, weights=pixels[~left & ~exact])) if count else None
        else:
            mean = float(kept.mean()) if count else None
            error = float(kept.std(ddof=1) / np.sqrt(count)) if count > 1 else None
        return cls(mean, error, count, int(left.sum()), int(exact.sum()))
