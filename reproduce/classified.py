"""Classify images and say how well: what `mt-diffusion classify` and `latent-classify` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from evaluations.classification import draw_confusion, plot_reliability, report_one, score_file
from evaluations.errors import EvaluationError
from evaluations.scores.classification_scores import BINS
from guided_mt.commands.classify import Classified
from guided_mt.errors import UserError


def classify_and_score(classify: Callable[[Sequence[str]], Classified | None], argv: Sequence[str]) -> None:
    """Run the command; where the data say the true classes, print the scores and draw two pictures. Raises UserError."""
    written = classify(argv)
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
