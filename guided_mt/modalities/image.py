"""Image-like modalities: continuous data of the shape of z_0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..data import ImageSource, load_images, open_source
from ..data.images import from_uint8, to_nhwc
from ..data.sources.formats import IMAGE_SUFFIXES, open_image
from ..data.transforms import center_crop_arr
from ..diffusion.random import SampleStreams
from ..errors import NPZ_ERRORS, UserError, reason
from .base import Gaussian, Images


class ImageModality(Gaussian):
    """Continuous data of the shape of z_0: identity encoder, squared error, Gaussian head.

    x is an element of Z. Where Z is latents, pictures become one by the space on their way in, and are seen after decoding.
    """

    @override
    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        # Mid grey, the mean of x before anything is seen: z_T is then N(0, I), where Algorithm 1 starts.
        return torch.zeros(len(streams), *shape, device=streams.device)

    @override
    def encode(self, x: Tensor) -> Tensor:
        return x

    @override
    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        return read_pictures(text, self.name, size)

    @override
    def enter(self, given: Tensor) -> Tensor:
        return self.space.encode(given)

    @override
    def picture(self, x: Tensor) -> Tensor | None:
        return self.space.decode(x)

    @override
    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        return {self.name: to_nhwc(self.space.decode(x))}


class PairedImage(ImageModality):
    """Another image of the same thing, one of the sides of each sample (see `roles.Roles`).

    side: what the data call it.
    """

    def __init__(self, name: str, side: str = "", variance: Tensor | None = None):
        super().__init__(name, variance)
        self.side = side or name

    def prepare(self, images: ImageSource) -> None:
        """Raises UserError where the images have no such side."""
        if self.side not in images.side_names[1:]:
            raise UserError(
                f"{images.path}: has no side '{self.side}'; its images come with {', '.join(images.side_names[1:]) or 'no other'}"
            )
        self.partly |= self.side in images.present

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        if self.side not in images.sides:
            raise ValueError(f"modality '{self.name}' needs the images' side '{self.side}'")
        return images.sides[self.side]

    @override
    def present(self, images: Images) -> Tensor | None:
        return images.present.get(self.side)


class MaskedImage(ImageModality):
    """x = the image with m square patches set to mid grey (0 in [-1, 1]), m ~ Uniform{0..max_patches} (appendix E.2).

    patch: side in pixels. A patch's top-left corner is uniform over the image; patches overlap and are cut at the border.
    full_prob: the share of samples with the complete mask, the condition that form X generates from (docs/method.md, section 10.3).
    """

    is_mask = True

    def __init__(
        self,
        name: str = "masked",
        *,
        patch: int,
        max_patches: int = 10,
        full_prob: float = 0.1,
        variance: Tensor | None = None,
    ):
        super().__init__(name, variance)
        self.patch, self.max_patches, self.full_prob = patch, max_patches, full_prob

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        return self.space.encode(images.pixels * self.keep_mask(images.pixels.shape[2:], streams))

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


def read_pictures(text: str, name: str, size: int) -> Tensor:
    """Pictures for `--given NAME=TEXT`, float32 [N, 3, size, size]: one image file, or the images of a folder, archive or .npz.

    An .npz with an array of the modality's name gives that one, as image_sample and image_restore write it; else arr_0. Raises
    UserError.
    """
    path = Path(text).expanduser()
    if path.suffix == ".npz" and path.is_file():
        pictures = _array_of(path, name, f"--given {name}={text}")
        if pictures is not None:
            if pictures.dtype != np.uint8 or pictures.shape[1:] != (size, size, 3) or not len(pictures):
                raise UserError(
                    f"--given {name}={text}: its array '{name}' is {pictures.dtype} {list(pictures.shape)}; "
                    f"this model wants uint8 [N, {size}, {size}, 3]"
                )
            return from_uint8(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        try:
            pixels = center_crop_arr(open_image(path.read_bytes()), size)
        except (OSError, ValueError) as error:
            raise UserError(f"--given {name}={text}: can't be read ({reason(error)})") from None
        return from_uint8(torch.from_numpy(pixels.copy()).permute(2, 0, 1))[None]
    try:
        return from_uint8(load_images(open_source(text), size).images)
    except UserError as error:  # which begins with the path
        raise UserError(f"--given {name}={error}") from None


def _array_of(path: Path, name: str, where: str) -> np.ndarray | None:
    """The array `name` of an .npz, None where it has none. Raises UserError where it can't be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[name] if name in file.files else None
    except NPZ_ERRORS as error:
        raise UserError(f"{where}: can't be read as .npz ({reason(error)})") from None
