"""Encoding a data set once into a cache of latents (latent_mt.data.latent_cache), and which autoencoder made one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from guided_mt.data import Batch, ImageSource
from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError, reason
from guided_mt.networks.image_encoder import ImageEncoder, weights_hash

from ..data.latent_cache import (
    ADDED_LATER,
    FORMAT,
    LATENTS,
    META,
    NAMES,
    PRECISIONS,
    VECTORS,
    LatentCache,
    Moments,
    beside_of,
    entry_of,
)
from ..data.ordered import ordered_batches
from ..data.pairs import Side, sides_of

__all__ = ["PRECISIONS", "LatentCache", "Moments", "encode_items", "first_stage_hash", "write_cache"]


class FirstStage(Protocol):
    """What the cache needs of an autoencoder."""

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, 3, H, W] in [-1, 1] -> mean and log variance [B, C, h, w]; no log variance where the latent has no noise."""


def first_stage_hash(first_stage: nn.Module) -> str:
    """SHA-256 of the weights: names, shapes and float32 values, wherever they lie."""
    return weights_hash(first_stage)


def write_cache(
    source: ImageSource,
    first_stage: nn.Module,
    image_size: int,
    folder: Path,
    *,
    batch_size: int = 16,
    precision: str = "float32",
    num_workers: int = 2,
    encoder: ImageEncoder | None = None,
    described: Mapping[str, str] | None = None,
) -> LatentCache:
    """Encode every item of `source`, centre-cropped to image_size, into `folder`, one split of a cache.

    source: single images, pairs, or any number of sides. first_stage: see FirstStage; on its device. batch_size: items at once.
    encoder: on its device; its vectors of each item's first side are stored too. described: {source, arch, weights} of it.
    A cache of the same images by the same first stage is left as it is. Written beside `folder` and renamed when complete;
    broken images are left out with a warning. Raises UserError.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
    check_size = getattr(first_stage, "check_size", None)
    if check_size is not None:
        check_size(image_size, image_size)
    sides = sides_of(source) or (Side("image"),)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "first_stage": first_stage_hash(first_stage),
        "source": str(source.path),
        "items": len(source),
        "image_size": image_size,
        "precision": precision,
        "sides": [entry_of(side) for side in sides],
        "direction": getattr(source, "direction", "AtoB"),
        "class_names": list(source.class_names),
        "beside": beside_of(source),
        "representation": None,
    }
    if encoder is not None:
        meta["representation"] = {**(described or {}), "size": encoder.size, "digest": encoder.digest.hex()}
    if folder.exists():
        return _same_cache(folder, meta)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        batches = ordered_batches(source, image_size, batch_size, num_workers)
        shape, kept = _encode_into(unfinished, batches, len(source), first_stage, len(sides), precision, encoder)
        meta["shape"] = shape
        meta["labels"] = None if source.labels is None else source.labels[kept].tolist()
        meta["present"] = {name: present[kept].tolist() for name, present in source.present.items()}
        (unfinished / NAMES).write_text(json.dumps([source.name(k) for k in kept]))
        (unfinished / META).write_text(json.dumps(meta, indent=1))
        os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return LatentCache(folder)


@torch.no_grad()
def encode_items(first_stage: FirstStage, images: Tensor, sides: int) -> Tensor:
    """uint8 [B, 3 * sides, H, W] -> [B, sides, 2, moments, C, h, w]; mirroring 1 is left to right."""
    x = from_uint8(images).unflatten(1, (sides, -1))
    x = torch.stack([x, x.flip(-1)], dim=2)  # [B, sides, 2, 3, H, W]
    moments = [m for m in first_stage.encode_moments(x.flatten(0, 2)) if m is not None]
    return torch.stack(moments, dim=1).unflatten(0, x.shape[:3])


def encode_vectors(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """uint8 [B, 3 * sides, H, W] -> float32 [B, 2, D], of the first side; mirroring 1 is left to right."""
    x = from_uint8(images[:, :3])
    return torch.stack([encoder(x), encoder(x.flip(-1))], dim=1)


def _encode_into(
    folder: Path,
    batches: Generator[Batch, None, None],
    count: int,
    first_stage: Any,
    sides: int,
    precision: str,
    encoder: ImageEncoder | None,
) -> tuple[list[int], list[int]]:
    """Write the latents of all `batches`, and what `encoder` makes of them; (the latents' shape, the numbers of their items, of
    `count` in all)."""
    first_stage.eval()
    device = next((p.device for p in first_stage.parameters()), torch.device("cpu"))
    kept: list[int] = []
    shape: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        out = stack.enter_context((folder / LATENTS).open("wb"))
        also = None if encoder is None else stack.enter_context((folder / VECTORS).open("wb"))
        bar = stack.enter_context(tqdm(total=count, unit="item", disable=None))
        for batch in batches:
            latents = encode_items(first_stage, batch.images.to(device), sides)
            shape = list(latents.shape[1:])
            stored = latents.cpu().numpy().astype(precision)
            if not np.isfinite(stored).all():
                raise UserError(
                    f"{folder}: latents that are NaN, or beyond what {precision} can hold; take precision float32, or other "
                    "weights of the first stage"
                )
            out.write(stored.tobytes())
            if also is not None and encoder is not None:
                also.write(encode_vectors(encoder, batch.images.to(device)).cpu().numpy().tobytes())
            kept += batch.indices.tolist()
            bar.update(len(batch.indices))
        for file in (out, also) if also else (out,):
            file.flush()
            os.fsync(file.fileno())
    return [len(kept), *shape], kept


def _same_cache(folder: Path, meta: dict[str, Any]) -> LatentCache:
    """The cache that is there. Raises UserError where it was made of something else, or otherwise."""
    cache = LatentCache(folder)
    # What JSON makes of it: tuples are lists there.
    known = ADDED_LATER | cache.meta
    # The order of class ids may be that of an earlier version; the labels that are there go with it.
    if sorted(known["class_names"]) == sorted(meta["class_names"]):
        meta = meta | {"class_names": known["class_names"]}
    different = [key for key, value in json.loads(json.dumps(meta)).items() if known.get(key) != value]
    if different:
        raise UserError(
            f"{folder}: a cache is there already, with another {' and '.join(different)}; remove it, or write elsewhere"
        )
    return cache
