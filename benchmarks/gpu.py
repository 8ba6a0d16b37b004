"""Whether the project is right on a GPU, waits for nothing, how fast it is and what it learns: one command of nine minutes.

    python benchmarks/gpu.py [--stages right,waiting,large,commands,fast,learns] [--device cuda] [--minutes 9] [--out build/gpu]
    python benchmarks/gpu.py --device cpu        # the same checks on tiny networks: a minute or two on one core

Writes gpu.json and gpu.md after each result, so that a run that is cut off keeps what it has. Exit code 1 where a check fails.
What time doesn't allow is named as left out, and what the machine lacks (a package, a GPU) as not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from device import commands, fast, large, learns, waiting
from device.right import stage as right
from device.runner import Run, Stage
from device.warm import Warming

# Shares of the time; what a stage leaves, the later ones get.
STAGES = {
    "right": (right.run, 0.20),
    "waiting": (waiting.run, 0.03),
    "large": (large.run, 0.15),
    "commands": (commands.run, 0.10),
    "fast": (fast.run, 0.12),
    "learns": (learns.run, 0.40),
}


def main() -> int:
    started = time.monotonic() - time.process_time()  # the imports belong to the time
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--only", default="", help="words, with commas: only checks whose name holds one of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.json, gpu.md and the grids")
    parser.add_argument(
        "--cifar10",
        type=Path,
        help="folder with cifar10-train and cifar10-test (.zip, .tar or folders), for what is learned",
    )
    args = parser.parse_args()
    names = [name.strip() for name in args.stages.split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        parser.error(f"--stages {args.stages}: choose from {', '.join(STAGES)}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no CUDA device was found; --device cpu runs the tiny form")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as training does
    run = Run(device, args.out, args.minutes, started, learns.find_cifar10(args.cifar10))
    run.watch()
    only = [word.strip() for word in args.only.split(",") if word.strip()]
    order = [name for name in STAGES if name in names]
    with Warming(run, order, only) as run.warming:
        for place, name in enumerate(order):
            later = sum(STAGES[other][1] for other in order[place:])
            function, share = STAGES[name]
            seconds = run.left() if run.tiny else run.left() * share / later
            function(Stage(name, run, seconds, only))
    run.save()
    print(f"{len(run.results)} results in {args.out}, {len(run.failed)} failed", flush=True)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
