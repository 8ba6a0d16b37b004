"""Writes tests/golden/loss_trace.json: the losses of 20 steps on the CPU per task. Run it only when numbers change on purpose."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from tiny import column, flags

from guided_mt.commands.train import main

FILE = Path(__file__).resolve().parents[1] / "golden" / "loss_trace.json"
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
LATENT_TRACES = {
    "latent any, both roles": {"mt_variant": "any"},
    "latent U, both roles": {"mt_variant": "U", "mt_weights": "bridge"},
    "latent X": {
        "mt_variant": "X",
        "mt_swap_prob": 0.0,
        "mt_loss_weight": 0.0,
    },  # a single task: one side from the other
    "latent none, l1": {"mt_sides": [], "loss_type": "l1"},
}


def loss_trace(name: str, run: Path) -> list[float]:
    """The losses of steps 1..20 of a row of TRACES, trained in the folder `run`."""
    main(flags(log_dir=run, total_steps=STEPS, lr=1e-3, grad_clip=1.0, **TRACES[name]))
    return column(run, "loss")


def latent_loss_trace(name: str, folder: Path) -> list[float]:
    """The same of a row of LATENT_TRACES; its data are written to `folder` too."""
    from tiny_latent import train, write_config, write_images, write_pairs

    params = LATENT_TRACES[name]
    data = write_pairs(folder / "pairs") if params.get("mt_sides", True) else write_images(folder / "images")
    train(write_config(folder / "config.yaml", data, folder / "run", **params), f"run.total_steps={STEPS}")
    return column(folder / "run", "loss")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        traces = {name: loss_trace(name, Path(folder) / name) for name in TRACES}
        for name in LATENT_TRACES:
            (Path(folder) / name).mkdir()
            traces[name] = latent_loss_trace(name, Path(folder) / name)
    FILE.write_text(json.dumps(traces, indent=1) + "\n")
    print(f"wrote {FILE}")
