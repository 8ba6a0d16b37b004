"""Say what a run, a checkpoint, a weights file, samples or a data set is, and what to type to use it.

    mt-diffusion show runs/demo
    mt-diffusion show downloads/model.ckpt
    mt-diffusion show samples.npz --json

Reads headers and small files alone, and unpickles nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from evaluations.errors import run

from .recognised import describe


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", metavar="PATH", help="a file or folder, or what --data_dir takes, as builtin:digits")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)
    facts = describe(arguments.path)
    print(json.dumps(facts.as_dict(), indent=1) if arguments.json else facts.text())


def console() -> None:
    run(main)
