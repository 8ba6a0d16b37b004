"""Runs checks within a time: each leaves a result, an error of one stops no other, and what time doesn't allow is named."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .report import environment, markdown

GRACE = 20.0  # seconds past the whole time after which a check that hangs is given up with all that follows
PASSED, FAILED, MEASURED, LEFT_OUT, NOT_RUN = "passed", "FAILED", "measured", "left out", "not run"


class Wrong(Exception):
    """A check has found something wrong; values: what it measured."""

    def __init__(self, text: str, **values: Any):
        super().__init__(text)
        self.values = values


class Needs(Exception):
    """What a check needs and this machine doesn't have."""


def within(error: float, tolerance: float, **values: Any) -> dict[str, Any]:
    """The measured values of a comparison. Raises Wrong where the error is no number or above its tolerance."""
    found = {"error": error, "tolerance": tolerance, **values}
    if not error <= tolerance:
        raise Wrong(f"error {error:.3g} > {tolerance:.3g}", **found)
    return found


@dataclass
class Result:
    """One check or measurement. values: numbers and words by name."""

    stage: str
    name: str
    verdict: str
    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0


class Run:
    """All stages. out: the folder of gpu.json and gpu.md, written after each result; minutes: for everything. cifar10:
    {"train", "test": its files}, empty where there are none."""

    warming: Any = None  # warm.Warming, where networks are compiled meanwhile

    def __init__(
        self,
        device: torch.device,
        out: Path,
        minutes: float,
        started: float,
        cifar10: Mapping[str, Path] | None = None,
    ):
        self.cifar10 = dict(cifar10 or {})
        self.device, self.out, self.started = device, out, started
        self.end = started + 60 * minutes
        self.tiny = device.type == "cpu"
        self.results: list[Result] = []
        self.folder = out / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment(device)
        self._writing = threading.Lock()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, result: Result) -> None:
        """Note a result: printed, and in the files."""
        self.results.append(result)
        values = "  ".join(f"{name} {_short(value)}" for name, value in result.values.items())
        print(
            f"{result.verdict:9s} {result.stage}: {result.name}  {values}  {result.note}  ({result.seconds:.1f} s)",
            flush=True,
        )
        self.save()

    @property
    def failed(self) -> list[Result]:
        """What was wrong."""
        return [result for result in self.results if result.verdict == FAILED]

    def save(self) -> None:
        """Write gpu.json and gpu.md."""
        with self._writing:
            results = [asdict(result) for result in self.results]
            whole = {**self.environment, "seconds": round(time.monotonic() - self.started, 1), "results": results}
            for name, text in (("gpu.json", json.dumps(whole, indent=1)), ("gpu.md", markdown(whole))):
                part = self.out / f".tmp_{name}"
                part.write_text(text + "\n")
                os.replace(part, self.out / name)

    def watch(self) -> None:
        """From now on, whatever hangs is ended a little after the whole time, with exit code 1; results so far stay."""

        def give_up() -> None:
            self.add(Result("run", "time", FAILED, note=f"a check did not end {GRACE:.0f} s after the time"))
            os._exit(1)

        timer = threading.Timer(max(0.0, self.left()) + GRACE, give_up)
        timer.daemon = True
        timer.start()


class Stage:
    """One part of a run, with `seconds` for it. only: words of which a check's name must hold one; none: all."""

    def __init__(self, name: str, run: Run, seconds: float, only: Sequence[str] = ()):
        self.name, self.run, self.only = name, run, only
        self.end = min(time.monotonic() + seconds, run.end)
        self.device, self.tiny, self.folder = run.device, run.tiny, run.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds of this stage."""
        return self.end - time.monotonic()

    def check(self, name: str, function: Callable[[], dict[str, Any]], takes: float = 1.0) -> dict[str, Any]:
        """Run a check, which returns what it measured, or raises Wrong, Needs or anything. takes: seconds, roughly."""
        return self._do(name, function, takes, PASSED)

    def measure(self, name: str, function: Callable[[], dict[str, Any]], takes: float = 1.0) -> dict[str, Any]:
        """As `check`, where nothing can be wrong but an error."""
        return self._do(name, function, takes, MEASURED)

    def leave_out(self, name: str, why: str) -> None:
        """Name what is not run here, and why."""
        if not self.only or any(word in name for word in self.only):
            self.run.add(Result(self.name, name, NOT_RUN, note=why))

    def _do(self, name: str, function: Callable[[], dict[str, Any]], takes: float, verdict: str) -> dict[str, Any]:
        if self.only and not any(word in name for word in self.only):
            return {}
        if takes > self.left():
            note = f"{max(0.0, self.left()):.0f} s were left, it takes about {takes:.0f} s"
            self.run.add(Result(self.name, name, LEFT_OUT, note=note))
            return {}
        start, values, note = time.monotonic(), {}, ""
        try:
            values = function()
        except Wrong as error:
            verdict, values, note = FAILED, error.values, str(error)
        except Needs as error:
            verdict, note = NOT_RUN, f"needs {error}"
        except ModuleNotFoundError as error:
            verdict, note = NOT_RUN, f"needs the package {error.name}"
        except Exception as error:  # whatever it is, the other checks go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            note = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})".replace("\n", " ")
            verdict, note = FAILED, note[:600]
            traceback.print_exc(limit=-4)
        self.run.add(Result(self.name, name, verdict, values, note, round(time.monotonic() - start, 2)))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return values


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
