"""Remote shards as a training stream: lanes, each of which reads shard after shard by a plan that is a function of the seed.

The plan is endless: the shards in the order of epoch 0, then in that of epoch 1, and so on. Lane l of L reads number l, l + L,
l + 2 L, ... of it, one after another. The L lanes together make a global batch, m samples each, so that a position determines a
lane and the number k of a sample in it. Processes and their workers share out whole lanes.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from guided_mt.data import Batch
from guided_mt.data.dataset import (
    CROP,
    SHARDS,
    WINDOW,
    BrokenImage,
    decode,
    draw_caption,
    random_words,
    uniforms_of,
)
from guided_mt.data.loader import start_loader, stop_loader
from guided_mt.errors import UserError

from .counts import Counts
from .index import SampleRule
from .stream import OneImage, RemoteSample, ShardError, samples_of

logger = logging.getLogger("latent_mt.data")

LEAST_SEEN = 1000  # so many samples count at least where 1 % may be broken


@dataclass(frozen=True)
class LanePlan:
    """What all processes read. lanes: of the whole run, a divisor of global_batch; block: samples that a lane shuffles together."""

    shards: Sequence[str]
    rule: SampleRule
    seed: int
    lanes: int
    global_batch: int
    block: int
    missing: str

    @property
    def per_lane(self) -> int:
        """Samples of a lane in a global batch."""
        return self.global_batch // self.lanes

    def shards_of(self, lane: int) -> Iterator[str]:
        """The shards that a lane reads, without end."""
        count, epoch, order = len(self.shards), -1, np.zeros(0, np.int64)
        for number in itertools.count(lane, self.lanes):
            if number // count != epoch:
                epoch = number // count
                order = np.argsort(random_words(SHARDS, self.seed, epoch, count), kind="stable")
            yield self.shards[order[number % count]]

    def samples(self, lane: int, start: int) -> Iterator[RemoteSample]:
        """Sample number start, start + 1, ... of a lane, without end. Raises UserError."""
        first = start // self.block
        raw = self._in_order(lane, first * self.block)
        for number in itertools.count(first):
            block = list(itertools.islice(raw, self.block))
            order = np.argsort(random_words(WINDOW, self.seed, lane * 2**40 + number, self.block), kind="stable")
            yield from (block[k] for k in order[start % self.block if number == first else 0 :])

    def _in_order(self, lane: int, skipped: int) -> Iterator[RemoteSample]:
        """A lane's samples as they stand in its shards. Shards whose counts are known are skipped unread."""
        counts, distinct = Counts(self.rule), len(set(self.shards))
        empty, said = set[str](), set[str]()  # shards that gave nothing since one gave something; that a warning named
        for shard in self.shards_of(lane):
            known = counts.get(shard)
            if known and skipped >= known:
                skipped -= known
                empty.clear()
                continue
            found = 0
            try:
                for sample in samples_of(shard, self.rule):
                    found += 1
                    if skipped:
                        skipped -= 1
                    else:
                        yield sample
            except ShardError as error:
                if self.missing == "stop":
                    raise UserError(f"{error}; data.params.missing_shards=skip leaves such shards out") from None
                if shard not in said:
                    logger.warning("%s; what is left of it is left out", error)
                said.add(shard)
            else:
                counts.put(shard, found)
            if found:
                empty.clear()
            else:
                empty.add(shard)
            if len(empty) == distinct:
                raise UserError(
                    f"{shard}: none of the {distinct} shards has a sample that passes data.params.filters, or can be read"
                )


class _Lanes(torch.utils.data.IterableDataset):
    """The parts that a worker makes of this process's batches: an item for each step, of the worker's own lanes."""

    def __init__(self, plan: LanePlan, lanes: Sequence[int], first_step: int, steps: int | None, options: LaneOptions):
        self.plan, self.lanes, self.first_step, self.steps, self.options = plan, lanes, first_step, steps, options

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        own = self.lanes if worker is None else np.array_split(self.lanes, worker.num_workers)[worker.id].tolist()
        each = self.plan.per_lane
        readers = [_LaneReader(self.plan, lane, self.first_step * each, self.options) for lane in own]
        numbers = itertools.count(self.first_step)
        for step in numbers if self.steps is None else range(self.first_step, self.steps):
            try:
                parts = [
                    reader.next(step * self.plan.global_batch + reader.lane * each + k)
                    for reader in readers
                    for k in range(each)
                ]
            except UserError as error:  # which would lose its form on the way out of a worker process
                yield {"refused": str(error)}
                return
            broken = [name for reader in readers for name in reader.broken]
            for reader in readers:
                reader.broken = []
            yield {
                "images": torch.from_numpy(np.stack([image for image, _, _ in parts])),
                "captions": [caption for _, caption, _ in parts],
                "positions": torch.tensor([position for _, _, position in parts]),
                "broken": broken,
            }


@dataclass(frozen=True)
class LaneOptions:
    """What becomes of the samples, whichever they are."""

    image_size: int
    random_crop: bool
    drop_captions: float
    max_pixels: int


class _LaneReader:
    """Decodes the samples of a lane in turn. A broken one is replaced by the next whole one, which comes again in its own turn."""

    def __init__(self, plan: LanePlan, lane: int, start: int, options: LaneOptions):
        self.plan, self.lane, self.options = plan, lane, options
        self._samples = plan.samples(lane, start)
        self._ahead: deque[RemoteSample] = deque()
        self.broken: list[tuple[str, str]] = []  # (name, reason)

    def next(self, position: int) -> tuple[np.ndarray, str, int]:
        """(image [3, s, s], caption, position) of the sample that is next in the lane. Raises UserError."""
        o, seed = self.options, self.plan.seed
        uniforms = uniforms_of(random_words(CROP, seed, position, 3)) if o.random_crop else None
        for ahead in itertools.count():
            if len(self._ahead) <= ahead:
                self._ahead.append(next(self._samples))
            sample = self._ahead[ahead]
            try:
                image = decode(OneImage(sample.image, o.max_pixels), 0, o.image_size, uniforms)
            except BrokenImage as error:
                if ahead == 0:
                    self.broken.append((sample.name, str(error)))
                if ahead == LEAST_SEEN // 100:
                    raise UserError(f"{sample.name} and {ahead} images before it are broken ({error})") from None
                continue
            self._ahead.popleft()
            return image, draw_caption(sample.captions, seed, position, o.drop_captions), position
        raise AssertionError


class LaneStream:
    """This process's batches of the steps start_step, ..., total_steps - 1, as `guided_mt.data.ImageStream`'s.

    Raises UserError where lanes and processes don't fit together, and, while iterating, for shards that can't be read and where
    over 1 % of the samples are broken.
    """

    def __init__(
        self,
        plan: LanePlan,
        options: LaneOptions,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        total_steps: int | None,
        num_workers: int,
    ):
        if plan.lanes % world_size:
            raise UserError(
                f"data.params.lanes: {plan.lanes} lanes share out a batch of {plan.global_batch}, and don't divide by "
                f"{world_size} processes; take a multiple of these that divides the batch, such as {plan.global_batch}"
            )
        own = plan.lanes // world_size
        lanes = list(range(rank * own, (rank + 1) * own))
        self.workers = min(num_workers, own)
        self._dataset = _Lanes(plan, lanes, start_step, total_steps, options)
        self._iterator: Any = None
        self._seen, self._broken = 0, set[str]()

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = start_loader(self._dataset, None, self.workers)
        try:
            while parts := list(itertools.islice(self._iterator, max(1, self.workers))):
                yield self._batch(parts)
        finally:
            self.close()

    def _batch(self, parts: list[dict[str, Any]]) -> Batch:
        for part in parts:
            if "refused" in part:
                raise UserError(part["refused"])
        images, positions = (_together([part[name] for part in parts]) for name in ("images", "positions"))
        self._seen += len(images)
        for name, why in (broken for part in parts for broken in part["broken"]):
            if name in self._broken:
                continue
            logger.warning("image %s is broken and left out (%s)", name, why)
            self._broken.add(name)
            if len(self._broken) > max(self._seen, LEAST_SEEN) // 100:
                raise UserError(
                    f"{len(self._broken)} of {self._seen} images are broken, over 1 %, the last one {name} ({why}); "
                    f"repair or remove them"
                )
        return Batch(images, None, positions, positions.cpu(), captions=[c for part in parts for c in part["captions"]])

    def close(self) -> None:
        """Stop the worker processes, and what they read from."""
        if self._iterator is not None:
            stop_loader(self._iterator)
            self._iterator = None

    def __enter__(self) -> LaneStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InParts:
    """A stream of remote samples in batches of `size`, `count` of them."""

    def __init__(self, stream: LaneStream, size: int, count: int):
        self.stream, self.size, self.count = stream, size, count

    def __iter__(self) -> Iterator[Batch]:
        parts = (
            Batch(
                batch.images[k : k + self.size],
                None,
                batch.positions[k : k + self.size],
                batch.indices[k : k + self.size],
                captions=(batch.captions or [])[k : k + self.size],
            )
            for batch in self.stream
            for k in range(0, len(batch.images), self.size)
        )
        yield from itertools.islice(parts, self.count)

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()

    def __enter__(self) -> InParts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts as one tensor, in pinned memory where a GPU reads it: of other memory a copy would wait for the device."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    out = torch.empty(shape, dtype=parts[0].dtype, pin_memory=torch.cuda.is_available())
    return torch.cat(parts, out=out)


def lanes_of(wanted: int, global_batch: int) -> int:
    """How many lanes share out a global batch: as many as are wanted, or the most that divide both."""
    return math.gcd(wanted, global_batch)
