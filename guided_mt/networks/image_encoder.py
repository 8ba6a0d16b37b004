"""A frozen image encoder: CLIP's image tower with its own preprocessing, from images on the device to vectors; and its text tower.

It is no part of any model: it has no gradient, is in no checkpoint, and no wrapper of processes sees it. What is kept of it is its
name and the hash of its weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .clip import build_clip, clip_config, open_clip, tokenize, what_is_cut

UNTRAINED = "untrained"  # in the place of weights: random ones, the same at each call
_SEED = 0
TEXTS = 256  # that are encoded at once
log = logging.getLogger("guided_mt")


@dataclass(frozen=True)
class Preprocessing:
    """From images to what an image tower reads: resized so that the shorter side fits, centre crop, mean and standard deviation.

    size: (height, width) in pixels; mean, std: of channels in [0, 1]; interpolation: bicubic or bilinear, both with antialias;
    said_by: where mean, std and interpolation come from. open_clip's other ways to resize (squash, longest) are the same for
    square images.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    said_by: str

    @classmethod
    def of(cls, arch: str | Mapping[str, Any], version: str | None = None) -> Preprocessing:
        """That of an architecture and its weights (`clip.build_clip`).

        open_clip has it in the table of its downloads, by the name of the weights. A file has no such name: then it is what all
        weights that the table has for this architecture agree on, or what a mapping says as `preprocess_cfg`. Where neither
        says it, it is OpenAI's, which is open_clip's own default.
        """
        library, config = open_clip(), clip_config(arch)
        default = library.transform.PreprocessCfg()
        found, said_by = dict(config.get("preprocess_cfg") or {}), "the mapping's preprocess_cfg"
        if isinstance(arch, str):
            listed = {tag: _wanted(library, arch, tag) for tag in library.list_pretrained_tags_by_model(arch)}
            alike = len({repr(sorted(wanted.items())) for wanted in listed.values()}) == 1
            if version in listed:
                found, said_by = listed[version], f"open_clip's table, for {arch} {version}"
            elif alike:
                found, said_by = next(iter(listed.values())), f"open_clip's table, for all weights of {arch}"
        if not found:
            said_by = "OpenAI's, since nothing says which these weights want"
        size = config["vision_cfg"].get("image_size", default.size)
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            (int(height), int(width)),
            tuple(found.get("mean") or default.mean),
            tuple(found.get("std") or default.std),
            str(found.get("interpolation") or default.interpolation),
            said_by,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> float32 [B, 3, *size]."""
        x = (images.float() + 1) / 2
        height, width = self.size
        rows, columns = x.shape[-2:]
        if rows * width > columns * height:
            rows, columns = int(width * rows / columns), width
        else:
            rows, columns = height, int(height * columns / rows)
        x = F.interpolate(x, (rows, columns), mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        x = x[..., top : top + height, left : left + width]
        # By channel, since a tensor of means would be sent to the device each time.
        return torch.stack([(x[:, c] - self.mean[c]) / self.std[c] for c in range(3)], dim=1)

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        size = "x".join(map(str, dict.fromkeys(self.size)))
        return f"{size} pixels, {self.interpolation}, mean {mean}, std {std} ({self.said_by})"


def _wanted(library: Any, arch: str, tag: str) -> dict[str, Any]:
    """mean, std and interpolation of the weights `tag`, as open_clip lists them."""
    listed = library.get_pretrained_cfg(arch, tag)
    return {key: listed[key] for key in ("mean", "std", "interpolation") if listed.get(key)}


class ImageEncoder:
    """Images [B, 3, H, W] in [-1, 1] -> vectors float32 [B, D], as CLIP's `encode_image` gives them, without gradient.

    arch: as in `clip.clip_config`; weights: as `version` of `clip.build_clip`, or UNTRAINED. Built on the CPU in float32; `to`
    moves it and sets its arithmetic. size: D. digest: bytes, the SHA-256 of its weights (`weights_hash`). Raises UserError for
    weights that can't be had or don't fit.
    """

    def __init__(self, arch: str | Mapping[str, Any], weights: str):
        version = None if weights == UNTRAINED else weights
        with torch.random.fork_rng(
            devices=[]
        ):  # building draws initial weights, and whoever calls has numbers of its own
            torch.manual_seed(_SEED)
            clip = build_clip(arch, version, "image").requires_grad_(False)
        self.tower = cast(nn.Module, clip.visual)
        self.preprocessing = Preprocessing.of(arch, version)
        self.size = int(clip_config(arch)["embed_dim"])
        self.digest = bytes.fromhex(weights_hash(self.tower))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        name = arch if isinstance(arch, str) else "a CLIP of its own"
        log.info("images are encoded by %s, %s; %s", name, Path(weights).name, self.preprocessing)

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
        """Itself, moved and with this arithmetic; nothing to do where it is there already."""
        if (device, dtype) != (self.device, self.dtype):
            self.tower.to(device, dtype)
            self.device, self.dtype = device, dtype
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The vectors [B, D] of images [B, 3, H, W]."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tower(self.preprocessing(images).to(self.dtype)).float()


class TextEncoder:
    """Texts -> vectors of unit length [B, D], those that the image tower of the same CLIP is compared with; on the CPU in float32.

    scale: what CLIP multiplies cosines by before the softmax. The arguments are those of ImageEncoder. Raises UserError likewise.
    """

    def __init__(self, arch: str | Mapping[str, Any], weights: str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            self.clip = cast(Any, build_clip(arch, None if weights == UNTRAINED else weights, "text"))
        self.scale = float(self.clip.logit_scale.detach().exp())

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The vectors [B, D] of B texts."""
        ids, cut = tokenize(texts)
        if line := what_is_cut(texts, cut):
            log.warning("%s", line)
        return torch.cat([self.clip.encode_text(part, normalize=True) for part in ids.split(TEXTS)])


def check_width(encoder: ImageEncoder, size: int, where: str) -> None:
    """Raises UserError where the encoder's vectors are not of `size` numbers."""
    if encoder.size != size:
        raise UserError(f"{where}: this encoder makes vectors of {encoder.size} numbers, the model's have {size}")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights: names, shapes and float32 values, wherever they lie."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        values = value.detach().to("cpu")
        values = values.float() if values.is_floating_point() else values.long()
        digest.update(f"{key} {list(values.shape)}\n".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
