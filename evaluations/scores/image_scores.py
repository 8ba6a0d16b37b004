"""Distances between images: PSNR, SSIM and errors, over a region of each or the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError
from ..features.device import without_tf32

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
    similarity = _torchmetrics_ssim()
    import torch

    # In single precision, 60 times faster on a CPU. Against double: about 1e-6, up to 6e-4 too high in nearly white images.
    a, b = (torch.as_tensor(x).permute(0, 3, 1, 2).float() for x in (a, b))
    with without_tf32():
        _, found = similarity(
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
    return _mean_in(found.double().permute(0, 2, 3, 1), mask)


def whole_image_scores(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """PSNR (dB), SSIM and mean absolute error of whole images, float32 [N] each: the numbers of image translation.

    made, true: uint8 [N, H, W, 3]. PSNR and error are of pixels in [-1, 1]; SSIM is of [0, 1], without the border that its window
    can't fill, which is where it differs from `ssim` over a mask of ones. Raises EvaluationError without torchmetrics.
    """
    import torch

    similarity = _torchmetrics_ssim()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = (images.permute(0, 3, 1, 2).float() / 127.5 - 1 for images in (made, true))
    light = (x + 1) / 2, (y + 1) / 2
    return {
        "psnr": torch.stack([peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(x, y, strict=True)]),
        "ssim": similarity(*light, data_range=1.0, reduction="none").reshape(-1),
        "mae": (x - y).abs().flatten(1).mean(dim=1),
    }


def _torchmetrics_ssim() -> Callable[..., Any]:
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise EvaluationError(
            f"package torchmetrics cannot be imported ({error}): pip install '.[eval]', or leave out ssim with --metrics"
        ) from error
    return structural_similarity_index_measure


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
