"""Local shards as one numbered set of images with captions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typing_extensions import override

from guided_mt.data.loader import start_loader, stop_loader
from guided_mt.data.sources import ImageSource
from guided_mt.data.sources.base import ProcessFile
from guided_mt.data.sources.formats import open_image
from guided_mt.errors import UserError, reason

from .index import JSON, SampleRule, ShardIndex, described_by, index_of

logger = logging.getLogger("latent_mt.data")

MISSING = ("stop", "skip")  # what becomes of a run when a shard is missing or not whole
HELD_SAMPLES = (
    2**21
)  # indices of so many samples stay in memory, 60 bytes each; others are read again when they are needed
HELD_FILES = 64
_IN_PROCESS = 4  # fewer shards are indexed without worker processes
_SHOWN = 5  # shards in messages


class ShardSource(ImageSource):
    """The samples of local shards that pass the filters, numbered on from shard to shard, by their keys within one.

    counts: int64 [S], how many each shard has. missing: "stop" raises UserError for a shard that is missing or not whole, "skip"
    leaves it out with a warning. Raises UserError where no sample is left.
    """

    def __init__(
        self,
        path: str,
        shards: Sequence[str],
        rule: SampleRule,
        *,
        max_pixels: int,
        workers: int = 0,
        missing: str = "stop",
    ):
        self.path, self.rule, self.max_pixels, self.missing = path, rule, max_pixels, missing
        self.labels, self.class_names = None, []
        indices, refused = _all_indices(shards, rule, workers)
        _say_missing(path, refused, len(shards), missing)
        self.shards = [shard for k, shard in enumerate(shards) if k in indices]
        present = [indices[k] for k in sorted(indices)]
        self.counts = np.array([len(index) for index in present], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        _say_left_out(path, present, rule)
        has_captions = any(index.captions.any() for index in present)
        lacking = sum(int((~index.captions).sum()) for index in present)
        if has_captions and lacking:
            logger.warning(
                "%s: %d of %d samples have no caption, and are given the empty one", path, lacking, len(self)
            )
        self.captions = ShardCaptions(self) if has_captions else None
        self._held: dict[int, ShardIndex] = {}  # by shard, the last ones
        self._held_samples = 0
        self._files: dict[int, ProcessFile] = {}
        for shard, index in enumerate(present):
            self._hold(shard, index)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @override
    def name(self, index: int) -> str:
        shard, row = self.place(index)
        return f"{os.path.basename(self.shards[shard])}/{self._index(shard).keys[row]}"

    @override
    def read(self, index: int) -> Image.Image:
        """Raises UserError where the shard is gone and the run is to stop for that."""
        shard, row = self.place(index)
        return open_image(self._part(shard, row, 0), self.max_pixels)

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of an item, () where it has none."""
        shard, row = self.place(index)
        text = self._part(shard, row, 1) if "txt" in self.rule.captions else b""
        described = described_by(self._part(shard, row, 2)) if self.rule.caption_fields else {}
        return self.rule.texts(text, described)

    def place(self, index: int) -> tuple[int, int]:
        """(shard, place among its samples) of an item."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index) - int(self.starts[shard])

    def _part(self, shard: int, row: int, part: int) -> bytes:
        offset, size = self._index(shard).places[row, part].tolist()
        if not size:
            return b""
        if shard not in self._files:
            while len(self._files) >= HELD_FILES:
                del self._files[next(iter(self._files))]
            self._files[shard] = ProcessFile(self.shards[shard])
        try:
            return self._files[shard].read(offset, size)
        except (OSError, EOFError) as error:
            if self.missing == "skip":
                raise
            raise UserError(
                f"{self.shards[shard]}: can't be read any more ({reason(error)}); bring it back and start the run again, or leave "
                f"such shards out by data.params.missing_shards=skip"
            ) from None

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._held:
            self._hold(shard, self._again(shard))
        return self._held[shard]

    def _again(self, shard: int) -> ShardIndex:
        """Raises UserError where the shard is not what it was when the run began."""
        index = index_of(Path(self.shards[shard]), self.rule)
        if len(index) != self.counts[shard]:
            raise UserError(
                f"{self.shards[shard]}: had {self.counts[shard]} samples before, and now has {len(index)}; start the run again"
            )
        return index

    def _hold(self, shard: int, index: ShardIndex) -> None:
        while self._held and self._held_samples + len(index) > HELD_SAMPLES:
            self._held_samples -= len(self._held.pop(next(iter(self._held))))
        self._held[shard] = index
        self._held_samples += len(index)


class ShardCaptions(Sequence[Sequence[str]]):
    """The captions of a source's items, read when they are asked for."""

    def __init__(self, source: ShardSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @override
    def __getitem__(self, index: int) -> Sequence[str]:  # type: ignore[override]  # one by one alone
        return self.source.texts(index)

    def __iter__(self) -> Iterator[Sequence[str]]:
        return map(self.source.texts, range(len(self)))


# ---------------------------------------------------------------- opening


class _Shards(torch.utils.data.Dataset):
    """Item k: the index of shard k, or what is wrong with it, as text."""

    def __init__(self, shards: Sequence[str], rule: SampleRule):
        self.shards, self.rule = shards, rule

    def __getitem__(self, shard: int) -> dict[str, Any]:
        try:
            return {"shard": shard, "index": index_of(Path(self.shards[shard]), self.rule), "refused": ""}
        except UserError as error:
            return {"shard": shard, "index": None, "refused": str(error)}


def _all_indices(shards: Sequence[str], rule: SampleRule, workers: int) -> tuple[dict[int, ShardIndex], dict[int, str]]:
    """({number: index}, {number: why there is none}). Each process begins at another shard, so that they share the work."""
    begin = os.getpid() % len(shards)
    numbers = [*range(begin, len(shards)), *range(begin)]
    found = start_loader(_Shards(shards, rule), numbers, workers if len(shards) > _IN_PROCESS else 0)
    indices, refused = {}, {}
    try:
        for item in found:
            if item["index"] is None:
                refused[item["shard"]] = item["refused"]
            else:
                indices[item["shard"]] = item["index"]
    finally:
        stop_loader(found)
    return indices, refused


def _say_missing(path: str, refused: Mapping[int, str], count: int, missing: str) -> None:
    """Raises UserError where shards are missing and the run is to stop for that, or none is there."""
    if not refused:
        return
    first = refused[min(refused)]
    if missing == "stop" or len(refused) == count:
        way_out = "" if len(refused) == count else "; data.params.missing_shards=skip leaves such shards out"
        raise UserError(f"{first} ({len(refused)} of the {count} shards of {path} can't be read){way_out}")
    for number in sorted(refused)[:_SHOWN]:
        logger.warning("%s; left out", refused[number])
    if len(refused) > _SHOWN:
        logger.warning("%s: %d of %d shards are left out", path, len(refused), count)


def _say_left_out(path: str, indices: Sequence[ShardIndex], rule: SampleRule) -> None:
    """Say how many samples are left out and why. Raises UserError where none is left."""
    total, without = sum(index.total for index in indices), sum(index.without_image for index in indices)
    kept = sum(map(len, indices))
    reasons = [
        f"{sum(index.left_out[name] for index in indices)} by {name} {rule.filters.bounds[name]:g}"
        for name in rule.filters.bounds
    ]
    reasons += (
        [f"{without} have no image KEY.jpg, KEY.png or KEY.webp, where KEY is without a point"] if without else []
    )
    if not kept:
        field = f"; a sample whose .{JSON} lacks the field is left out too, see data.params.fields"
        why = f" ({', '.join(reasons)}){field if rule.filters.bounds else ''}"
        if not total + without:
            raise UserError(
                f"{path}: no samples in {len(indices)} shard(s): they hold no files KEY.jpg, KEY.png or KEY.webp"
            )
        raise UserError(f"{path}: none of the {total + without} samples in {len(indices)} shard(s) is left{why}")
    if kept < total + without:
        logger.info(
            "%s: %d of %d samples are left out: %s", path, total + without - kept, total + without, ", ".join(reasons)
        )
