"""The command line of latent_mt's training commands; nothing of it needs Lightning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from guided_mt.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """As typed: the YAML file, `key=value` over it in their order, and whether to stop before training."""

    config: str
    overrides: list[str]
    dry_run: bool


def read_arguments(argv: Sequence[str], description: str) -> Arguments:
    """`--config FILE [--dry_run] [--limit N] [key=value ...]`. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s --config FILE [--dry_run] [--limit N] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-b",
        "--config",
        "--base",
        metavar="FILE",
        default="",
        help="the YAML file, or the name of one that comes along (mt-diffusion presets)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved configuration and the model's size, then stop"
    )
    parser.add_argument("--limit", metavar="N", help="use the first N items only, as data.params.limit=N")

    def refuse(message: str) -> None:
        raise UserError(message)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    args, words = parser.parse_known_args(argv)  # key=value between flags too
    for word in words:
        if word.startswith("-") or "=" not in word:
            raise UserError(
                f"don't know what to do with '{word}'; settings are written key=value, as in run.total_steps=1000"
            )
    if not args.config:
        raise UserError(
            "--config is missing: a YAML file, or a name that mt-diffusion presets lists, such as camvid_mt"
        )
    return Arguments(args.config, [*words, *([f"data.params.limit={args.limit}"] if args.limit else [])], args.dry_run)
