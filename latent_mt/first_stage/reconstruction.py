"""A reconstruction, and how well it gives the images back: PSNR, SSIM, and for painted label maps the share of right pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guided_mt.data import ImageSource

from ..data.pairs import sides_of

# An exact reconstruction counts as one that is off by one grey level in one value of a thousand: 78 dB.
LEAST_ERROR = 1e-3 / 255**2


@dataclass(frozen=True)
class Reconstruction:
    """What a first stage makes of a batch of images in training.

    image: the images again [B, C, H, W]; latent_loss: what its latents cost, 0-dim, as the loss of its kind adds it (KL in nats
    per image, or the codebook's); figures: whole numbers [K] that are summed over batches for its own columns.
    """

    image: Tensor
    latent_loss: Tensor
    figures: Tensor


def figure_names(source: ImageSource) -> list[str]:
    """What `measure` gives for items of a source: val_psnr and val_ssim of every image of an item, by side where it has several,
    then val_accuracy_SIDE of its label maps."""
    sides = sides_of(source)
    each = [
        f"val_{kind}{'_' * bool(side)}{side}" for side in [s.name for s in sides] or [""] for kind in ("psnr", "ssim")
    ]
    return [*each, *(f"val_accuracy_{side.name}" for side in sides if side.palette is not None)]


def measure(true: Tensor, made: Tensor, source: ImageSource) -> Tensor:
    """Items of `source` and their reconstructions, uint8 [B, sides * 3, H, W] -> sum and count of each figure, float64 [K, 2]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    sides = sides_of(source)
    count = max(1, len(sides))
    figures, accuracies = [], []
    for index, (a, b) in enumerate(zip(true.chunk(count, dim=1), made.chunk(count, dim=1), strict=True)):
        x, y = a.float() / 255, b.float() / 255
        error = (x - y).square().flatten(1).mean(dim=1).double()
        psnr = -10 * error.clamp(min=LEAST_ERROR).log10()  # dB
        ssim = structural_similarity_index_measure(y, x, data_range=1.0, reduction="none").double()
        figures += [torch.stack([values.sum(), torch.full_like(values[0], len(x))]) for values in (psnr, ssim)]
        if sides and sides[index].palette is not None:
            accuracies.append(label_accuracy(a, b, sides[index].palette))
    return torch.stack([*figures, *accuracies])


def label_accuracy(true: Tensor, made: Tensor, palette: Any) -> Tensor:
    """(right pixels, pixels that aren't void), float64 [2]: the nearest palette colour in RGB of `made` against that of `true`,
    uint8 [B, 3, H, W] each."""
    colours = torch.as_tensor(palette.colours, device=true.device).double()  # the scored classes, then void
    classes = [torch.cdist(x.permute(0, 2, 3, 1).reshape(-1, 3).double(), colours).argmin(dim=1) for x in (true, made)]
    scored = classes[0] < len(palette.classes)
    return torch.stack([((classes[0] == classes[1]) & scored).sum(), scored.sum()]).double()
