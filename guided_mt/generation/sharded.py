"""Sampling over many batches and processes: resumable, and the same file whatever the number of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.images import save_npz
from ..errors import Interrupted, UserError
from ..runs.distributed import Processes
from ..runs.processes.claim import Claim

# CPU libraries choose other kernels, which round differently, for matrices of fewer rows: with at least so many samples per
# pass, sample k is the same to the bit for every batch size and number of processes.
SAFE_BATCH = 16


def run_sharded(
    out: Path,
    count: int,
    batch_size: int,
    processes: Processes,
    settings: Mapping[str, Any],
    make: Callable[[list[int]], Mapping[str, np.ndarray]],
    *,
    fill: bool = True,
) -> dict[str, np.ndarray] | None:
    """Call make(sample indices) -> {name: array [b, ...]} for each batch, and write all of it to `out` (.npz).

    fill: whether batches of fewer than SAFE_BATCH samples are filled up on a CPU.
    Finished batches wait in OUT.parts, so that a run that was stopped goes on where it was; `settings` must be the same
    then. Returns the arrays on the main process, None on the others. Raises UserError for other settings, where `out` can't be
    written, and where another process writes it; Interrupted for Ctrl-C.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: the name must end in .npz")
    folder = out.with_name(f"{out.name}.parts")
    signature = {**settings, "count": count, "batch_size": batch_size}
    with processes.sole_writer(Claim.of_file(out)):
        refused = None
        if processes.is_main:
            try:
                _take_up(folder, signature)
            except UserError as error:
                refused = error
        processes.agree(refused)
        try:
            return _make_all(out, folder, count, batch_size, processes, make, fill)
        except KeyboardInterrupt:
            kept = len(list(folder.glob("*.npz")))
            raise Interrupted(f"interrupted: {kept} batches wait in {folder}; the same command goes on") from None


def _make_all(
    out: Path,
    folder: Path,
    count: int,
    batch_size: int,
    processes: Processes,
    make: Callable[[list[int]], Mapping[str, np.ndarray]],
    fill: bool,
) -> dict[str, np.ndarray] | None:
    """What `run_sharded` does once the folder is its own."""
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mine = batches[processes.rank :: processes.world_size]
    for batch in tqdm(mine, desc=out.name, unit="batch", disable=not processes.is_main, mininterval=1.0):
        part = folder / f"{batch.start:08d}.npz"
        if not _is_whole(part):
            made = make(_filled(batch, processes.device) if fill else list(batch))
            save_npz(part, {name: array[: len(batch)] for name, array in made.items()})
    processes.barrier()
    arrays = None
    if processes.is_main:
        parts = [_read(folder / f"{batch.start:08d}.npz") for batch in batches]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        save_npz(out, arrays)
        shutil.rmtree(folder)
    processes.barrier()
    return arrays


def _filled(batch: range, device: torch.device) -> list[int]:
    """The batch, on a CPU filled up to SAFE_BATCH by repeating its last sample."""
    missing = SAFE_BATCH - len(batch) if device.type == "cpu" else 0
    return [*batch, *[batch[-1]] * missing]


def _take_up(folder: Path, signature: Mapping[str, Any]) -> None:
    """Keep `signature` in the folder. UserError where finished parts of another one are in it."""
    file = folder / "settings.json"
    wanted = json.loads(json.dumps(signature, default=str))
    if file.exists() and any(folder.glob("*.npz")):
        old = json.loads(file.read_text())
        different = [f"{key} was {str(old[key])[:60]}" for key in wanted if key in old and old[key] != wanted[key]]
        if different:
            raise UserError(
                f"{folder}: holds part of a run with other settings ({', '.join(different)}); "
                "repeat them, or remove the folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted))
    except OSError as error:
        raise UserError(f"--out {folder.parent}: can't be written ({error.strerror}); name another place") from None


def _is_whole(part: Path) -> bool:
    return part.exists() and zipfile.is_zipfile(part)


def _read(part: Path) -> dict[str, np.ndarray]:
    with np.load(part, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def content_hash(array: np.ndarray) -> str:
    """A short fingerprint of an input, to tell whether a resumed run has the same one."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
