"""The first samples of remote shards, held in memory: what is looked at before, and beside, a training on the whole of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

from PIL import Image
from typing_extensions import override

from guided_mt.data.sources import ImageSource
from guided_mt.data.sources.formats import open_image
from guided_mt.errors import UserError

from .index import SampleRule
from .stream import RemoteSample, ShardError, samples_of

HEAD = 64  # samples


class HeadSource(ImageSource):
    """The first 64 samples of the shards. Raises UserError where the shards can't be reached."""

    streams_captions = True

    def __init__(self, path: str, shards: Sequence[str], rule: SampleRule, *, max_pixels: int, missing: str):
        self.path, self.labels, self.class_names, self.max_pixels = path, None, [], max_pixels
        self.count = len(shards)
        self.samples = _first(shards, rule, missing, HEAD)
        if not self.samples:
            raise UserError(
                f"{path}: no sample of the {len(shards)} shards is left by data.params.filters, or they have no images"
            )
        has_captions = any(sample.captions for sample in self.samples)
        self.captions = [sample.captions for sample in self.samples] if has_captions else None

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
    for shard in shards:
        try:
            with contextlib.closing(samples_of(shard, rule)) as reader:
                found += itertools.islice(reader, count - len(found))
        except ShardError as error:
            if missing == "stop" or shard == shards[-1]:
                raise UserError(str(error)) from None
        if len(found) >= count:
            break
    return found
