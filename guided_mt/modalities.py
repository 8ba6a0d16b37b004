"""The second kinds of data. A modality says where its data come from, where they start, how they enter Z and what is lost.

A new one is a class here (or anywhere), a head in `heads.py` and a row in `tasks.TASKS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .gaussian_diffusion import mean_flat
from .images import to_nhwc
from .random import SampleStreams


class Modality:
    """What training and sampling ask of a modality x. B samples; (C, H, W) is the shape of the diffusion space Z."""

    condition_channels = 0  # channels that x adds to the network's input in form X

    def __init__(self, name: str):
        self.name = name

    def from_batch(self, x_start: Tensor, labels: Tensor | None, streams: SampleStreams) -> Tensor:
        """x of a training batch, drawn on the device."""
        raise NotImplementedError

    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        """A first value [B, ...] of an unknown x, for z_0 of `shape` (C, H, W)."""
        raise NotImplementedError

    def uninformative(self, shape: Sequence[int], batch: int, device: torch.device | str) -> Tensor:
        """The x that says nothing about z_0: what form X is given to generate from nothing."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """E(x) [B, C, H, W]."""
        raise NotImplementedError

    def estimate(self, prediction: Tensor) -> Tensor:
        """What an unknown x becomes when its head has spoken: the mean of p(x | z_t)."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, x: Tensor) -> Tensor:
        """KL_i of eq. 6 up to constants, [B]."""
        raise NotImplementedError

    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """log p(x | z_t) under the head's prediction, in nats, [B]; t [B] are original timesteps."""
        raise NotImplementedError

    def picture(self, x: Tensor) -> Tensor | None:
        """x as images [B, 3, H, W] in [-1, 1] for PNG grids; None where it can't be shown."""
        return None

    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        """x as arrays [B, ...] of a sample file, by default one of the modality's name."""
        return {self.name: x.cpu().numpy()}


class ImageModality(Modality):
    """Continuous data of the shape of z_0: identity encoder, squared error, Gaussian head.

    variance: v_t [T], the head's mean squared error at each original timestep; only `log_prob` needs it.
    """

    def __init__(self, name: str, variance: Tensor | np.ndarray | Sequence[float] | None = None, channels: int = 3):
        super().__init__(name)
        self.variance = None if variance is None else torch.as_tensor(variance)
        self.condition_channels = channels

    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        # Mid grey, the mean of x before anything is seen: z_T is then N(0, I), where Algorithm 1 starts.
        return torch.zeros(len(streams), *shape, device=streams.device)

    def uninformative(self, shape: Sequence[int], batch: int, device: torch.device | str) -> Tensor:
        return torch.zeros(batch, *shape, device=device)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def estimate(self, prediction: Tensor) -> Tensor:
        return prediction

    def loss(self, prediction: Tensor, x: Tensor) -> Tensor:
        return mean_flat((prediction - x) ** 2)

    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """log N(x; prediction, v_t I). Raises ValueError where no variance is known."""
        if self.variance is None:
            raise ValueError(
                f"modality '{self.name}' has no head variance; own-head conditioning needs one per timestep"
            )
        if self.variance.device != prediction.device:
            self.variance = self.variance.to(prediction.device)
        v = self.variance.to(prediction.dtype)[t]
        error = ((prediction - x) ** 2).flatten(1)
        return -0.5 * (error.sum(1) / v + error.shape[1] * torch.log(2 * math.pi * v))

    def picture(self, x: Tensor) -> Tensor | None:
        return x if x.shape[1] == 3 else None

    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        return {self.name: to_nhwc(x)}


class MaskedImage(ImageModality):
    """x = the image with m square patches set to mid grey (0 in [-1, 1]), m ~ Uniform{0..max_patches} (appendix E.2).

    patch: side in pixels. A patch's top-left corner is uniform over the image; patches overlap and are cut at the border.
    full_prob: the share of samples with the complete mask, the condition that form X generates from (DESIGN 2.6.3).
    """

    def __init__(
        self,
        name: str = "masked",
        *,
        patch: int,
        max_patches: int = 10,
        full_prob: float = 0.1,
        variance: Tensor | None = None,
        channels: int = 3,
    ):
        super().__init__(name, variance, channels)
        self.patch, self.max_patches, self.full_prob = patch, max_patches, full_prob

    def from_batch(self, x_start: Tensor, labels: Tensor | None, streams: SampleStreams) -> Tensor:
        return x_start * self.keep_mask(x_start.shape[2:], streams)

    def keep_mask(self, size: Sequence[int], streams: SampleStreams) -> Tensor:
        """float32 [B, 1, H, W]: 0 where the image is masked, 1 where it stays."""
        count = streams.integers(self.max_patches + 1)  # (B,)
        full = streams.uniform() < self.full_prob  # (B,)
        mask = patch_mask(size, self.patch, count, self.max_patches, streams)
        return mask * (~full).view(-1, 1, 1, 1)


def patch_mask(size: Sequence[int], patch: int, count: Tensor, most: int, streams: SampleStreams) -> Tensor:
    """float32 [B, 1, H, W], 0 inside the first `count` [B] of `most` patches drawn from `streams`, 1 elsewhere."""
    height, width = size
    corner = streams.uniform(2, most)  # (B, 2, most)
    top, left = (corner[:, 0] * height).long()[..., None], (corner[:, 1] * width).long()[..., None]  # (B, most, 1)
    rows, columns = torch.arange(height, device=corner.device), torch.arange(width, device=corner.device)
    in_rows = (rows >= top) & (rows < top + patch)  # (B, most, H)
    in_columns = (columns >= left) & (columns < left + patch)  # (B, most, W)
    used = torch.arange(most, device=corner.device) < count[:, None]  # (B, most)
    in_rows = (in_rows & used[..., None]).float()
    covered = torch.einsum("bmh,bmw->bhw", in_rows, in_columns.float())
    return (covered == 0).float()[:, None]
