"""What `latent_mt.data.ShardData` of a YAML file builds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from guided_mt.data import MAX_PIXELS, ImageSource
from guided_mt.data.dataset import Order
from guided_mt.data.subset import Subset
from guided_mt.errors import UserError, nearest

from ..configured import StreamedData, checked_rate
from ..layouts import check_choice
from .filters import Filters
from .index import caption_rule
from .order import WindowOrder
from .paths import is_remote, shards_of
from .source import MISSING, ShardSource


class ShardData(StreamedData):
    """Images with captions in .tar shards, as img2dataset writes them: KEY.jpg (.png, .webp), KEY.txt, KEY.json.

    path: shards ("data/{00000..00099}.tar"), a folder of them, or a list of both. val_path: the same, for validation.
    captions: where a sample's captions are, "txt" for KEY.txt, any other name for a field of KEY.json (a text, or a list of texts);
    of a sample with several, training draws one each time. ucg_rate: how many captions training replaces by the empty one.
    filters: {name of filters.FILTERS: bound}; fields: {quantity: names of its field in KEY.json}, see filters.FIELDS.
    window: from so many shards at a time samples are drawn. missing_shards: "stop" or "skip" where one is missing or not whole.
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
        captions: str | Sequence[str] = ("txt",),
        ucg_rate: float = 0.0,
        filters: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
        window: int = 16,
        missing_shards: str = "stop",
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__(image_size, batch_size, limit, random_crop, random_flip, num_workers, None, max_pixels)
        check_choice("data.params.missing_shards", missing_shards, MISSING)
        if window < 1:
            raise UserError(f"data.params.window {window}: must be at least 1")
        names = [captions] if isinstance(captions, str) else list(captions)
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"data.params.captions {captions!r}: write txt, or names of fields of the .json")
        self.rule = caption_rule(names, Filters(filters, fields))
        self.ucg_rate = checked_rate(ucg_rate)
        self.paths = {"train": path} | ({"val": val_path} if val_path else {})
        self.window, self.missing_shards = window, missing_shards

    @property
    @override
    def splits(self) -> tuple[str, str | None]:
        return "train", "val" if "val" in self.paths else None

    @override
    def _open_pixels(self, split: str) -> ImageSource:
        if split not in self.paths:
            raise UserError(f"split {split}{nearest(split, self.paths)}: ShardData has train (path) and val (val_path)")
        source = self._shards(self.paths[split])
        return source if self.limit is None else Subset(source, np.arange(min(self.limit, len(source))))

    def _shards(self, path: str | Sequence[str]) -> ShardSource:
        shards = shards_of(path)
        if is_remote(shards[0]):
            raise UserError(f"{shards[0]}: is no local file")
        return ShardSource(
            called(path),
            shards,
            self.rule,
            max_pixels=self.max_pixels,
            workers=self.num_workers,
            missing=self.missing_shards,
        )

    @override
    def _order(self, seed: int) -> Order | None:
        source = self.source
        return WindowOrder(source.counts, seed, self.window) if isinstance(source, ShardSource) else None


def called(path: str | Sequence[str]) -> str:
    """What to call a list of shards in messages."""
    return path if isinstance(path, str) else f"{os.fspath(path[0])}, ..." if len(path) > 1 else str(path[0])
