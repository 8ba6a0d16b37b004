"""What is where in a local shard: its samples by their keys, found once and kept beside the listings of archives.

A sample is the files of one key, img2dataset's: KEY.jpg (or .png, .webp), KEY.txt, KEY.json. No other file is ever read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guided_mt.data.captions import decoded, texts_of
from guided_mt.data.sources.base import ProcessFile
from guided_mt.data.sources.cache import Keeping, listed
from guided_mt.data.sources.formats import refuse_compressed
from guided_mt.data.sources.listing import Listing
from guided_mt.data.sources.names import Names, smallest
from guided_mt.data.sources.tar import list_tar

from .filters import Filters

IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes; of a sample with several the first counts
TEXT, JSON = "txt", "json"
PARTS = ("image", "text", "json")
KEEPING = Keeping("shards", least_seconds=0.02, most_bytes=16 * 2**30, one_in=64)


@dataclass(frozen=True)
class SampleRule:
    """What is read of a sample: its captions, by "txt" or fields of the .json, and what filters ask the .json for."""

    captions: tuple[str, ...] = (TEXT,)
    filters: Filters = Filters()  # noqa: RUF009

    @property
    def caption_fields(self) -> tuple[str, ...]:
        """The fields of the .json that hold captions."""
        return tuple(name for name in self.captions if name != TEXT)

    @property
    def reads_json(self) -> bool:
        """Whether an index needs the .json of each sample."""
        return bool(self.caption_fields or self.filters.bounds)

    def texts(self, text: bytes | None, described: Mapping[str, Any]) -> tuple[str, ...]:
        """The captions of a sample with these contents of its .txt and its .json."""
        found: list[str] = []
        for name in self.captions:
            found += texts_of(decoded(text or b"") if name == TEXT else described.get(name))
        return tuple(found)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard that pass the filters, in the order of their keys.

    places: int64 [n, 3, 2], offset and size of image, text and json in bytes, size 0 for none. captions: bool [n], whether it has
    any. total: of all samples with an image; without_image: of the others; left_out: by the filters, see Filters.passes.
    """

    keys: Names
    places: np.ndarray
    captions: np.ndarray
    total: int
    without_image: int
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.keys)


def index_of(file: Path, rule: SampleRule) -> ShardIndex:
    """The index of a local shard, from the cache where it was made before. Raises UserError where the shard is not whole."""
    listing = listed(file, _maker(rule), KEEPING)
    columns, quantities = listing.columns, list(rule.filters.quantities)
    places = np.stack([[columns[f"{part}_offset"], columns[f"{part}_size"]] for part in PARTS]).transpose(2, 0, 1)
    has_image = places[:, 0, 1] > 0
    values = {name: columns[name].astype("<u4").view("<f4")[has_image] for name in quantities}
    passed, left_out = rule.filters.passes(values, int(has_image.sum()))
    kept = np.flatnonzero(has_image)[passed]
    return ShardIndex(
        listing.names.take(kept),
        places[kept].astype(np.int64),
        columns["captions"][kept] > 0,
        total=int(has_image.sum()),
        without_image=int((~has_image).sum()),
        left_out=left_out,
    )


def _maker(rule: SampleRule) -> Callable[[Path], Listing]:
    """What makes the index of a shard; its name, by which the cache tells rules apart, says all that it depends on."""

    def make(file: Path) -> Listing:
        return _make(file, rule)

    make.__name__ = f"shard index 2 of {rule.captions} {rule.filters.quantities}"
    return make


def _make(file: Path, rule: SampleRule) -> Listing:
    """Names are keys; columns: offset and size of each part, how many captions, and the quantities as bits of float32."""
    refuse_compressed(file)
    listing = list_tar(file)
    rows = _rows(listing)
    keys = list(rows)
    places = np.zeros((len(keys), len(PARTS), 2), np.uint64)
    offsets, sizes = listing.columns["offset"], listing.columns["size"]
    for part in range(len(PARTS)):
        chosen = np.array([row[part] for row in rows.values()], np.int64)
        there = np.flatnonzero(chosen >= 0)
        places[there, part, 0], places[there, part, 1] = offsets[chosen[there]], sizes[chosen[there]]
    captions = (places[:, 1, 1] > 0).astype(np.uint8) if TEXT in rule.captions else np.zeros(len(keys), np.uint8)
    values = np.full((len(keys), len(rule.filters.quantities)), np.nan, np.float32)
    if rule.reads_json:
        handle = ProcessFile(file)
        for k in np.flatnonzero(places[:, 2, 1] > 0).tolist():
            described = described_by(handle.read(int(places[k, 2, 0]), int(places[k, 2, 1])))
            values[k] = rule.filters.values(described)
            captions[k] |= any(texts_of(described.get(name)) for name in rule.caption_fields)
    columns = {f"{part}_offset": smallest(places[:, k, 0]) for k, part in enumerate(PARTS)}
    columns |= {f"{part}_size": smallest(places[:, k, 1]) for k, part in enumerate(PARTS)}
    columns |= {name: values[:, k].copy().view(np.uint32) for k, name in enumerate(rule.filters.quantities)}
    return Listing(Names.of(keys), {**columns, "captions": captions})


def _rows(listing: Listing) -> dict[str, list[int]]:
    """{key: rows of its image, text and json, -1 for none}, in the order of the keys. An image of another name, such as
    KEY.v2.jpg, is none of the sample, but where KEY has no other it counts as a sample without one."""
    rows: dict[str, list[int]] = {}
    best: dict[str, int] = {}
    for row, name in enumerate(listing.names):
        key, suffix = key_of(name)
        if "." in suffix and suffix.rpartition(".")[2] in IMAGES:
            rows.setdefault(key, [-1, -1, -1])
        if suffix in (TEXT, JSON):
            rows.setdefault(key, [-1, -1, -1])[1 if suffix == TEXT else 2] = row
        elif suffix in IMAGES:
            rank = IMAGES.index(suffix)
            if rank < best.get(key, len(IMAGES)):
                rows.setdefault(key, [-1, -1, -1])[0], best[key] = row, rank
    return dict(sorted(rows.items()))


def key_of(name: str) -> tuple[str, str]:
    """(key, suffix in small letters) of a file, parted at the first point of its name without folders, as webdataset does."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def described_by(content: bytes) -> Mapping[str, Any]:
    """What a .json says of its sample; nothing where it is damaged, or holds something else."""
    try:
        described = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return described if isinstance(described, dict) else {}


def caption_rule(captions: Sequence[str] | str, filters: Filters) -> SampleRule:
    """A SampleRule of the words that a YAML file gives."""
    return SampleRule((captions,) if isinstance(captions, str) else tuple(captions), filters)
