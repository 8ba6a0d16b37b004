"""What a run reports: means per interval, per task and per timestep quartile, to a line, progress.csv and TensorBoard."""

from __future__ import annotations

import csv
import datetime
import os
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QUARTILES = 4  # as ADM's log: q0 has the first quarter of the timesteps


class Averages:
    """Sums on the device of several values per sample and of `scalars` per step; the host sees them only when asked."""

    def __init__(
        self,
        names: Sequence[str],
        num_timesteps: int,
        device: torch.device,
        scalars: Sequence[str] = ("grad_norm",),
    ):
        self.names, self.num_timesteps = list(names), num_timesteps
        self.sums = torch.zeros(1 + QUARTILES, len(names), device=device)
        self.counts = torch.zeros_like(self.sums)
        self.scalars = {name: torch.zeros(2, device=device) for name in scalars}  # sum, count

    def add(self, t: Tensor, values: Tensor, kept: Tensor) -> None:
        """t [B]; values, kept [B, names]: kept 0 leaves a value out."""
        quartile = torch.nn.functional.one_hot(t * QUARTILES // self.num_timesteps, QUARTILES).to(values.dtype)
        groups = torch.cat([torch.ones_like(quartile[:, :1]), quartile], dim=1).T  # (5, B)
        kept = kept * torch.isfinite(values)
        self.sums += groups @ (torch.nan_to_num(values) * kept)
        self.counts += groups @ kept

    def add_scalars(self, values: Mapping[str, Tensor]) -> None:
        """{name: 0-dim tensor} of this step, for some or all of the scalars."""
        for name, value in values.items():
            self.scalars[name] += torch.stack([value, torch.ones_like(value)])

    def pop(self) -> dict[str, float]:
        """{name: mean, name_q0: ..., scalar: mean}, nan where nothing was seen; starts anew."""
        means = (self.sums / self.counts).cpu()  # 0 / 0 is nan, on purpose
        measured = {name: float(total[0] / total[1]) for name, total in self.scalars.items()}
        for total in (self.sums, self.counts, *self.scalars.values()):
            total.zero_()
        suffixes = ["", *(f"_q{q}" for q in range(QUARTILES))]
        values = {name + s: float(means[i, j]) for j, name in enumerate(self.names) for i, s in enumerate(suffixes)}
        return values | measured

    def state_dict(self) -> dict[str, Any]:
        """An unfinished interval, so that a resumed run logs the same line."""
        return {"sums": self.sums, "counts": self.counts, "scalars": dict(self.scalars)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mine, saved in ((self.sums, state["sums"]), (self.counts, state["counts"])):
            mine[:, : saved.shape[1]].copy_(saved)  # version 0.1 had fewer names, the first of these
        saved = state["scalars"] if "scalars" in state else {"grad_norm": state["norms"]}  # checkpoints of version 0.1
        for name, total in self.scalars.items():
            if name in saved:  # a scalar that the run did not have yet starts empty
                total.copy_(saved[name])


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
        if self._live:
            print(file=sys.stderr)
        self._file.close()
        self._board.close()
