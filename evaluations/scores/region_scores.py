"""Distances between images over the masked or unmasked region, and their means over a set of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EvaluationError
from ..features.device import without_tf32
from .perceptual import LEAST_SIZE

if TYPE_CHECKING:
    from torch import Tensor


def mse(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error [N] over the masked pixels of each image, pixels in [-1, 1]; nan where none is masked.

    `a`, `b`: uint8 [N, H, W, 3]; `mask`: bool [N, H, W].
    """
    return _mean_in((_signed(a) - _signed(b)) ** 2, mask)


def mae(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error [N] over the **un**masked pixels of each image, pixels in [-1, 1]; nan where all are masked.

    `a`, `b`: uint8 [N, H, W, 3]; `mask`: bool [N, H, W].
    """
    import torch

    return _mean_in((_signed(a) - _signed(b)).abs(), ~torch.as_tensor(mask))


def psnr(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """10 log10(255^2 / MSE) [N] in dB over the masked pixels of each image; inf where equal, nan where none is masked.

    `a`, `b`: uint8 [N, H, W, 3]; `mask`: bool [N, H, W].
    """
    return 10 * (2**2 / mse(a, b, mask)).log10()  # in [-1, 1] the range is 2


def ssim(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity [N] (Wang et al. 2004), its map averaged over the masked pixels of each image; nan without any.

    Gaussian window of 11x11 and sigma 1.5, K1 = 0.01, K2 = 0.03, range 255, per channel, images mirrored at their borders.
    `a`, `b`: uint8 [N, H, W, 3] with H and W of 6 or more; `mask`: bool [N, H, W].
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise EvaluationError(
            f"package torchmetrics cannot be imported ({error}): pip install '.[eval]', or leave out ssim with --metrics"
        ) from error
    import torch

    # In single precision, 60 times faster on a CPU. Against double: about 1e-6, up to 6e-4 too high in nearly white images.
    a, b = (torch.as_tensor(x).permute(0, 3, 1, 2).float() for x in (a, b))
    with without_tf32():
        _, similarity = structural_similarity_index_measure(
            a,
            b,
            sigma=1.5,
            kernel_size=11,
            k1=0.01,
            k2=0.03,
            data_range=255.0,
            reduction="none",
            return_full_image=True,
        )
    similarity = similarity.double()
    return _mean_in(similarity.permute(0, 2, 3, 1), mask)


def _signed(pixels: Tensor) -> Tensor:
    """uint8 as double in [-1, 1]."""
    import torch

    return torch.as_tensor(pixels).double() / 127.5 - 1


def _mean_in(values: Tensor, region: Tensor) -> Tensor:
    """Mean [N] of `values` [N, H, W, C] where `region` [N, H, W] is True; 0 / 0 = nan for an empty one."""
    import torch

    region = torch.as_tensor(region)
    total = values.masked_fill(~region[..., None], 0).sum(dim=(1, 2, 3))
    return total / (region.sum(dim=(1, 2)) * values.shape[-1])


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
