"""How long a checkpoint holds up training: written on the spot, and by a thread from a copy in memory.

    python benchmarks/saving.py [--num_channels 128 --rounds 5 --folder . --device cuda]

Network, one average and AdamW's moments of a U-Net of 32 pixels (51 M parameters with 128 channels). Both take turns; printed are
medians of the pause, of how long it took until the file was whole, and of the longest time between two looks of the main thread at
the clock while the other thread wrote: by how much a single kernel launch may come late.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from guided_mt.networks.create import create_model
from guided_mt.runs.checkpoint import save_checkpoint
from guided_mt.runs.processes.memory import keep_freed_memory
from guided_mt.runs.writer import CheckpointWriter
from guided_mt.training.ema import Ema
from guided_mt.training.optim import Optimizer


def state(num_channels: int, device: str) -> dict[str, Any]:
    """The arguments of a save after one step."""
    sizes = {"image_size": 32, "num_channels": num_channels, "num_res_blocks": 3, "channel_mult": "1,2,2,2"}
    model = create_model(**sizes, attention_resolutions="16,8", num_heads=4, learn_sigma=True).to(device)
    model.to_fast_layout()
    optimizer, ema = Optimizer(model.parameters()), Ema(model, ["0.9999"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-4)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return {
        "weights": {"model": model.state_dict(), "ema_0.9999": ema.state_dict("0.9999", model)},
        "training_state": {"optimizer": optimizer.state_dict()},
        "config_yaml": "",
        "classes": None,
        "keep": 1,
    }


def measure(folder: Path, step: int, saved: dict[str, Any]) -> dict[str, float]:
    """Seconds by name, of one save of each kind."""
    start = time.perf_counter()
    save_checkpoint(folder, step, **saved)
    found = {"pause, written on the spot": time.perf_counter() - start}
    writer, late = CheckpointWriter(), 0.0
    start = time.perf_counter()
    writer.begin(folder, step + 1, **saved)
    found["pause, written by a thread"] = last = time.perf_counter() - start
    while writer.writing:
        now = time.perf_counter() - start
        late, last = max(late, now - last), now
    found["until the file is whole"] = time.perf_counter() - start
    failure = writer.close()
    if failure is not None:
        raise failure
    return {**found, "longest time between two looks": late}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_channels", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk that is to be measured")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()  # as training does
    saved = state(args.num_channels, args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = [measure(Path(folder), 2 * k, saved) for k in range(args.rounds)]
        files = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    print(f"{files / 1e6:.0f} MB, medians of {args.rounds} rounds (least to most)")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:32} {statistics.median(values):8.3f} s ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
