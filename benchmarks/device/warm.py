"""Compiles the networks that are timed and trained later, in processes of their own, while the checks run.

Compiling takes longer than most of what is measured, and the compiler's cache is shared by all processes of a user. A process that
fails costs nothing but that its network is compiled where it is needed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from guided_mt.runs.compiling import CUDA_GRAPHS

from .forms import CIFAR, DIT_B2, SMALL, TWIN, TWIN_DIT, TWIN_FLAGS, batches, make_loop
from .report import ROOT
from .runner import Run

SIZES = {size.name: size for size in (CIFAR, SMALL, TWIN, TWIN_DIT, DIT_B2)}
# (form, size, --compile), all in bf16
NEEDED = {"learns": [(form, "twin", "True") for form in ("single", "X", "any", "label", "class_cond")]}
NEEDED["learns"] += [(form, TWIN_DIT.name, "True") for form in ("single", "any")]
NEEDED["fast"] = [
    ("single", DIT_B2.name, "True"),
    ("single", "CIFAR", "True"),
    *(("single", "small", how) for how in ("True", CUDA_GRAPHS)),
]


class Warming(contextlib.AbstractContextManager):
    """The processes for the stages of a run, of the sizes whose names hold a word of `only`; none on a CPU.

    `wait` before anything is timed.
    """

    def __init__(self, run: Run, stages: Sequence[str], only: Sequence[str] = ()):
        wanted = [each for stage in stages for each in NEEDED.get(stage, [])] if run.device.type == "cuda" else []
        wanted = [each for each in wanted if not only or any(word in each[1] for word in only)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        threads = str(max(1, (os.cpu_count() or 2) // max(1, len(wanted))))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TORCHINDUCTOR_COMPILE_THREADS": threads,
            "OMP_NUM_THREADS": "1",
        }
        self.logs = run.folder / "warm"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.started: dict[tuple[str, str, str], subprocess.Popen] = {}
        for form, size, how in wanted:
            with open(self.logs / f"{size}_{form}_{how}.log", "w") as log:
                words = [
                    sys.executable,
                    "-m",
                    "device.warm",
                    form,
                    size,
                    how,
                    str(run.device),
                    str(self.logs / f"{size}_{form}_{how}"),
                ]
                self.started[form, size, how] = subprocess.Popen(
                    words, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_politely
                )

    def wait(self, seconds: float) -> dict[str, str]:
        """Until all have ended, or are ended after so long: {network: what became of it}."""
        end, found = time.monotonic() + seconds, {}
        for key, process in self.started.items():
            name = " ".join(key)
            try:
                code = process.wait(timeout=max(0.1, end - time.monotonic()))
                found[name] = "compiled" if code == 0 else f"failed with code {code}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found[name] = "not in time"
        self.started = {}
        return found

    def __exit__(self, *_: object) -> None:
        for process in self.started.values():
            process.kill()
            process.wait()


def _politely() -> None:
    """The checks that run meanwhile come first."""
    os.nice(10)


def main(form: str, size: str, how: str, device: str, folder: str) -> None:
    """Two steps of a network as it is timed or trained."""
    place = torch.device(device)
    torch.cuda.set_device(place)
    torch.backends.cudnn.benchmark = True
    flags = TWIN_FLAGS if SIZES[size] in (TWIN, TWIN_DIT) else ()
    loop = make_loop(form, SIZES[size], place, Path(folder), *flags, "--precision", "bf16", "--compile", how)
    for batch in batches(loop, 2):
        loop.run_step(batch.to(place))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
