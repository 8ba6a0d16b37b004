"""What the `data` section of a YAML file builds. Nothing is opened before it is needed, so a configuration needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from guided_mt.data import ImageSource, ImageStream, open_source
from guided_mt.data.subset import Subset
from guided_mt.errors import UserError, nearest

from .latent_cache import LatentCache
from .layouts import DIRECTIONS, LAYOUTS, check_choice, open_pairs
from .pairs import PairSource


class StreamedData:
    """A training source, a validation source and the training stream.

    batch_size is per process and forward pass. A source is a LatentCache where `latents` names a folder of caches.
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
    ):
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("limit", limit, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"data.params.{key} {value}: must be at least {least}")
        if latents and random_crop:
            raise UserError(
                "data.params.random_crop: cached latents are of centre crops; leave out random_crop or latents"
            )
        self.image_size, self.batch_size, self.limit = image_size, batch_size, limit
        self.random_crop, self.random_flip, self.num_workers = random_crop, random_flip, num_workers
        self.latents = latents

    def pixel_source(self, split: str) -> ImageSource:
        """The images of a split, whether or not their latents are cached. Raises UserError."""
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
        return self._open(self.splits[0])

    @cached_property
    def val_source(self) -> ImageSource | None:
        return None if self.splits[1] is None else self._open(self.splits[1])

    def stream(
        self,
        *,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        start_step: int = 0,
        total_steps: int | None = None,
        accumulate: int = 1,
    ) -> ImageStream:
        """This process's batches of the optimiser steps start_step, ..., total_steps - 1, `accumulate` batches to a step.

        Raises UserError where the data is smaller than the batches of all processes.
        """
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
            start_step=start_step * accumulate,
            total_steps=None if total_steps is None else total_steps * accumulate,
            random_crop=self.random_crop,
            num_workers=self.num_workers,
        )

    def _open(self, split: str) -> ImageSource:
        if not self.latents:
            return self.pixel_source(split)
        cache = LatentCache(Path(self.latents) / split, limit=self.limit)
        cache.item_shape(self.image_size)
        self._check_cache(cache)
        return cache

    def _check_cache(self, cache: LatentCache) -> None:
        """Raises UserError where the cache holds another kind of data."""


class PairData(StreamedData):
    """Pairs: the arguments of `open_pairs`, and how to train on them.

    val_split: None for no validation. limit: of each split. random_flip: training mirrors both sides of a pair alike.
    latents: a folder that encode_latents.py wrote for these splits; training then reads latents and not images.
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
    ):
        super().__init__(image_size, batch_size, limit, random_crop, random_flip, num_workers, latents)
        check_choice("data.params.layout", layout, ("auto", *LAYOUTS))
        check_choice("data.params.direction", direction, DIRECTIONS)
        self.path, self.layout, self.split, self.val_split = path, layout, split, val_split
        self.direction, self.classes, self.sides = direction, classes, sides

    @property
    def splits(self) -> tuple[str, str | None]:
        return self.split, self.val_split or None

    def pixel_source(self, split: str) -> PairSource:
        return open_pairs(
            self.path,
            layout=self.layout,
            split=split,
            direction=self.direction,
            classes=self.classes,
            sides=self.sides,
            limit=self.limit,
        )

    def _check_cache(self, cache: LatentCache) -> None:
        if len(cache.sides) != 2:
            raise UserError(
                f"{cache.path}: holds latents of single images, not of pairs; encode pairs into another folder"
            )
        if cache.direction != self.direction:
            raise UserError(f"{cache.path}: was encoded with direction {cache.direction}, not {self.direction}")
        names = [side.name for side in cache.sides]
        wanted = list(self.sides or names)
        if names != (wanted if self.direction == "AtoB" or not self.sides else wanted[::-1]):
            raise UserError(f"{cache.path}: its sides are {' and '.join(names)}, not those of data.params.sides")


class ImageData(StreamedData):
    """Single images, with their classes where they have some: whatever guided_mt's --data_dir reads.

    val_path: None for no validation. limit: of each. latents: a folder that encode_latents.py wrote, with train and val.
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
    ):
        super().__init__(image_size, batch_size, limit, random_crop, random_flip, num_workers, latents)
        self.path, self.val_path = path, val_path

    @property
    def splits(self) -> tuple[str, str | None]:
        return "train", "val" if self.val_path else None

    def pixel_source(self, split: str) -> ImageSource:
        paths = {"train": self.path} | ({"val": self.val_path} if self.val_path else {})
        if split not in paths:
            raise UserError(f"split {split}{nearest(split, paths)}: ImageData has train (path) and val (val_path)")
        # Validation classes get the ids of training, as the network knows them.
        names = self.pixel_source("train").class_names or None if split == "val" else None
        source = open_source(paths[split], names)
        return source if self.limit is None else Subset(source, np.arange(min(self.limit, len(source))))

    def _check_cache(self, cache: LatentCache) -> None:
        if len(cache.sides) != 1:
            raise UserError(f"{cache.path}: holds latents of pairs, not of single images; take latent_mt.data.PairData")
