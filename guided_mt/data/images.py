"""Between tensors in [-1, 1] and what people look at: uint8 arrays, PNG grids, ADM's .npz files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded down as in ADM, but 1e-4 later, so that float32 gives back the uint8 it came from."""
    return ((x + 1) * 127.5 + 1e-4).clamp(0, 255).to(torch.uint8)


def to_nhwc(x: Tensor) -> np.ndarray:
    """float [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C]."""
    return to_uint8(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(
    images: np.ndarray, columns: int, gap: int = 2, least: int = 64, texts: Sequence[str] | None = None
) -> np.ndarray:
    """uint8 [N, H, W, 3] row by row into one picture; images under `least` pixels are enlarged by a whole factor. texts [N]: what
    is written under each image."""
    factor = max(1, least // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    if texts is not None:
        images = np.concatenate([images, written(texts, images.shape[2])], axis=1)
    count, height, width, channels = images.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):  # a few dozen pictures at most
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def written(texts: Sequence[str], width: int, most: int = 4) -> np.ndarray:
    """Texts in Pillow's own font, black on white, in lines of at most `width` pixels, `most` of them: uint8 [N, h, width, 3], all
    as high as the highest."""
    font = ImageFont.load_default()
    lines = [_in_lines(text, width, font)[:most] for text in texts]
    height = 12 * max(1, *map(len, lines))
    strips = np.empty((len(texts), height, width, 3), dtype=np.uint8)
    for strip, own in zip(strips, lines, strict=True):  # a few dozen at most
        picture = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(picture).multiline_text((1, 0), "\n".join(own), fill="black", font=font, spacing=2)
        strip[...] = np.asarray(picture)
    return strips


def _in_lines(text: str, width: int, font: Any) -> list[str]:
    """A text's words in lines that are `width` pixels wide, if no word is wider. What the font can't write is a question mark."""
    lines: list[str] = []
    for word in text.encode("latin-1", "replace").decode("latin-1").split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width - 2:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write a picture, uint8 [H, W, 3] or [H, W]; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write all arrays under a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any name for an option
    os.replace(temporary, path)
