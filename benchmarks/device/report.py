"""The results as a file for programs, and as tables for readers; and where they were measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when, and what was run: card, versions, commit."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return found


def _commit() -> str | None:
    """The commit, where there is git and a repository."""
    try:
        words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def markdown(whole: Mapping[str, Any]) -> str:
    """A table per stage of what `Run.save` writes."""
    facts = ", ".join(f"{name} {value}" for name, value in whole.items() if name != "results" and value is not None)
    lines = [f"# On a device\n\n{facts}"]
    stages = list(dict.fromkeys(result["stage"] for result in whole["results"]))
    for stage in stages:
        rows = [result for result in whole["results"] if result["stage"] == stage]
        lines += [f"\n## {stage}\n", "| what | verdict | found | seconds |", "| --- | --- | --- | --- |"]
        for row in rows:
            found = ", ".join(f"{name} {_number(value)}" for name, value in row["values"].items())
            found = "; ".join(part for part in (found, row["note"]) if part).replace("|", "/")
            lines.append(f"| {row['name']} | {row['verdict']} | {found} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
