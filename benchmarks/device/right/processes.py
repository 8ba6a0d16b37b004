"""Several processes: NCCL with one of them, and two that share the device over gloo, against one alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..report import ROOT
from ..runner import Stage, Wrong, within
from .resume import ROUNDING

TIMEOUT = 180.0  # seconds, of which most go into imports


def run(stage: Stage) -> None:
    if stage.device.type == "cuda":
        stage.check("processes: one over NCCL", lambda: nccl(stage), 20.0)
    else:
        stage.leave_out("processes: one over NCCL", "needs cuda")
    stage.check("processes: two over gloo on one device, as one alone", lambda: gloo(stage), 20.0)


def nccl(stage: Stage) -> dict[str, Any]:
    """Collectives and a wrapped network. Raises Wrong where they change a number."""
    return _members(stage, "nccl", 1)


def gloo(stage: Stage) -> dict[str, Any]:
    """The largest relative difference of a loss of two processes from that of one."""
    rows = {count: _members(stage, "gloo", count)["rows"] for count in (1, 2)}
    pairs = [(a[name], b[name]) for a, b in zip(rows[1], rows[2], strict=True) for name in ("loss", "grad_norm")]
    return within(max(abs(a - b) / abs(a) for a, b in pairs), ROUNDING, steps=len(rows[1]))


def _members(stage: Stage, backend: str, count: int) -> dict[str, Any]:
    """What the first of `count` processes says. Raises Wrong where one fails."""
    folder = stage.folder / f"{backend}_{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    said = folder / "said.json"
    words = [
        sys.executable,
        "-m",
        "device.right.member",
        backend,
        str(stage.device),
        str(count),
        str(port),
        str(folder),
    ]
    logs = [open(folder / f"log_{rank}", "w+") for rank in range(count)]  # noqa: SIM115 - read below
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": path}, "stderr": subprocess.STDOUT}
    started = [subprocess.Popen([*words, str(rank)], stdout=log, **options) for rank, log in enumerate(logs)]
    try:
        codes = [process.wait(timeout=min(TIMEOUT, max(1.0, stage.run.left()))) for process in started]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes) or not said.exists():
        raise Wrong(f"{backend}, {count} processes: {_last_line(folder)}")
    return json.loads(said.read_text())


def _last_line(folder: Path) -> str:
    lines = [line for file in sorted(folder.glob("log_*")) for line in file.read_text().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "ended without a word, or took too long"
