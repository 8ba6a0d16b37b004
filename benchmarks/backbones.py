"""What a training step costs with a U-Net and with a transformer: by form, against the single task, and by length of the sequence.

    python benchmarks/backbones.py [--device cpu --rounds 7 --batch 16 --image_size 16 --compile False]

Every round runs each row once, so that a busy machine slows all of them alike; printed are medians over rounds, and the medians of
the per-round ratios to the single task of the same backbone. Operations are those of a forward and backward pass for one image.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from device import flops
from device.fast import seconds_each
from device.forms import Size, batches, make_loop

from guided_mt.runs.compiling import COMPILE

SHOWN = ("single", "U", "X", "any")
IN_CONTEXT = ("--dit_context", "in-context")


def networks(image_size: int, batch: int) -> dict[str, Size]:
    """{name: a network} that are compared, of about as many operations each."""
    dit = ("--dit_hidden_size", "256", "--dit_depth", "8", "--dit_num_heads", "4")
    return {
        "U-Net": Size("U-Net", image_size, 64, 1, "1,2,2", str(image_size // 2), batch, head_channels=32),
        "transformer": Size.of_transformer("DiT", image_size, batch, *dit),
        "transformer, tokens in the sequence": Size.of_transformer("DiT", image_size, batch, *dit, *IN_CONTEXT),
    }


def lengths(batch: int) -> dict[str, Size]:
    """{name: a transformer on images of a size}: patches of 2 x 2 pixels, 4 to 256 of them."""
    dit = ("--dit_hidden_size", "128", "--dit_depth", "6", "--dit_num_heads", "4")
    return {f"{(size // 2) ** 2} tokens": Size.of_transformer("DiT", size, batch, *dit) for size in (4, 8, 16, 32)}


def timed(steps: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each step in each round."""
    for step in steps:
        step()
    return [[seconds_each(step, device, device.type == "cpu") for step in steps] for _ in range(rounds)]


def step_of(form: str, size: Size, device: torch.device, folder: Path, *more: str) -> Callable[[], object]:
    """A training step of the project's own loop, each time on one of two batches."""
    loop = make_loop(form, size, device, folder, *more)
    turns = itertools.cycle([batch.to(device) for batch in batches(loop, 2)])
    return lambda: loop.run_step(next(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile", default="False", choices=COMPILE)
    args = parser.parse_args()
    device, more = torch.device(args.device), ("--precision", args.precision, "--compile", args.compile)

    with tempfile.TemporaryDirectory() as name:
        rows = [(network, form) for network in networks(args.image_size, args.batch) for form in SHOWN]
        rows = [row for row in rows if "sequence" not in row[0] or row[1] in ("single", "any")]
        sizes = networks(args.image_size, args.batch)
        steps = [
            step_of(form, sizes[network], device, Path(name) / str(i), *more) for i, (network, form) in enumerate(rows)
        ]
        taken = timed(steps, args.rounds, device)
        print(f"{args.image_size} px, batch {args.batch}, {device}, {args.precision}, torch {torch.__version__}")
        print(f"{'':36s}{'form':8s}{'ms':>9s}{'x single':>10s}{'GFLOP':>9s}")
        for i, (network, form) in enumerate(rows):
            single = rows.index((network, "single"))
            ms = 1000 * statistics.median(round_[i] for round_ in taken)
            ratio = statistics.median(round_[i] / round_[single] for round_ in taken)
            operations = flops.per_image(form, sizes[network]) / 1e9
            print(f"{network:36s}{form:8s}{ms:9.1f}{ratio:10.3f}{operations:9.3f}")
        by_length = lengths(args.batch)
        steps = [
            step_of("single", size, device, Path(name) / f"l{i}", *more) for i, size in enumerate(by_length.values())
        ]
        taken = timed(steps, args.rounds, device)
        for i, (length, size) in enumerate(by_length.items()):
            ms = 1000 * statistics.median(round_[i] for round_ in taken)
            print(f"{length:44s}{ms:9.1f}{'':10s}{flops.per_image('single', size) / 1e9:9.3f}")


if __name__ == "__main__":
    main()
