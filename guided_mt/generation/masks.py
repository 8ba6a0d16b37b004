"""The masks of restoration: `--mask patches:m | half | full | image FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.sources.formats import open_image
from ..data.transforms import to_rgb
from ..diffusion.random import SampleStreams
from ..errors import UserError, reason
from ..modalities import patch_mask


def make_mask(words: Sequence[str] | str, size: int, patch: int, streams: SampleStreams) -> Tensor:
    """float32 [B, 1, size, size], 1 where the image stays and 0 where it is masked, for the samples of `streams`.

    'patches:m': m squares of side `patch` at random places; 'half': the right half; 'full': everything; 'image:FILE' or
    'image FILE': a picture of any size, masked where it is brighter than half. Raises UserError for anything else.
    """
    text = words if isinstance(words, str) else " ".join(words)
    kind, _, value = text.replace("image ", "image:", 1).partition(":")
    batch = len(streams)
    if kind == "patches" and value.isdigit() and int(value) > 0:
        count = torch.full((batch,), int(value), device=streams.device)
        return patch_mask((size, size), patch, count, int(value), streams)
    keep = torch.ones(batch, 1, size, size, device=streams.device)
    if text == "patches:0":
        return keep
    if text == "half":
        keep[..., size // 2 :] = 0
    elif text == "full":
        keep.zero_()
    elif kind == "image" and value:
        keep *= _from_file(value, size).to(streams.device)
    else:
        raise UserError(f"--mask '{text}': write patches:10, half, full, or image FILE")
    return keep


def _from_file(path: str, size: int) -> Tensor:
    try:
        image = to_rgb(open_image(Path(path).read_bytes())).convert("L")
        picture = np.asarray(image.resize((size, size), Image.Resampling.NEAREST))
    except (OSError, ValueError) as error:
        raise UserError(f"--mask image {path}: can't be read ({reason(error)})") from None
    if not (picture > 127).any():
        raise UserError(f"--mask image {path}: masks nothing; white is masked, black stays")
    return torch.from_numpy((picture <= 127).astype(np.float32))
