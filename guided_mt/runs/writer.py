"""Checkpoints that are written while training goes on: the state is copied to the host, and a thread writes the copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time by `checkpoint.save_checkpoint`, in a thread for which the end of the program waits."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def begin(
        self,
        run: Path,
        step: int,
        *,
        weights: Mapping[str, Mapping[str, Tensor]],
        training_state: Mapping[str, Any],
        **rest: Any,
    ) -> None:
        """Copy the state and begin to write it; afterwards the state may change. The one before has to be written.

        The arguments are those of `checkpoint.save_checkpoint`. What goes wrong is told by `failure`.
        """
        copies = HostCopies()
        try:
            host_weights, host_state = copies.of(weights), copies.of(training_state)
            copies.wait()
        except RuntimeError as error:  # no memory for them
            self._writing = Future()
            self._writing.set_exception(checkpoint.not_written(checkpoint.step_folder(run, step), error))
            return
        save = partial(checkpoint.save_checkpoint, run, step, weights=host_weights, training_state=host_state, **rest)
        self._writing = self._pool.submit(save)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def failure(self, wait: bool) -> UserError | None:
        """Why the last checkpoint could not be written, told once; None where it could. Raises what is no UserError.

        wait: until it is written; else None as well while it is being written.
        """
        if self._writing is None or (self.writing and not wait):
            return None
        error, self._writing = self._writing.exception(), None
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def close(self) -> UserError | None:
        """The thread's end, once it has written; returns as `failure`."""
        self._pool.shutdown()
        return self.failure(wait=True)


class HostCopies:
    """Copies of tensors in the host's memory, which `wait` completes. The originals have to stay as they are till then.

    From a GPU they are copied without waiting for each, into pinned memory, which the driver can write by itself. What occurs
    several times is copied once.
    """

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[Tensor, Tensor]] = {}  # the originals too: no other tensor may get their place
        self._devices: set[torch.device] = set()

    def of(self, value: Any) -> Any:
        """`value` with copies of all tensors in its dictionaries, lists and tuples, and of everything else."""
        if isinstance(value, Tensor):
            return self._copy(value.detach())
        if isinstance(value, Mapping):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.of, value))
        return copy.deepcopy(value)

    def _copy(self, tensor: Tensor) -> Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._made:
            on_gpu = tensor.device.type == "cuda"
            host = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu).copy_(tensor, non_blocking=on_gpu)
            self._made[place] = tensor, host
            if on_gpu:
                self._devices.add(tensor.device)
        return self._made[place][1]

    def wait(self) -> None:
        """Return when all copies are there."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._made.clear()
