"""Between images and latents: the frozen first stage and the scale factor of LDM's diffusion models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.data import Batch
from guided_mt.data.images import from_uint8
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.generation.drawing import refuse_not_finite
from guided_mt.modalities import Images
from guided_mt.modalities.settings import MTConfig

from ..data.latent_cache import unpack
from ..first_stage.first_stages import Autoencoder
from ..runs.targets import instantiate

# Pixels in a pass of the first stage, four images of 512 x 512: of all that is in memory in a step its feature maps at full
# size are else the most, 0.7 GiB an image.
PASS = 2**20


class LatentCodec(nn.Module):
    """Images to scaled latents and back: the `modalities.Space` of a latent model.

    channels, size: of a latent; sides: the names of the images of an item, () for one. random_flip: whether `images` mirrors half
    of the items. scale_known: whether scale_factor needs no measuring.
    """

    sides: tuple[str, ...]
    channels: int
    size: int
    limit = 5.0  # scaled latents have about unit variance
    first_stage_model: Autoencoder
    scale_factor: Tensor
    scale_known: bool
    random_flip = False

    def _add_first_stage(self, config: Mapping[str, Any]) -> None:
        """After the network, so that state dict and initial weights have LDM's order. Raises UserError."""
        self.first_stage_model = instantiate(config, "model.params.first_stage_config")
        if not isinstance(self.first_stage_model, Autoencoder):
            raise UserError(f"model.params.first_stage_config: {config['target']} is no first stage")
        self.first_stage_model.requires_grad_(False).eval()

    def takes(self, names: Sequence[str]) -> bool:
        """Whether these are the sides, in this order. The image itself may have another name where the model gives it none."""
        unnamed = bool(self.sides) and self.sides[0] == MTConfig.mt_image
        return list(names[1:]) == list(self.sides[1:]) and (unnamed or list(names) == list(self.sides))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a latent, (C, h, w)."""
        return (self.channels, self.size, self.size)

    @property
    def device(self) -> torch.device:
        """The device of the latents."""
        return self.scale_factor.device

    def encode(self, images: Tensor, streams: SampleStreams | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w], scaled. streams: draw from the posterior; None: its mean."""
        with self._exact():
            moments = [self.first_stage_model.encode_moments(part) for part in images.split(_at_a_time(images))]
            logvars = [logvar for _, logvar in moments if logvar is not None]
            mean = torch.cat([mean for mean, _ in moments])
            return self.scale_factor * _posterior(mean, torch.cat(logvars) if logvars else None, streams)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] in [-1, 1]. Raises drawing.NotFinite."""
        with self._exact():
            decode, size = self.first_stage_model.decode, self.first_stage_model.downsampling
            images = torch.cat([decode(part) for part in (z / self.scale_factor).split(_at_a_time(z, size))])
        refuse_not_finite("decoded images", images)
        return images.clamp(-1, 1)

    @contextlib.contextmanager
    def _exact(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def images(self, batch: Batch, streams: SampleStreams) -> Images:
        """The batch as modalities see it: its sides as scaled latents [B, C, h, w], mirrored alike; from pixels uint8
        [B, 3 per side, H, W], or from a cache float [B, sides x mirrorings x moments x C, h, w]."""
        flip = (streams.uniform() < 0.5) & self.random_flip
        count = max(1, len(self.sides))
        pixels = None
        if batch.images.dtype == torch.uint8:
            whole = from_uint8(batch.images)
            whole = torch.where(flip.view(-1, 1, 1, 1), whole.flip(-1), whole)
            pixels, *_ = each = whole.chunk(count, dim=1)
            latents = [self.encode(side, streams) for side in each]
        else:
            mirrored = flip.long()
            rows = torch.arange(len(flip), device=flip.device)
            mean, logvar = unpack(batch.images, count, self.channels)
            means = mean[rows, :, mirrored].unbind(1)
            logvars = [None] * count if logvar is None else logvar[rows, :, mirrored].unbind(1)
            latents = [self.scale_factor * _posterior(m, v, streams) for m, v in zip(means, logvars, strict=True)]
        sides = dict(zip(self.sides[1:], latents[1:], strict=True))
        cached = pixels is None
        return Images(latents[0], batch.labels, batch.loaded, sides, batch.present, pixels, cached, flip)


def _at_a_time(x: Tensor, scale: int = 1) -> int:
    """How many of x [B, C, H, W], whose images are `scale` times as large, pass the first stage together."""
    return max(1, PASS // (x.shape[-2] * x.shape[-1] * scale**2))


def _posterior(mean: Tensor, logvar: Tensor | None, streams: SampleStreams | None) -> Tensor:
    """A draw from N(mean, exp(logvar)), or the mean where there is no variance or no source of noise."""
    if logvar is None or streams is None:
        return mean
    return mean + torch.exp(0.5 * logvar) * streams.normal(*mean.shape[1:])
