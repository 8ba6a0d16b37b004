"""Which image stands at which position of the training stream, decoding, and what happens to broken images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import UnidentifiedImageError

from ..errors import UserError
from .sources import ImageSource
from .sources.formats import TooManyPixels

logger = logging.getLogger("guided_mt")

CACHE_BYTES = 256 * 2**20  # array sources up to this size are converted once and kept
ORDER, CROP, CAPTION, SHARDS, WINDOW = range(5)  # independent random streams of one seed


def random_words(stream: int, seed: int, number: int, count: int) -> np.ndarray:
    """uint64 [count], a pure function of its arguments.

    Raw Philox words: numpy promises them for good, unlike the methods of Generator.
    """
    key = np.array([seed % 2**64, number], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count)


def uniforms_of(words: np.ndarray) -> np.ndarray:
    """Random words as numbers in [0, 1), float64."""
    return (words >> np.uint64(11)) * 2.0**-53


class Order(Protocol):
    """Which item stands at which position of an endless stream, as a pure function of the position."""

    seed: int

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers [b] for global sample positions [b], both int64."""
        ...


class StreamOrder:
    """The image at each position p of an endless stream: permutation(seed, p // n)[p % n], each once per epoch."""

    def __init__(self, n: int, seed: int):
        self.n = n
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}  # epoch: int64 [n]; the last two

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Image numbers [b] for global sample positions [b], both int64."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.n)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permutation(int(epoch))[within[chosen]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            while len(self._permutations) >= 2:
                del self._permutations[next(iter(self._permutations))]
            words = random_words(ORDER, self.seed, epoch, self.n)
            self._permutations[epoch] = np.argsort(words, kind="stable")
        return self._permutations[epoch]


def draw_caption(captions: Sequence[str], seed: int, position: int, drop: float = 0.0) -> str:
    """One of an item's captions, or, `drop` of the time and where it has none, the empty one: a function of seed and position."""
    kept, which = uniforms_of(random_words(CAPTION, seed, position, 2))
    return captions[int(which * len(captions))] if captions and kept >= drop else ""


class BrokenImage(Exception):
    """An image that does not decode; the message says why."""


def decode(source: ImageSource, index: int, image_size: int, uniforms: np.ndarray | None = None) -> np.ndarray:
    """The source's item number `index`, [*source.item_shape(image_size)] of source.dtype.

    Raises BrokenImage, and UserError where not one file but the data as a whole is wrong.
    """
    try:
        return source.decode(index, image_size, uniforms)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes; the warning gives the reason
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is the address of a buffer
        raise BrokenImage(
            "no known format" if unknown else f"{type(error).__name__}: {error}".splitlines()[0]
        ) from error


class BrokenImages:
    """The broken images known so far: one warning each, and an end to it when over 1 % are broken."""

    def __init__(self, source: ImageSource):
        self.source = source
        self.limit = broken_limit(len(source))
        self.numbers: set[int] = set()

    def add(self, index: int, reason: str) -> None:
        """Raises UserError when there are too many."""
        if index in self.numbers:
            return
        self.numbers.add(index)
        name, whole = self.source.name(index), reason.startswith(TooManyPixels.__name__)
        logger.warning(
            "%s: image %s is %s and left out (%s)", self.source.path, name, "too large" if whole else "broken", reason
        )
        if len(self.numbers) > self.limit or len(self.numbers) == len(self.source):
            what = "left out" if whole else "broken"
            raise UserError(
                f"{self.source.path}: {len(self.numbers)} of {len(self.source)} images are {what}, over 1 %, "
                f"the last one {name} ({reason}){'' if whole else '; repair or remove them'}"
            )


def broken_limit(count: int) -> int:
    """How many of `count` images may be broken: 1 %, and one at least."""
    return max(1, count // 100)


@dataclass(frozen=True)
class RankSlice:
    """The part of each global batch that one process trains on: positions step * global_batch + rank * b + 0..b-1."""

    global_batch: int
    rank: int = 0
    world_size: int = 1

    def positions(self, step: int) -> np.ndarray:
        """Global sample positions, int64 [b]."""
        size = self.global_batch // self.world_size
        start = step * self.global_batch + self.rank * size
        return np.arange(start, start + size, dtype=np.int64)


class StepDataset(torch.utils.data.Dataset):
    """Item k is this rank's batch of training step k: a pure function of (seed, k), wherever it is computed."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        order: Order,
        part: RankSlice,
        random_crop: bool,
        cache: bool,
        drop_captions: float = 0.0,
    ):
        self.source = source
        self.image_size = image_size
        self.part = part
        self.order = order
        self.random_crop, self.drop_captions = random_crop, drop_captions
        self._broken: dict[int, str] = {}  # image number: reason; known to this process
        self._cache: np.ndarray | None = None
        if cache:
            self._cache = np.empty((len(source), *source.item_shape(image_size)), dtype=source.dtype)
            self._cached = np.zeros(len(source), dtype=bool)

    def __getitem__(self, step: int) -> dict[str, object]:
        """images [b, *item_shape], indices and positions int64 [b], captions (b texts, or None), broken [(image number, reason)].

        Or refused, the message of a UserError, which would lose its form on the way out of a worker process.
        """
        try:
            return self._batch(step)
        except UserError as error:
            return {"refused": str(error)}

    def _batch(self, step: int) -> dict[str, object]:
        positions = self.part.positions(step)
        indices = self.order.indices(positions)
        shape = self.source.item_shape(self.image_size)
        images = np.empty((len(indices), *shape), dtype=self.source.dtype)
        broken: list[tuple[int, str]] = []
        captions = None if self.source.captions is None else [""] * len(indices)
        for k, (index, position) in enumerate(zip(indices.tolist(), positions.tolist(), strict=True)):
            indices[k] = self._fill(images[k], index, position, broken)
            if captions is not None and self.source.captions is not None:
                texts = self.source.captions[int(indices[k])]
                captions[k] = draw_caption(texts, self.order.seed, position, self.drop_captions)
        return {
            "images": torch.from_numpy(images),
            "indices": torch.from_numpy(indices),
            "positions": torch.from_numpy(positions),
            "captions": captions,
            "broken": broken,
        }

    def _fill(self, out: np.ndarray, index: int, position: int, broken: list[tuple[int, str]]) -> int:
        """Put image `index`, or the next one that is not broken, into `out`; returns its number.

        Notes broken ones in `broken`, and stops at one more than are allowed: `BrokenImages` then ends the run.
        """
        for _ in range(broken_limit(len(self.source)) + 1):
            try:
                out[...] = self._image(index, position)
                return index
            except BrokenImage as error:
                self._broken[index] = str(error)
                broken.append((index, str(error)))
            index = (index + 1) % len(self.source)
        return index

    def _image(self, index: int, position: int) -> np.ndarray:
        if index in self._broken:
            raise BrokenImage(self._broken[index])
        if self.random_crop:
            uniforms = uniforms_of(random_words(CROP, self.order.seed, position, 3))
            return decode(self.source, index, self.image_size, uniforms)
        if self._cache is None:
            return decode(self.source, index, self.image_size)
        if not self._cached[index]:
            self._cache[index] = decode(self.source, index, self.image_size)
            self._cached[index] = True
        return self._cache[index]


class LoadedImages(NamedTuple):
    """Images in the source's order, class ids int64 [n] or None, names, numbers int64 [n], and which sides they have."""

    images: torch.Tensor  # [n, *item_shape], uint8 [n, 3, H, W] where the source is of images
    labels: torch.Tensor | None
    names: list[str]
    indices: torch.Tensor
    present: Mapping[str, torch.Tensor] = MappingProxyType({})  # as `present_of`

    def take(self, rows: Sequence[int]) -> LoadedImages:
        """Some of them."""
        labels = None if self.labels is None else self.labels[rows]
        present = {name: mask[rows] for name, mask in self.present.items()}
        return LoadedImages(self.images[rows], labels, [self.names[i] for i in rows], self.indices[rows], present)


def load_images(source: ImageSource, image_size: int, limit: int | None = None, offset: int = 0) -> LoadedImages:
    """Images number offset to offset + limit (None: to the end), centre-cropped, in order, for evaluation.

    Broken ones are left out with a warning. Raises UserError where over 1 % are, or the range is empty.
    """
    numbers = range(len(source))[offset : None if limit is None else offset + limit]
    if not numbers:
        raise UserError(f"{source.path}: no image from number {offset} on; it has {len(source)}")
    broken = BrokenImages(source)
    images = np.empty((len(numbers), *source.item_shape(image_size)), dtype=source.dtype)
    kept: list[int] = []
    for index in numbers:
        try:
            images[len(kept)] = decode(source, index, image_size)
            kept.append(index)
        except BrokenImage as error:
            broken.add(index, str(error))
    labels = None if source.labels is None else torch.from_numpy(source.labels[kept])
    names = [source.name(i) for i in kept]
    present = present_of(source, kept)
    return LoadedImages(torch.from_numpy(images[: len(kept)]), labels, names, torch.tensor(kept), present)


def present_of(source: ImageSource, numbers: np.ndarray | Sequence[int]) -> dict[str, torch.Tensor]:
    """{side: bool [n], which of the items number `numbers` have it}, of the sides that some items of the source lack."""
    return {name: torch.from_numpy(present[numbers]) for name, present in source.present.items()}


def captions_of(source: ImageSource, numbers: np.ndarray | Sequence[int]) -> list[str] | None:
    """The first caption of each of the items number `numbers`, '' where one has none; None where the source has no captions."""
    if source.captions is None:
        return None
    return [next(iter(source.captions[int(number)]), "") for number in numbers]
