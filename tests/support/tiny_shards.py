"""Shards as img2dataset writes them, of plain images whose colour says which sample they are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 16


def colour(shard: int, sample: int) -> tuple[int, int, int]:
    return (shard, sample, 7)


def png(shard: int, sample: int, width: int = SIZE, height: int = SIZE) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), colour(shard, sample), np.uint8)).save(content, "png")
    return content.getvalue()


def sample_of(image: np.ndarray) -> tuple[int, int]:
    """(shard, sample) of an image [3, s, s]."""
    return int(image[0, 0, 0]), int(image[1, 0, 0])


def files_of(shard: int, sample: int) -> dict[str, bytes]:
    """{suffix: content} of a sample. The .json says its size, 10 * sample for an aesthetic score and two captions."""
    described = {
        "width": SIZE,
        "height": SIZE + sample,
        "AESTHETIC_SCORE": 10 * sample,
        "pwatermark": None if sample == 0 else sample / 100,
        "texts": [f"one {shard} {sample}", f"two {shard} {sample}"],
    }
    return {
        "png": png(shard, sample),
        "txt": f"shard {shard} sample {sample}".encode(),
        "json": json.dumps(described).encode(),
    }


def write_shards(
    folder: Path,
    counts: tuple[int, ...] = (5, 9, 1, 7),
    files: Callable[[int, int], Mapping[str, bytes]] = files_of,
) -> str:
    """Write shards of so many samples; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for sample in range(count):
                for suffix, content in files(shard, sample).items():
                    add(tar, f"{shard:05d}{sample:04d}.{suffix}", content)
    return f"{folder}/{{00000..{len(counts) - 1:05d}}}.tar"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry: Any = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
