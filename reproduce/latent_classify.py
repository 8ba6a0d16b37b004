"""Classify images by a latent model's label head; where their classes are known, say how well."""

from __future__ import annotations

from collections.abc import Sequence

from guided_mt.commands.console import run
from latent_mt.commands.latent_classify import main as classify

from .classified import classify_and_score


def main(argv: Sequence[str]) -> None:
    """Name the classes of images by a latent model and score them, as `argv` says. Raises UserError."""
    classify_and_score(classify, argv)


def console() -> None:
    """The script's door."""
    run(main)
