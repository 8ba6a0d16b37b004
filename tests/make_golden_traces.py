"""Writes tests/golden/loss_trace.json: the losses of 20 steps on the CPU per task. Run it only when numbers change on purpose."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from tiny import column, flags

from guided_mt.commands.train import main

FILE = Path(__file__).resolve().parent / "golden" / "loss_trace.json"
STEPS = 20
CLASSIFIER = {"classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "4"}
TRACES = {
    "none": {"mt_task": "none"},
    "masked U": {"mt_task": "masked", "mt_variant": "U"},
    "masked X": {"mt_task": "masked", "mt_variant": "X"},
    "label M": {"mt_task": "label", "mt_variant": "U", "num_classes": 10},
    "label E": {"mt_task": "label", "mt_variant": "U", "num_classes": 10, "mt_label_head": "E", **CLASSIFIER},
    "masked,label any": {"mt_task": "masked,label", "mt_variant": "any", "num_classes": 10, "mt_drop_prob": 0.2},
}


def loss_trace(name: str, run: Path) -> list[float]:
    """The losses of steps 1..20 of a row of TRACES, trained in the folder `run`."""
    main(flags(log_dir=run, total_steps=STEPS, lr=1e-3, **TRACES[name]))
    return column(run, "loss")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        traces = {name: loss_trace(name, Path(folder) / name) for name in TRACES}
    FILE.write_text(json.dumps(traces, indent=1) + "\n")
    print(f"wrote {FILE}")
