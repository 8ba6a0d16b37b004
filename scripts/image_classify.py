"""python scripts/image_classify.py --model_path RUN --data_dir ..., or --classifier_path RUN."""

from __future__ import annotations

from collections.abc import Sequence

from guided_mt.commands.classify import main as classify
from guided_mt.commands.console import run
from reproduce.classified import classify_and_score


def main(argv: Sequence[str]) -> None:
    classify_and_score(classify, argv)


if __name__ == "__main__":
    run(main)
