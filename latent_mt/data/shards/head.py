"""The first samples of remote shards, held in memory: what is looked at before, and beside, a training on the whole of them."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence

from PIL import Image
from typing_extensions import override

from guided_mt.data.sources import ImageSource
from guided_mt.data.sources.formats import open_image
from guided_mt.errors import UserError

from .index import SampleRule
from .stream import RemoteSample, ShardError, samples_of

HEAD = 64  # samples
MOST_REFUSED = 8  # so many shards that can't be read, before any that can: the store is at fault
logger = logging.getLogger("latent_mt.data")


class HeadSource(ImageSource):
    """The first 64 samples of the shards. Raises UserError where the shards can't be reached."""

    streams_captions = True

    def __init__(self, path: str, shards: Sequence[str], rule: SampleRule, *, max_pixels: int, missing: str):
        self.path, self.labels, self.class_names, self.max_pixels = path, None, [], max_pixels
        self.count = len(shards)
        self.samples = _first(shards, rule, missing, HEAD)
        if not self.samples:
            raise UserError(
                f"{path}: no sample of the {len(shards)} shards is left by data.params.filters, or they have no images KEY.jpg, "
                "KEY.png or KEY.webp, where KEY is without a point"
            )
        lacking = sum(not sample.captions for sample in self.samples)
        self.captions = [sample.captions for sample in self.samples] if lacking < len(self.samples) else None
        if lacking and self.captions:
            logger.warning(
                "%s: %d of the first %d samples have no caption; such samples are given the empty one",
                *(path, lacking, len(self.samples)),
            )

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def read(self, index: int) -> Image.Image:
        return open_image(self.samples[index].image, self.max_pixels)

    @override
    def name(self, index: int) -> str:
        return self.samples[index].name


def _first(shards: Sequence[str], rule: SampleRule, missing: str, count: int) -> list[RemoteSample]:
    found: list[RemoteSample] = []
    refused: list[str] = []
    for shard in shards:
        try:
            with contextlib.closing(samples_of(shard, rule)) as reader:
                found += itertools.islice(reader, count - len(found))
        except ShardError as error:
            if missing == "stop":
                way_out = "; data.params.missing_shards=skip leaves such shards out" if len(shards) > 1 else ""
                raise UserError(f"{error}{way_out}") from None
            refused.append(str(error))
        if len(found) >= count or (not found and len(refused) == MOST_REFUSED):
            break
    if refused and not found:
        raise UserError(f"{refused[0]} (of the first {len(refused)} of {len(shards)} shards none can be read)")
    return found
