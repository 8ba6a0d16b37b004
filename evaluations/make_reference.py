"""A reference batch for `evaluate` from any images: statistics of all of them, and some of them for precision and recall.

    mt-diffusion reference SRC OUT.npz [--images 10000]

SRC is what `evaluate` takes. OUT has ADM's layout: mu, sigma, mu_s, sigma_s, arr_0.
"""

from __future__ import annotations

if __package__ in (None, ""):  # run as a file
    from installed import run_as_script

    run_as_script()

import argparse
from collections.abc import Sequence
from pathlib import Path

from evaluations.errors import EvaluationError, run
from evaluations.features.backends import add_backend_flags, check_backend_flags, load_backend
from evaluations.features.reference import write_reference
from evaluations.files.files import prepare_output
from evaluations.files.images import open_images


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="images")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument(
        "--images", type=int, default=10000, help="how many images to store, evenly spaced; 0: statistics only"
    )
    add_backend_flags(parser)
    args = parser.parse_args(argv)
    check_backend_flags(args)
    if args.out.suffix != ".npz":
        raise EvaluationError(f"{args.out}: a reference is an .npz file")
    if args.images < 0:
        raise EvaluationError(f"--images must be 0 or more, not {args.images}")
    prepare_output(args.out)
    if args.out.exists() and args.out.samefile(args.src):
        raise EvaluationError(f"{args.out}: is the source itself; give the reference another name")
    images = open_images(args.src)
    backend = load_backend(args)
    features = backend.features(images, "images")
    kept = write_reference(
        args.out, images, features, backend.network_sha256, args.images, args.batch_size, args.workers
    )
    print(f"{args.out}: statistics of {images.count} images of {images.height}x{images.width}, {kept} of them stored")


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
