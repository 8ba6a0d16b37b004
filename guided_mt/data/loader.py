"""The training stream: batches of images for one process, decoded ahead by worker processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from typing_extensions import Self

from ..errors import UserError
from .dataset import CACHE_BYTES, BrokenImages, Order, RankSlice, StepDataset, StreamOrder, present_of
from .sources import ImageSource

MAX_WORKERS = 1024  # decoding processes of one training process
OF_THE_RUN = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # signals that the main process answers for all


@dataclass
class Batch:
    """One process's part of a global batch of b samples."""

    images: torch.Tensor  # uint8 [b, 3, H, W], or the source's own item shape and type
    labels: torch.Tensor | None  # int64 [b], -1 for a sample without a class; None where the data has no classes
    positions: torch.Tensor  # int64 [b], global sample positions: step * global_batch + i
    indices: torch.Tensor  # int64 [b], the images' numbers in the source; stays on the host
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)  # data beside the images, [b, ...] each
    present: dict[str, torch.Tensor] = field(default_factory=dict)  # {side that some items lack: bool [b]}
    # A text for each item, '' where it was dropped; None where the data has no captions.
    captions: list[str] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        move = functools.partial(torch.Tensor.to, device=device, non_blocking=non_blocking)
        labels = None if self.labels is None else move(self.labels)
        loaded = {name: move(x) for name, x in self.loaded.items()}
        present = {name: move(x) for name, x in self.present.items()}
        return Batch(move(self.images), labels, move(self.positions), self.indices, loaded, present, self.captions)


class BatchStream(Protocol):
    """This process's batches, in the order of the steps. A context manager, which ends what was started for it."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """Stop the worker processes."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ImageStream:
    """Iterable over the batches of steps start_step, start_step + 1, ..., total_steps - 1 (None: without end).

    A batch is a pure function of (source, image_size, seed, global sample positions): not of num_workers, and the
    ranks' batches put together not of world_size. To resume is to start at another step; there is no state to save.
    Raises UserError where the source is smaller than a global batch, or the batch does not divide by world_size; while
    iterating, where over 1 % of the images turn out broken, or the data as a whole wrong. Use as a context manager, or
    call close(), to end early.
    order: which item stands where; None: each once per epoch, in an order that is the seed's. drop_captions: how many captions
    are replaced by the empty one, in [0, 1].
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int | None = None,
        random_crop: bool = False,
        num_workers: int = 2,
        pin_memory: bool | None = None,
        order: Order | None = None,
        drop_captions: float = 0.0,
    ):
        if global_batch < 1 or global_batch % world_size:
            raise UserError(
                f"a global batch of {global_batch} does not divide by {world_size} processes; "
                f"take --global_batch_size {max(1, round(global_batch / world_size)) * world_size}"
            )
        if len(source) < global_batch:
            raise UserError(
                f"{source.path}: {len(source)} images are fewer than a global batch of {global_batch}; "
                f"lower --global_batch_size"
            )
        self.source = source
        # workers would only copy what is an array already
        item_bytes = math.prod(source.item_shape(image_size)) * source.dtype.itemsize
        in_process = source.is_array and not random_crop and len(source) * item_bytes <= CACHE_BYTES
        self.dataset = StepDataset(
            source,
            image_size,
            order=StreamOrder(len(source), seed) if order is None else order,
            part=RankSlice(global_batch, rank, world_size),
            random_crop=random_crop,
            cache=in_process,
            drop_captions=drop_captions,
        )
        self.num_workers = 0 if in_process else num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.start_step = start_step
        self.total_steps = total_steps
        self.broken = BrokenImages(source)
        self._iterators: list[Iterator[dict[str, Any]]] = []
        _open_streams.add(self)

    def __iter__(self) -> Iterator[Batch]:
        steps: range | itertools.count[int]
        if self.total_steps is None:
            steps = itertools.count(self.start_step)
        else:
            steps = range(self.start_step, self.total_steps)
        iterator = start_loader(self.dataset, steps, self.num_workers, self.pin_memory)
        self._iterators.append(iterator)
        try:
            for item in iterator:
                yield self._batch(item)
        finally:
            if iterator in self._iterators:
                self._iterators.remove(iterator)
                stop_loader(iterator)

    def _batch(self, item: dict[str, Any]) -> Batch:
        if "refused" in item:
            raise UserError(item["refused"])
        for index, reason in item["broken"]:
            self.broken.add(index, reason)
        numbers = item["indices"].numpy()
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[numbers])
        present = present_of(self.source, numbers)
        if self.pin_memory:
            labels = None if labels is None else labels.pin_memory()
            present = {name: x.pin_memory() for name, x in present.items()}
        return Batch(
            item["images"], labels, item["positions"], item["indices"], present=present, captions=item["captions"]
        )

    def close(self) -> None:
        """Stop the worker processes. Called at exit for every stream that is still open."""
        while self._iterators:
            stop_loader(self._iterators.pop())

    def __enter__(self) -> ImageStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_workers(flag: str, workers: int) -> None:
    """Raise UserError for a number of decoding processes that no machine has; flag: what it was given as."""
    if not 0 <= workers <= MAX_WORKERS:
        raise UserError(f"{flag} {workers}: must be at {'least 0' if workers < 0 else f'most {MAX_WORKERS}'}")


def start_loader(
    dataset: torch.utils.data.Dataset, steps: Iterable[int] | None, num_workers: int, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """The dataset's items number `steps`, each a batch, made ahead by worker processes. Ended by `stop_loader`.

    steps: None for a dataset that is iterated over; its workers' items come in turn.
    """
    loader = DataLoader(
        dataset,
        sampler=steps,
        batch_size=None,  # an item is a batch
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # or each start would draw from the global generator
    )
    with _signals_held():
        return iter(loader)  # starts the workers


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals of the run wait. A worker started meanwhile is deaf to them from its first instant, before it can ignore them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _start_worker(_: int) -> None:
    """Launchers send SIGTERM, SIGUSR1 and Ctrl-C to workers too; these must live on while the main process saves.

    They end when the main process closes the stream, or dies: DataLoader's own watchdog misses a death before its first look.
    """
    for number in OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent process's end, then end this one at once. For a thread of a worker process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def stop_loader(iterator: Any) -> None:
    """End a DataLoader iterator's workers now, by force where they are stuck (they ignore SIGTERM)."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()


_open_streams: weakref.WeakSet[ImageStream] = weakref.WeakSet()


@atexit.register  # after torch.utils.data was imported, so it runs before that marks Python as shutting down
def _close_streams() -> None:
    for stream in list(_open_streams):
        stream.close()
