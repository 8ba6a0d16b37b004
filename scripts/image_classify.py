"""python scripts/image_classify.py --model_path RUN --data_dir ..., or --classifier_path RUN."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from evaluations.classification import draw_confusion, plot_reliability, report_one, score_file
from evaluations.errors import EvaluationError
from evaluations.scores.classification_scores import BINS
from guided_mt.commands import classify
from guided_mt.commands.console import run
from guided_mt.errors import UserError


def main(argv: Sequence[str]) -> None:
    written = classify.main(argv)
    if written is None or not written.labelled:
        return
    try:
        result = score_file(written.path.stem, written.path)
    except EvaluationError as error:  # such as the NaN of a diverged model
        raise UserError(str(error)) from None
    print(report_one(result, BINS))
    confusion = written.path.with_name(f"{written.path.stem}_confusion.png")
    reliability = written.path.with_name(f"{written.path.stem}_reliability.png")
    try:
        draw_confusion(result, confusion)
        plot_reliability(result.scores, reliability)
    except EvaluationError as error:  # the scores are there without them
        print(f"no pictures: {error}", file=sys.stderr)
    else:
        print(f"{confusion}: true against predicted class\n{reliability}: accuracy against confidence")


if __name__ == "__main__":
    run(main)
