"""What this project does differently from the code that it continues, measured with that code itself.

    git clone https://github.com/openai/guided-diffusion
    git clone https://github.com/CompVis/latent-diffusion
    python benchmarks/against_parents.py guided-diffusion latent-diffusion [--speed] [--golden tests/golden]

Each checkout is one of the two, told by what is in it. Their modules are run beside ours on the same weights, images and noise, and
a Markdown table says how large the difference is. What they import and this machine lacks is replaced by a few lines
(benchmarks/parents/standins.py); what still can't run is a row that says why. The exit code is 1 where something differs that
should not. --speed adds times, --golden writes the parents' numbers that the tests keep.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both sides on the CPU, in float32

import torch
from parents import standins, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT", help="a clone of one of the two")
    parser.add_argument(
        "--speed", action="store_true", help="also time a training step and a network call, interleaved"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of --speed")
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="write the parents' numbers for the tests there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = False
    for checkout in args.checkouts:
        title, rows = compare(checkout, args)
        print(f"\n{table.markdown(title, rows)}", flush=True)
        wrong |= any(row.wrong for row in rows)
    sys.exit(1 if wrong else 0)


def compare(checkout: Path, args: argparse.Namespace) -> tuple[str, list[table.Row]]:
    """(the parent's name, its rows)."""
    if (checkout / "guided_diffusion").is_dir():
        made = standins.for_guided_diffusion(checkout)
        from parents import adm, goldens, speed, training

        rows = table.run([*adm.COMPARISONS, training.training])
        write, times, name = goldens.write_adm, partial(speed.adm, checkout), "guided-diffusion"
    elif (checkout / "ldm").is_dir():
        made = standins.for_latent_diffusion(checkout)
        from parents import goldens, ldm, speed

        rows = table.run(ldm.COMPARISONS)
        write, times, name = goldens.write_ldm, speed.ldm, "latent-diffusion"
    else:
        sys.exit(
            f"{checkout}: neither guided_diffusion nor ldm is in it; give a clone of guided-diffusion or latent-diffusion"
        )
    if args.golden:
        write(args.golden)
    if args.speed:
        rows += table.run([lambda: times(args.rounds)])
    return f"{name} ({', '.join(made)}: stand-ins)" if made else name, rows


if __name__ == "__main__":
    main()
