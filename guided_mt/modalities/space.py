"""The diffusion space Z, where z_0 and the encodings live: the one thing that differs between pixels and latents."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..diffusion.random import SampleStreams


class Space(Protocol):
    """From images to Z and back. An element of Z is [channels, size, size]; images are [B, 3, S, S] in [-1, 1].

    limit: what the absolute values of z_0 hardly exceed, where an estimate of it has to be cut.
    """

    @property
    def channels(self) -> int:
        """C of Z."""

    @property
    def size(self) -> int:
        """Height and width of Z."""

    @property
    def limit(self) -> float:
        """What the absolute values of z_0 hardly exceed."""

    def encode(self, images: Tensor, streams: SampleStreams | None = None) -> Tensor:
        """Z [B, channels, size, size] of images. streams: draw where the encoding is random; None: its mean."""

    def decode(self, z: Tensor) -> Tensor:
        """The images of elements of Z."""


class Pixels:
    """Z is the images themselves: `size` pixels a side."""

    channels = 3
    limit = 1.0

    def __init__(self, size: int = 0):
        self.size = size

    def encode(self, images: Tensor, streams: SampleStreams | None = None) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] are their own z."""
        return images

    def decode(self, z: Tensor) -> Tensor:
        """z [B, 3, S, S] is its own image."""
        return z
