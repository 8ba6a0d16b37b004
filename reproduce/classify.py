"""Classify images by a model's label head or by a classifier; where their classes are known, say how well."""

from __future__ import annotations

from collections.abc import Sequence

from guided_mt.commands.classify import main as classify
from guided_mt.commands.console import run

from .classified import classify_and_score


def main(argv: Sequence[str]) -> None:
    """Name the classes of images and score them, as `argv` says. Raises UserError."""
    classify_and_score(classify, argv)


def console() -> None:
    """The script's door."""
    run(main)
