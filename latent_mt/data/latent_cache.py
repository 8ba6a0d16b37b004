"""Latents encoded once, read by memory map: mean and log variance of every image, plain and mirrored.

    FOLDER/SPLIT/{latents.bin, meta.json, names.json}    latents.bin: [N, sides, 2 mirrorings, 1 or 2 moments, C, h, w]
    FOLDER/SPLIT/representation.bin, where asked for     float32 [N, 2 mirrorings, D], of the first side

Written by first_stage.latents. What is random stays random: training draws the latent from mean and log variance anew each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from typing_extensions import override

from evaluations.files.palettes import LabelClass, Palette
from guided_mt.data import Sides
from guided_mt.data.sources import ImageSource
from guided_mt.data.subset import Subset
from guided_mt.errors import UserError, reason

from .computed import Computed
from .pairs import Side

FORMAT = 1
PRECISIONS = ("float32", "float16")  # of latents.bin
LATENTS, META, NAMES, VECTORS = "latents.bin", "meta.json", "names.json", "representation.bin"
# Keys that caches of version 0.1 have not, as they mean it.
ADDED_LATER: dict[str, Any] = {"beside": {}, "present": {}, "representation": None}


class Moments(NamedTuple):
    """float32 [B, sides, 2, C, h, w]; mirroring 1 is left to right."""

    mean: Tensor
    logvar: Tensor | None


class StoredVectors:
    """guided_mt's `EncodedVectors` in a file float32 [N, 2, D]: what a frozen encoder made of each item, as it makes it.

    described: {source, arch, weights, digest, size}. Raises ValueError where the file has another size.
    """

    def __init__(self, file: Path, count: int, described: Mapping[str, Any]):
        self.file, self.described = file, dict(described)
        self.shape = (count, 2, int(described["size"]))
        self._map: np.ndarray | None = None
        if file.stat().st_size != 4 * math.prod(self.shape):
            raise ValueError(f"{file.name} is not of {count} vectors of {self.shape[2]} numbers, plain and mirrored")

    def read(self, indices: np.ndarray) -> np.ndarray:
        """float32 [B, 2, D] of the items of these numbers [B]; mirroring 1 is left to right."""
        if self._map is None:
            self._map = np.memmap(self.file, np.float32, "r", shape=self.shape)
        return np.ascontiguousarray(self._map[indices])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_map": None}


class LatentCache(ImageSource):
    """One split of a cache. Item: float32 [sides * 2 * moments * C, h, w], which `unpack` takes apart.

    sides, direction, class_names, labels and present are those of the source it was made of, beside is its `beside_of`;
    first_stage is the `first_stage_hash` of the autoencoder, encoded what was stored of representations, image_size that of the
    images in pixels; meta is the whole of meta.json. Raises UserError where the folder is no whole cache.
    """

    is_array = True
    dtype = np.dtype(np.float32)

    def __init__(self, path: str | Path, limit: int | None = None):
        self.path = str(path)
        self.folder = Path(path).expanduser().absolute()
        self.meta = _read_json(self.folder, META)
        if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
            raise UserError(f"{path}: a cache of another format; encode the data again")
        names = _read_json(self.folder, NAMES)
        try:
            self.names = names[:limit]
            self.shape = tuple(map(int, self.meta["shape"]))  # of latents.bin
            self.stored = np.dtype(PRECISIONS[PRECISIONS.index(self.meta["precision"])])
            self.sides = tuple(_side_of(entry) for entry in self.meta["sides"])
            self.direction, self.first_stage = self.meta["direction"], str(self.meta["first_stage"])
            self.image_size = int(self.meta["image_size"])
            self.class_names = self.meta["class_names"]
            labels = self.meta["labels"]
            extra = ADDED_LATER | self.meta
            self.beside = dict(extra["beside"])
            self.present = {name: _flags(has, len(names))[:limit] for name, has in extra["present"].items()}
            described = extra["representation"]
            self.encoded = None if described is None else StoredVectors(self.folder / VECTORS, len(names), described)
            size = (self.folder / LATENTS).stat().st_size
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{path}: not a whole cache of latents ({error}); encode the data again") from None
        if size != math.prod(self.shape) * self.stored.itemsize or len(self.shape) != 7 or self.shape[0] != len(names):
            raise UserError(
                f"{path}: {LATENTS} has {size} bytes, not those of {list(self.shape)} and {len(names)} names; "
                f"copy it again, or encode the data again"
            )
        self.side_names = tuple(side.name for side in self.sides) if len(self.sides) > 1 else ()
        self.labels = None if labels is None else np.array(labels[:limit], dtype=np.int64)
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @override
    def name(self, index: int) -> str:
        return self.names[index]

    def item_shape(self, image_size: int) -> tuple[int, ...]:
        """Raises UserError where the images were of another size."""
        if image_size != self.image_size:
            raise UserError(
                f"{self.path}: latents of {self.image_size} pixel images, not {image_size}; "
                f"set data.params.image_size, or encode the data again"
            )
        return (math.prod(self.shape[1:5]), *self.shape[5:])

    @override
    def decode(self, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
        if uniforms is not None:
            raise UserError(f"{self.path}: cached latents are of centre crops; leave out random_crop")
        if self._map is None:
            self._map = np.memmap(self.folder / LATENTS, self.stored, "r", shape=self.shape)
        return self._map[index].reshape(self.item_shape(image_size)).astype(self.dtype)

    def unpack(self, items: Tensor) -> Moments:
        """Items [B, sides * 2 * moments * C, h, w] -> mean and log variance by side and mirroring."""
        return unpack(items, sides=self.shape[1], channels=self.shape[4])

    def check(self, first_stage: str) -> None:
        """Raises UserError where `first_stage`, a `first_stage_hash`, is not that of the autoencoder that made the cache."""
        if first_stage != self.first_stage:
            raise UserError(
                f"{self.path}: made by another first stage ({self.first_stage[:12]}, not {first_stage[:12]}); "
                f"encode the data again with this one, or set first_stage_config to that one"
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_map": None}


def unpack(items: Tensor, sides: int, channels: int) -> Moments:
    """Items [B, sides * 2 * moments * C, h, w] of a cache -> mean and log variance by side and mirroring."""
    items = items.unflatten(1, (sides, 2, -1, channels))  # [B, sides, 2, moments, C, h, w]
    return Moments(items[:, :, :, 0], items[:, :, :, 1] if items.shape[3] == 2 else None)


def beside_of(source: ImageSource) -> dict[str, str]:
    """{side: where it comes from} of the sides that a data section adds to its images: a filter's name, or a path."""
    while isinstance(source, Subset):
        source = source.source
    if isinstance(source, Computed):
        return dict(source.filters)
    return {side: other.path for side, other in source.others.items()} if isinstance(source, Sides) else {}


def entry_of(side: Side) -> dict[str, Any]:
    """A side as JSON."""
    palette = side.palette
    if palette is None:
        return {"name": side.name, "kind": side.kind, "palette": None}
    described = {
        "source": palette.source,
        "cityscapes": palette.cityscapes,
        "classes": palette.classes,
        "void": palette.void,
    }
    return {"name": side.name, "kind": side.kind, "palette": described}


def _flags(values: Sequence[bool], count: int) -> np.ndarray:
    """bool [count]. Raises ValueError where there are not so many."""
    if len(values) != count:
        raise ValueError(f"{len(values)} values of `present` for {count} items")
    return np.array(values, dtype=bool)


def _side_of(entry: dict[str, Any]) -> Side:
    """The counterpart of `entry_of`."""
    described = entry["palette"]
    if described is None:
        return Side(entry["name"], entry["kind"])
    palette = Palette(
        described["source"], _classes(described["classes"]), _classes(described["void"]), described["cityscapes"]
    )
    return Side(entry["name"], entry["kind"], palette)


def _classes(entries: Sequence[Sequence[Any]]) -> tuple[LabelClass, ...]:
    return tuple(LabelClass(index, name, tuple(colour)) for index, name, colour in entries)


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no cache of latents here ({name} is missing); write it by mt-diffusion encode"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {name} is damaged ({reason(error)}); encode the data again") from None
