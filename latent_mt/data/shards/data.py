"""What `latent_mt.data.ShardData` of a YAML file builds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from guided_mt.data import MAX_PIXELS, ImageSource
from guided_mt.data.dataset import Order
from guided_mt.data.loader import BatchStream
from guided_mt.data.subset import Subset
from guided_mt.errors import UserError, nearest

from ..configured import StreamedData, checked_rate
from ..layouts import check_choice
from .filters import Filters
from .head import HEAD, HeadSource
from .index import caption_rule
from .lanes import InParts, LaneOptions, LanePlan, LaneStream, lanes_of
from .order import WindowOrder
from .paths import is_remote, shards_of
from .source import MISSING, ShardSource


class ShardData(StreamedData):
    """Images with captions in .tar shards, as img2dataset writes them: KEY.jpg (.png, .webp), KEY.txt, KEY.json.

    path: shards ("data/{00000..00099}.tar"), a folder of them, or a list of both. val_path: the same, for validation.
    captions: where a sample's captions are, "txt" for KEY.txt, any other name for a field of KEY.json (a text, or a list of texts);
    None: they have none. Of a sample with several, training draws one each time. ucg_rate: how many captions training replaces by
    the empty one.
    filters: {name of filters.FILTERS: bound}; fields: {quantity: names of its field in KEY.json}, see filters.FIELDS.
    window: from so many local shards at a time samples are drawn. Remote ones (an address, or pipe:COMMAND) are read as streams:
    lanes: how many at a time, over all processes; shuffle: so many samples of a lane are drawn in random order.
    missing_shards: "stop" or "skip" where one is missing or not whole.
    limit: only the first so many samples. max_pixels: larger images are left out as broken ones.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        image_size: int,
        batch_size: int,
        val_path: str | Sequence[str] | None = None,
        limit: int | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        num_workers: int = 2,
        captions: str | Sequence[str] | None = ("txt",),
        ucg_rate: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        window: int = 16,
        lanes: int = 8,
        shuffle: int = 256,
        missing_shards: str = "stop",
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__(image_size, batch_size, limit, random_crop, random_flip, num_workers, None, max_pixels)
        check_choice("data.params.missing_shards", missing_shards, MISSING)
        for key, value in (("window", window), ("lanes", lanes), ("shuffle", shuffle)):
            if value < 1:
                raise UserError(f"data.params.{key} {value}: must be at least 1")
        listed = isinstance(captions, Sequence) and not isinstance(captions, str)
        names: list[Any] = list(captions or ()) if listed else [] if captions is None else [captions]
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"data.params.captions {captions!r}: write txt, or names of fields of the .json")
        self.rule = caption_rule(names, Filters(filters, fields))
        self.ucg_rate = checked_rate(ucg_rate)
        self.paths = {"train": path} | ({"val": val_path} if val_path else {})
        self.window, self.lanes, self.shuffle, self.missing_shards = window, lanes, shuffle, missing_shards
        self.global_batch = 0  # of the training's stream, once there is one

    @property
    @override
    def splits(self) -> tuple[str, str | None]:
        return "train", "val" if "val" in self.paths else None

    @override
    def _open_pixels(self, split: str) -> ImageSource:
        if split not in self.paths:
            raise UserError(f"split {split}{nearest(split, self.paths)}: ShardData has train (path) and val (val_path)")
        source = self._shards(self.paths[split])
        if isinstance(source, HeadSource) and (self.limit or 0) > HEAD:
            raise UserError(
                f"data.params.limit {self.limit}: of remote shards at most the first {HEAD} samples can be taken; give fewer shards"
            )
        return source if self.limit is None else Subset(source, np.arange(min(self.limit, len(source))))

    def _shards(self, path: str | Sequence[str]) -> ShardSource | HeadSource:
        shards = shards_of(path)
        if is_remote(shards[0]):
            return HeadSource(called(path), shards, self.rule, max_pixels=self.max_pixels, missing=self.missing_shards)
        return ShardSource(
            called(path),
            shards,
            self.rule,
            max_pixels=self.max_pixels,
            workers=self.num_workers,
            missing=self.missing_shards,
        )

    @property
    @override
    def amount(self) -> str:
        return f"{self.source.count} remote shards" if isinstance(self.source, HeadSource) else super().amount

    @property
    @override
    def fingerprint(self) -> str:
        source = self.source
        if isinstance(source, HeadSource):
            filters = (self.rule.filters.bounds, self.rule.filters.quantities)
            shards = shards_of(self.paths["train"])
            parts: tuple[Any, ...] = (shards, self.lanes, self.shuffle, filters, self.global_batch)
        elif isinstance(source, ShardSource):
            parts = ([os.path.basename(shard) for shard in source.shards], source.counts.tolist(), self.window)
        else:
            parts = (len(source),)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @override
    def _batches(self, seed: int, world_size: int, rank: int, start: int, last: int | None) -> BatchStream:
        if not isinstance(self.source, HeadSource):
            return super()._batches(seed, world_size, rank, start, last)
        self.global_batch = self.batch_size * world_size
        return self._lanes(seed, self.global_batch, (rank, world_size), (start, last))

    @override
    def stream_of_all(self, *, seed: int, world_size: int, batches: int) -> BatchStream:
        if not isinstance(self.source, HeadSource):
            return super().stream_of_all(seed=seed, world_size=world_size, batches=batches)
        steps = -(-batches // world_size)
        whole = self._lanes(seed, self.batch_size * world_size, (0, 1), (0, steps))
        return InParts(whole, self.batch_size, batches)

    def _lanes(self, seed: int, batch: int, process: tuple[int, int], steps: tuple[int, int | None]) -> LaneStream:
        """Remote shards by a plan for batches of `batch` over all processes. process: (rank, how many); steps: (first, behind the
        last)."""
        plan = LanePlan(
            shards_of(self.paths["train"]),
            self.rule,
            seed,
            lanes_of(self.lanes, batch),
            batch,
            self.shuffle,
            self.missing_shards,
        )
        return LaneStream(
            plan,
            LaneOptions(self.image_size, self.random_crop, self.ucg_rate, self.max_pixels),
            rank=process[0],
            world_size=process[1],
            start_step=steps[0],
            total_steps=steps[1],
            num_workers=self.num_workers,
        )

    @override
    def _order(self, seed: int) -> Order | None:
        source = self.source
        return WindowOrder(source.counts, seed, self.window) if isinstance(source, ShardSource) else None


def called(path: str | Sequence[str]) -> str:
    """What to call a list of shards in messages."""
    return path if isinstance(path, str) else f"{os.fspath(path[0])}, ..." if len(path) > 1 else str(path[0])
