"""What the `data` section of a YAML file builds. Nothing is opened before it is needed, so a configuration needs no data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from typing_extensions import override

from guided_mt.data import MAX_PIXELS, ImageSource, ImageStream, Sides, check_workers, open_source
from guided_mt.data.captions import open_captions
from guided_mt.data.dataset import Order
from guided_mt.data.loader import BatchStream
from guided_mt.data.sources.classes import renumbered
from guided_mt.data.subset import Subset
from guided_mt.errors import UserError, nearest

from .computed import Computed, check_filters
from .latent_cache import LatentCache
from .layouts import DIRECTIONS, LAYOUTS, check_choice, open_pairs
from .pair_classes import CLASSES_FROM, class_names_of, set_classes
from .pairs import PairSource

logger = logging.getLogger("latent_mt.data")


class StreamedData:
    """A training source, a validation source and the training stream.

    batch_size is per process and forward pass. A source is a LatentCache where `latents` names a folder of caches. max_pixels:
    larger images are left out.
    """

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        limit: int | None,
        random_crop: bool,
        random_flip: bool,
        num_workers: int,
        latents: str | None,
        max_pixels: int,
    ):
        check_workers("data.params.num_workers", num_workers)
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("limit", limit, 1),
            ("max_pixels", max_pixels, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"data.params.{key} {value}: must be at least {least}")
        if latents and random_crop:
            raise UserError(
                "data.params.random_crop: cached latents are of centre crops; leave out random_crop or latents"
            )
        self.image_size, self.batch_size, self.limit = image_size, batch_size, limit
        self.random_crop, self.random_flip, self.num_workers = random_crop, random_flip, num_workers
        self.latents, self.max_pixels = latents, max_pixels
        self.ucg_rate = 0.0  # how many captions training sees as empty ones
        self.captions: str | None = None  # where they are, see `captions.open_captions`
        self.class_names: list[str] | None = None  # those of a run that goes on; None: those of the data
        self._pixels: dict[str, ImageSource] = {}  # by split, those opened so far

    def use_classes(self, names: Sequence[str] | None) -> None:
        """Keep the class ids of a run that goes on, which are places in `names`. To be called before anything is opened."""
        self.class_names = list(names) if names else None

    def pixel_source(self, split: str) -> ImageSource:
        """The images of a split, whether or not their latents are cached; opened once. Raises UserError."""
        if split not in self._pixels:
            self._pixels[split] = self._open_pixels(split)
        return self._pixels[split]

    def _open_pixels(self, split: str) -> ImageSource:
        raise NotImplementedError

    @property
    def splits(self) -> tuple[str, str | None]:
        """The names of the training and the validation split; None: there is no validation."""
        raise NotImplementedError

    def open(self) -> StreamedData:
        """Open both sources now, so that what is wrong with the data shows early. Raises UserError."""
        _ = self.source, self.val_source
        return self

    @cached_property
    def source(self) -> ImageSource:
        """The training images."""
        return self._open(self.splits[0])

    @cached_property
    def val_source(self) -> ImageSource | None:
        """The validation images; None where there are none."""
        return None if self.splits[1] is None else self._open(self.splits[1])

    @property
    def amount(self) -> str:
        """How much there is to train on, in words."""
        return f"{len(self.source)} items"

    @property
    def fingerprint(self) -> str:
        """A hash of what the order of the data rests on beside the seed; '' where it is not followed."""
        return ""

    def stream(
        self,
        *,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        start_step: int = 0,
        total_steps: int | None = None,
        accumulate: int = 1,
    ) -> BatchStream:
        """This process's batches of the optimiser steps start_step, ..., total_steps - 1, `accumulate` batches to a step.

        Raises UserError where the data is smaller than the batches of all processes.
        """
        last = None if total_steps is None else total_steps * accumulate
        return self._batches(seed, world_size, rank, start_step * accumulate, last)

    def stream_of_all(self, *, seed: int, world_size: int, batches: int) -> BatchStream:
        """The first `batches` batches that training on so many processes sees, of all of them in turn, on this one. Raises
        UserError as `stream` does."""
        return self._batches(seed, 1, 0, 0, batches)

    def _batches(self, seed: int, world_size: int, rank: int, start: int, last: int | None) -> BatchStream:
        """Batches number start, ..., last - 1 of this process; see `stream`."""
        needed = self.batch_size * world_size
        if len(self.source) < needed:
            raise UserError(
                f"{self.source.path}: {len(self.source)} items are fewer than {world_size} process(es) x "
                f"data.params.batch_size {self.batch_size}; lower batch_size"
            )
        return ImageStream(
            self.source,
            self.image_size,
            seed=seed,
            global_batch=needed,
            rank=rank,
            world_size=world_size,
            start_step=start,
            total_steps=last,
            random_crop=self.random_crop,
            num_workers=self.num_workers,
            order=self._order(seed),
            drop_captions=self.ucg_rate,
        )

    def _order(self, seed: int) -> Order | None:
        """Which item stands where; None: each once per epoch, all of them shuffled."""
        return None

    def _add_captions(self, source: ImageSource, path: str) -> None:
        """Give the source the captions that lie in `path`, if there are to be any."""
        if self.captions is not None:
            source.captions = open_captions(self.captions, path, source, "data.params.captions")

    def _open(self, split: str) -> ImageSource:
        if not self.latents:
            return self.pixel_source(split)
        cache = LatentCache(Path(self.latents) / split, limit=self.limit)
        cache.item_shape(self.image_size)
        self._check_cache(cache)
        if self.class_names and cache.labels is not None:
            cache.labels = renumbered(cache.path, cache.labels, cache.class_names, self.class_names)
            cache.class_names = self.class_names
        return cache

    def _check_cache(self, cache: LatentCache) -> None:
        """Raises UserError where the cache holds another kind of data."""


class PairData(StreamedData):
    """Pairs: the arguments of `open_pairs`, and how to train on them.

    val_split: None for no validation. limit: of each split. random_flip: training mirrors all sides of a pair alike.
    latents: a folder that `encode` wrote for these splits; training then reads latents and not images.
    computed: {side: edges, blurred or grey}, further sides that are made of the photo (`computed.FILTERS`).
    labels: where an item's class comes from: "prefix" (its file's name before the first "_"), "folder" (the one it lies in) or
    None (no classes); validation has the ids of training, and -1 where training has not that class. captions: a table of the
    items' captions, by the names of their files, see `captions.open_captions`; None: they have none.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        batch_size: int,
        layout: str = "auto",
        split: str = "train",
        val_split: str | None = None,
        direction: str = "AtoB",
        classes: str | None = None,
        sides: Sequence[str] | None = None,
        limit: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        num_workers: int = 2,
        latents: str | None = None,
        computed: Mapping[str, str] | None = None,
        labels: str | None = None,
        max_pixels: int = MAX_PIXELS,
        captions: str | None = None,
    ):
        super().__init__(image_size, batch_size, limit, random_crop, random_flip, num_workers, latents, max_pixels)
        check_choice("data.params.layout", layout, ("auto", *LAYOUTS))
        check_choice("data.params.direction", direction, DIRECTIONS)
        if labels is not None:
            check_choice("data.params.labels", labels, CLASSES_FROM)
        self.computed = _mapping("computed", computed, "edges: edges")
        check_filters(self.computed)
        self.path, self.layout, self.split, self.val_split = path, layout, split, val_split
        self.direction, self.classes, self.sides, self.labels = direction, classes, sides, labels
        self.captions = captions

    @property
    @override
    def splits(self) -> tuple[str, str | None]:
        return self.split, self.val_split or None

    def _open_pixels(self, split: str) -> PairSource:
        pairs = self._pairs(split, self.limit)
        source = Computed(pairs, self.computed) if self.computed else pairs
        if self.labels is not None:
            whole = split == self.split and self.limit is None
            training = pairs if whole else self._pairs(self.split, None)
            self._set_classes(source, [training.name(k) for k in range(len(training))])
        self._add_captions(source, self.path)
        return source

    def _pairs(self, split: str, limit: int | None) -> PairSource:
        return open_pairs(
            self.path,
            layout=self.layout,
            split=split,
            direction=self.direction,
            classes=self.classes,
            sides=self.sides,
            limit=limit,
            max_pixels=self.max_pixels,
        )

    def _set_classes(self, source: ImageSource, of_training: Sequence[str]) -> None:
        """Classes by the names of the files; of_training: all names of training, whose classes are known."""
        assert self.labels is not None
        set_classes(source, self.labels, self.class_names or class_names_of(self.path, of_training, self.labels))

    def _open(self, split: str) -> ImageSource:
        source = super()._open(split)
        if isinstance(source, LatentCache):
            if self.labels is None:
                source.labels = None
            else:
                self._set_classes(source, LatentCache(Path(self.latents or "") / self.split).names)
            self._add_captions(source, self.path)
        return source

    def _check_cache(self, cache: LatentCache) -> None:
        if len(cache.sides) < 2:
            raise UserError(
                f"{cache.path}: holds latents of single images, not of pairs; encode pairs into another folder"
            )
        if cache.direction != self.direction:
            raise UserError(f"{cache.path}: was encoded with direction {cache.direction}, not {self.direction}")
        names = [side.name for side in cache.sides]
        wanted = list(self.sides or names[:2])
        wanted = [*(wanted if self.direction == "AtoB" or not self.sides else wanted[::-1]), *self.computed]
        if names != wanted:
            raise UserError(
                f"{cache.path}: its sides are {' and '.join(names)}, not {' and '.join(wanted)} "
                f"(data.params.sides, computed); encode the data again, or change them"
            )
        if cache.beside != self.computed:
            raise UserError(
                f"{cache.path}: its computed sides are {cache.beside}, but data.params.computed is {self.computed}; "
                f"encode the data again"
            )


class ImageData(StreamedData):
    """Single images, with their classes where they have some: whatever guided_mt's --data_dir reads, A,B among it.

    val_path: None for no validation. limit: of each. latents: a folder that `encode` wrote, with train and val.
    paired: {side: path}, further images of each item, files of the same names as those of `path`; items may lack some.
    side: the name of the images of `path` among these sides. val_paired: the same of val_path.
    captions: where the items' captions are, see `captions.open_captions`; None: they have none. Of an item with several, training
    draws one each time. ucg_rate: how many of them training replaces by the empty caption, for classifier-free guidance.
    """

    def __init__(
        self,
        path: str,
        image_size: int,
        batch_size: int,
        val_path: str | None = None,
        limit: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        num_workers: int = 2,
        latents: str | None = None,
        paired: Mapping[str, str] | None = None,
        val_paired: Mapping[str, str] | None = None,
        side: str = "image",
        max_pixels: int = MAX_PIXELS,
        captions: str | None = None,
        ucg_rate: float = 0.0,
    ):
        super().__init__(image_size, batch_size, limit, random_crop, random_flip, num_workers, latents, max_pixels)
        self.path, self.val_path, self.side, self.captions = path, val_path, side, captions
        self.ucg_rate = checked_rate(ucg_rate)
        self.paired = _mapping("paired", paired, "depth: depth.zip")
        self.val_paired = _mapping("val_paired", val_paired, "depth: val-depth.zip")
        if not isinstance(side, str) or not side or side in self.paired:
            raise UserError(f"data.params.side {side!r}: must be a name that no side of data.params.paired has")
        if val_path and list(self.paired) != list(self.val_paired):
            raise UserError(
                f"data.params.val_paired has the sides {_listed(self.val_paired)}, but paired {_listed(self.paired)}; "
                f"name the same sides in the same order, or leave out val_path"
            )

    @property
    @override
    def splits(self) -> tuple[str, str | None]:
        return "train", "val" if self.val_path else None

    def _open_pixels(self, split: str) -> ImageSource:
        paths = {"train": self.path} | ({"val": self.val_path} if self.val_path else {})
        if split not in paths:
            raise UserError(f"split {split}{nearest(split, paths)}: ImageData has train (path) and val (val_path)")
        source = self._validation(paths["val"]) if split == "val" else self._images
        paired = self.val_paired if split == "val" else self.paired
        if paired:
            others = {side: open_source(path, max_pixels=self.max_pixels) for side, path in paired.items()}
            source = Sides(source, others, self.side)
        source = source if self.limit is None else Subset(source, np.arange(min(self.limit, len(source))))
        self._add_captions(source, paths[split])
        return source

    @override
    def _open(self, split: str) -> ImageSource:
        source, path = super()._open(split), (self.val_path or "") if split == "val" else self.path
        if isinstance(source, LatentCache):
            self._add_captions(source, path)
        return source

    @cached_property
    def _images(self) -> ImageSource:
        """Those of training, whole and alone. Ids are those of the run, else those of cached latents, else the data's own."""
        known = self.class_names
        if known is None and self.latents and (Path(self.latents) / "train").is_dir():
            known = LatentCache(Path(self.latents) / "train").class_names or None
        return open_source(self.path, known, max_pixels=self.max_pixels)

    def _validation(self, path: str) -> ImageSource:
        """Those of validation. Their classes get the ids of training, as the network knows them."""
        known = self._images.class_names or None
        source = open_source(path, known, max_pixels=self.max_pixels)
        if known and source.labels is None:
            logger.info("%s: has no classes, unlike %s: %s has none", path, self.path, source.without_class())
            source.labels, source.class_names = np.full(len(source), -1), known
        return source

    def _check_cache(self, cache: LatentCache) -> None:
        if cache.direction != "AtoB" or (cache.side_names and not self.paired):
            raise UserError(
                f"{cache.path}: holds latents of pairs, not of single images; take latent_mt.data.PairData, "
                f"or name the other sides in data.params.paired"
            )
        wanted = (self.side, *self.paired) if self.paired else ()
        if cache.side_names != wanted:
            raise UserError(
                f"{cache.path}: its sides are {_listed(cache.side_names)}, but data.params.paired gives {_listed(wanted)}; "
                f"encode the data again"
            )


def checked_rate(ucg_rate: float) -> float:
    """Raises UserError for a ucg_rate that is no share."""
    if not 0 <= ucg_rate <= 1:
        raise UserError(f"data.params.ucg_rate {ucg_rate}: must be between 0 and 1")
    return float(ucg_rate)


def _mapping(key: str, value: Mapping[str, str] | None, example: str) -> dict[str, str]:
    """Raises UserError where a value is not {name: text}."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(word, str) and word for pair in value.items() for word in pair
    ):
        raise UserError(f"data.params.{key} {value!r}: must be names with a value each, such as {{{example}}}")
    return dict(value)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names) or "none"
