"""What a data set is: a folder, an archive, a cache of latents; and single pictures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guided_mt.data import ImageSource, open_source
from guided_mt.errors import UserError, reason

from .facts import Facts, shortened, size_of


def describe(path: str) -> Facts:
    """Anything that --data_dir takes. Raises UserError for all else."""
    source = _opened(path)
    pairs = _pairs(path)
    facts = Facts(path, f"a data set of {len(source):,} images")
    facts.add("pairs", pairs)
    height, width = _size_of_first(source)
    facts.add("first image", f"{source.name(0)}, {height} x {width} pixels")
    if source.labels is None:
        facts.add("classes", None if pairs else "none")
    elif pairs:
        facts.add("folders", shortened(list(source.class_names)))
    else:
        facts.add("classes", {"number": len(source.class_names), "names": shortened(list(source.class_names))})
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names))
        facts.add("images per class", f"{counts.min():,} to {counts.max():,}")
    place = Path(path).expanduser()
    facts.add("size on disk", size_of(place) if place.exists() else None)
    if pairs:
        facts.command("a latent model of the pairs", "latent-train", "--config", "FILE", f"data.params.path={path}")
        facts.command("its first stage", "autoencoder-train", "--config", "FILE", f"data.params.path={path}")
        return facts
    task = ("--mt_task", "masked" if source.labels is None else "masked,label")
    size = min(64, height, width)
    facts.command("train on it", "train", "--data_dir", path, "--image_size", size, *task, "--log_dir", "runs/NAME")
    if place.exists() and place.suffix != ".npz":
        name = place.resolve().stem.lstrip("-") or "images"
        facts.command("crop it once, to be read faster", "prepare", path, f"{name}-{size}.zip", "--size", size)
    return facts


def _opened(path: str) -> ImageSource:
    """Raises UserError for what is no data set; of a folder of archives, which there are."""
    try:
        return open_source(path)
    except UserError as error:
        place = Path(path).expanduser()
        inside = sorted(str(file) for suffix in ("tar", "zip", "npz") for file in place.glob(f"*.{suffix}"))
        if not inside:
            raise
        raise UserError(f"{error}, or one of what is in it: {shortened(inside)}") from None


def _size_of_first(source: ImageSource) -> tuple[int, int]:
    try:
        height, width = np.asarray(source.read(0)).shape[:2]
    except UserError:
        raise
    except Exception as error:  # decoders raise nearly anything
        raise UserError(f"{source.path}: its first image, {source.name(0)}, is broken ({reason(error)})") from None
    return height, width


def _pairs(path: str) -> str:
    """Of pairs in one of the known layouts, what they are; '' for single images."""
    from latent_mt.data import open_pairs

    found = []
    log = logging.getLogger("guided_mt.data")
    level = log.level
    log.setLevel(logging.ERROR)  # what is left out has been said once
    try:
        for split in ("train", "val", "test"):
            with contextlib.suppress(UserError):
                pairs = open_pairs(path, split=split)
                found.append(f"{len(pairs):,} of {' and '.join(pairs.side_names)} in {split}")
    finally:
        log.setLevel(level)
    return "; ".join(found)


def cache(path: str) -> Facts:
    """A cache of latents, or one split of it."""
    from latent_mt.data import LatentCache

    place = Path(path).expanduser()
    whole = (place / "latents.bin").exists()
    folders = [place] if whole else sorted(entry.parent for entry in place.glob("*/latents.bin"))
    caches = [LatentCache(folder) for folder in folders]
    first = caches[0]
    _, sides, _, moments, channels, height, width = first.shape
    facts = Facts(path, "latents of a data set, encoded once for training")
    facts.add("items", {folder.name: len(one) for folder, one in zip(folders, caches, strict=True)})
    facts.add("sides", [side.name for side in first.sides] if sides > 1 else "one image each")
    facts.add("latents", f"{channels} x {height} x {width}, of images of {first.image_size} pixels")
    facts.add("stored", f"{'mean and log variance' if moments == 2 else 'latents'}, plain and mirrored, {first.stored}")
    facts.add("classes", _classes(first.class_names, first.labels))
    facts.add("first stage", first.first_stage[:12])
    facts.add("size on disk", size_of(place))
    folder = place.parent if whole else place
    facts.command("train on them", "latent-train", "--config", "FILE", f"data.params.latents={folder}")
    return facts


def _classes(names: Sequence[str], labels: Any) -> str:
    return shortened(list(names)) if labels is not None else "none"


def picture(path: str) -> Facts:
    """A single image. Raises UserError for a broken one."""
    from PIL import Image

    place = Path(path).expanduser()
    try:
        with Image.open(place) as image:
            (width, height), mode, kind = image.size, image.mode, image.format
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path}: is no whole image ({error})") from None
    facts = Facts(path, f"a {kind} picture of {height} x {width} pixels ({mode})")
    facts.add("size on disk", size_of(place))
    words = ("--model_path", "RUN", "--data_dir", "IMAGES", "--mask", "image", path)
    facts.command("mask images by its white part", "restore", *words)
    return facts
