"""Several processes: NCCL with one of them, and two that share the device over gloo, against one alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..report import ROOT
from ..runner import Stage, Wrong, within
from .resume import ROUNDING

TIMEOUT = 90.0  # seconds, of which most go into imports
KINDS = (("nccl", 1), ("gloo", 1), ("gloo", 2))


def run(stage: Stage, early: Mapping[tuple[str, int], Group] | None = None) -> None:
    """early: what `started_early` gives."""
    found = early or {}
    if stage.device.type == "cuda":
        stage.check("processes: one over NCCL", lambda: nccl(stage, found), 20.0)
    else:
        stage.leave_out("processes: one over NCCL", "needs cuda")
    stage.check("processes: two over gloo on one device, as one alone", lambda: gloo(stage, found), 20.0)


@contextlib.contextmanager
def started_early(stage: Stage) -> Iterator[dict[tuple[str, int], Group]]:
    """Inside, on a GPU, all groups of processes are under way while other checks run, since they mostly import. On a CPU none."""
    kinds = KINDS if stage.device.type == "cuda" and not stage.only else ()
    early = {(backend, count): Group(stage, backend, count) for backend, count in kinds}
    try:
        yield early
    finally:
        for group in early.values():
            group.end()


def nccl(stage: Stage, early: Mapping[tuple[str, int], Group]) -> dict[str, Any]:
    """Collectives and a wrapped network. Raises Wrong where they change a number."""
    return _said(stage, early, "nccl", 1)


def gloo(stage: Stage, early: Mapping[tuple[str, int], Group]) -> dict[str, Any]:
    """The largest relative difference of a loss of two processes from that of one."""
    rows = {count: _said(stage, early, "gloo", count)["rows"] for count in (1, 2)}
    pairs = [(a[name], b[name]) for a, b in zip(rows[1], rows[2], strict=True) for name in ("loss", "grad_norm")]
    return within(max(abs(a - b) / abs(a) for a, b in pairs), ROUNDING, steps=len(rows[1]))


def _said(stage: Stage, early: Mapping[tuple[str, int], Group], backend: str, count: int) -> dict[str, Any]:
    group = early.get((backend, count)) or Group(stage, backend, count)
    return group.said(min(TIMEOUT, max(1.0, stage.run.left())))


class Group:
    """`count` processes of `member` that talk over `backend`."""

    def __init__(self, stage: Stage, backend: str, count: int):
        self.name, self.folder = f"{backend}, {count} processes", stage.folder / f"{backend}_{count}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        words = ["-m", "device.right.member", backend, str(stage.device), str(count), str(port), str(self.folder)]
        options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.STDOUT}
        self.processes: list[subprocess.Popen] = []
        for rank in range(count):
            with open(self.folder / f"log_{rank}", "w") as log:
                self.processes.append(subprocess.Popen([sys.executable, *words, str(rank)], stdout=log, **options))

    def said(self, seconds: float) -> dict[str, Any]:
        """What the first process says, for which all have so long. Raises Wrong where one fails."""
        until, codes = time.monotonic() + seconds, [1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            codes = [process.wait(timeout=max(0.1, until - time.monotonic())) for process in self.processes]
        self.end()
        said = self.folder / "said.json"
        if any(codes) or not said.exists():
            raise Wrong(f"{self.name}: {_last_line(self.folder)}")
        return json.loads(said.read_text())

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()


def _last_line(folder: Path) -> str:
    lines = [line for file in sorted(folder.glob("log_*")) for line in file.read_text().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "ended without a word, or took too long"
