"""The second side of a pair as a modality of latent space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from guided_mt.diffusion.random import SampleStreams
from guided_mt.modalities import ImageModality, Images

PAIRED = "paired"
SWAPPED = f"{PAIRED}_swapped"  # the head's tracked variance in role 1, where there are two


class PairedLatent(ImageModality):
    """The other image of a pair, encoded by the same first stage: a latent of the shape of z_0 [B, C, h, w]."""

    def __init__(self, channels: int, variance: Tensor | np.ndarray | Sequence[float] | None = None):
        super().__init__(PAIRED, variance, channels)

    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        return images.loaded[self.name]

    def picture(self, x: Tensor) -> Tensor | None:
        return None  # a latent is seen only after decoding

    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        return {self.name: x.cpu().numpy().astype(np.float32)}
