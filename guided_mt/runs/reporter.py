"""Rows of a run at its log interval: to a line on the terminal, progress.csv and TensorBoard."""

from __future__ import annotations

import csv
import datetime
import os
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


class Reporter:
    """Writes rows of one run on the main process. A resumed run first drops the rows after the step it resumes from."""

    def __init__(self, run: Path, columns: Sequence[str], total_steps: int, start_step: int = 0):
        # TensorBoard's own switch for its stub in the place of TensorFlow, which, where it is installed, takes seconds to
        # import and then aborts the process when torch.compile imports Triton.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self.columns, self.total_steps = list(columns), total_steps
        file = run / "progress.csv"
        rows: list[dict[str, str]] = []
        if file.exists():
            with open(file, newline="") as old:
                rows = [
                    row
                    for row in csv.DictReader(old)
                    if (row.get("step") or "").isdigit() and int(row["step"]) <= start_step
                ]
        whole = file.with_name(f".tmp_{file.name}")
        self._file = open(whole, "w", newline="")  # noqa: SIM115 - open for the whole run
        self._csv = csv.DictWriter(self._file, self.columns, extrasaction="ignore", restval="")
        self._csv.writeheader()
        self._csv.writerows(rows)
        self._file.flush()
        os.replace(whole, file)
        self._board = SummaryWriter(str(run), purge_step=start_step + 1 if start_step else None)
        self._live = sys.stderr.isatty()
        self._started, self._start_step = time.monotonic(), start_step

    def row(self, values: dict[str, float]) -> None:
        """Write a row {column: value} to the terminal, progress.csv and TensorBoard; `step` is one of the columns."""
        self._csv.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in values.items()})
        self._file.flush()
        step = int(values["step"])
        for name, value in values.items():
            if name not in ("step", "samples"):
                self._board.add_scalar(name, value, step)
        self._board.flush()
        self._line(values)

    def image(self, name: str, grid: Tensor, step: int) -> None:
        """grid uint8 [3, H, W]."""
        self._board.add_image(name, grid, step)

    def _line(self, values: dict[str, float]) -> None:
        step = int(values["step"])
        per_step = (time.monotonic() - self._started) / max(1, step - self._start_step)
        left = datetime.timedelta(seconds=round(per_step * (self.total_steps - step)))
        shown = [k for k in self.columns if "_q" not in k and k not in ("step", "samples", "images_per_second", "lr")]
        parts = "  ".join(f"{k} {values[k]:.4g}" for k in shown if k in values)
        line = f"step {step}/{self.total_steps}  {parts}  {values['images_per_second']:.1f} images/s  {left} left"
        print(f"\r\033[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the files."""
        if self._live:
            print(file=sys.stderr)
        self._file.close()
        self._board.close()
