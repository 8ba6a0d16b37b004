"""How much faster than guided-diffusion's own code ours is on a CPU: training steps and sampling, in one run, taking turns.

    git clone https://github.com/openai/guided-diffusion
    python benchmarks/against_adm.py guided-diffusion [--rounds 21] [--sizes a,b,c]

Both training loops run their whole step in float32 on one thread, from a batch in memory: the draws of timesteps and noise, the
loss, its gradients, AdamW, the gradient norm and one average of the weights. Both samplers run with learned variances. Each code
has a process of its own. Prints a Markdown table of medians and quartiles; its second row per size is the limit, the convolutions
of our step alone. What guided-diffusion imports and this machine lacks is replaced by a few lines (benchmarks/parents/standins.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both sides on the CPU

import torch
from parents.speed import SIZES, against_adm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="a clone of guided-diffusion")
    parser.add_argument("--rounds", type=int, default=21, help="turns of each side, at least 2")
    parser.add_argument("--sizes", default="a,b,c", help="which networks, separated by commas")
    args = parser.parse_args()
    if not (args.checkout / "guided_diffusion").is_dir():
        sys.exit(f"{args.checkout}: guided_diffusion is not in it; give a clone of guided-diffusion")
    if args.rounds < 2:
        sys.exit(f"--rounds {args.rounds}: quartiles need at least 2")
    sizes = args.sizes.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        sys.exit(f"--sizes: '{unknown[0]}' is none of {', '.join(SIZES)}")
    torch.set_num_threads(1)
    print(f"One thread, float32, torch {torch.__version__}, {cpu()}; medians of {args.rounds} rounds.\n")
    print("| | ours | guided-diffusion | times as fast (quartiles) |\n| --- | --- | --- | --- |")
    for size in sizes:
        for times in against_adm(args.checkout, size, args.rounds):
            ours, theirs = statistics.median(times.ours), statistics.median(times.theirs)
            low, median, high = times.ratio()
            print(
                f"| {times.what} | {ours:.0f} ms | {theirs:.0f} ms | {median:.2f} ({low:.2f} to {high:.2f}) |",
                flush=True,
            )


def cpu() -> str:
    """The processor's name as the system has it, and the instructions that PyTorch uses."""
    found = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in found if line.startswith("model name")]
    return f"{names[0] if names else 'a processor without a name'} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
