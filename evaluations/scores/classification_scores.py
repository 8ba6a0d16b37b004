"""The formulas: top-k accuracy, expected calibration error (Guo et al., ICML 2017), negative log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import EvaluationError

BINS = 15
SUM_TOLERANCE = 1e-3
LEAST_PROBABILITY = 1e-12


class CalibrationBins(NamedTuple):
    """Per bin (edges[b], edges[b + 1]] of confidence; accuracy and mean confidence are 0 where a bin is empty."""

    edges: np.ndarray  # float64 [B + 1]
    count: np.ndarray  # type: ignore[assignment]  # int64 [B]; hides tuple.count
    accuracy: np.ndarray  # float64 [B]
    confidence: np.ndarray  # float64 [B]

    @property
    def error(self) -> float:
        """Expected calibration error, Guo et al. 2017, eq. 3."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


@dataclass(frozen=True)
class ClassificationScores:
    """Fractions of 1, and `nll` in nats."""

    top1: float
    top5: float  # top-K where there are only K < 5 classes
    ece: float
    nll: float
    count: int
    classes: int
    impossible: int  # labels with a probability under LEAST_PROBABILITY
    bins: CalibrationBins


def classification_scores(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> ClassificationScores:
    """Scores of `probabilities` float [N, K], rows summing to 1, for true `labels` int [N] in 0..K-1.

    Raises EvaluationError for other shapes, types and values.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    check(probabilities, labels)
    if bins < 1:
        raise EvaluationError(f"{bins} bins: at least one is needed")
    p = probabilities.astype(np.float64)
    of_label = p[np.arange(len(p)), labels]
    rank = label_ranks(p, labels)
    calibrated = calibration_bins(p.max(axis=1), rank < 1, bins)
    return ClassificationScores(
        top1=float((rank < 1).mean()),
        top5=float((rank < 5).mean()),
        ece=calibrated.error,
        nll=float(-np.log(np.maximum(of_label, LEAST_PROBABILITY)).mean()),
        count=len(p),
        classes=p.shape[1],
        impossible=int((of_label < LEAST_PROBABILITY).sum()),
        bins=calibrated,
    )


def label_ranks(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the label: those of larger probability and equal ones of lower index. int64 [N]."""
    of_label = p[np.arange(len(p)), labels, None]
    lower = np.arange(p.shape[1]) < labels[:, None]
    return ((p > of_label) | ((p == of_label) & lower)).sum(axis=1)


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> CalibrationBins:
    """Divide `confidence` float [N] in 0..1 and `correct` bool [N] into equal-width bins (lo, hi]."""
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    accuracy, mean = (
        np.bincount(which, weights=values, minlength=bins) / np.maximum(counts, 1)
        for values in (correct.astype(np.float64), confidence)
    )
    return CalibrationBins(edges, counts, accuracy, mean)


def check(p: np.ndarray, labels: np.ndarray) -> None:
    """Raises EvaluationError unless `p` are probabilities [N, K] and `labels` fit them."""
    if p.ndim != 2 or labels.shape != p.shape[:1] or p.shape[1] < 2:
        raise EvaluationError(
            f"probabilities {list(p.shape)} and labels {list(labels.shape)}: expected [N, K], K at least 2, and [N]"
        )
    if p.dtype.kind != "f" or labels.dtype.kind not in "iu":
        raise EvaluationError(f"probabilities are {p.dtype} and labels {labels.dtype}: expected floats and integers")
    if len(p) == 0:
        raise EvaluationError("no samples: the arrays are empty")
    if not np.isfinite(p).all():
        raise EvaluationError(f"{(~np.isfinite(p)).sum()} probabilities are not finite")
    _check_sums(p.astype(np.float64))
    if labels.min() < 0 or labels.max() >= p.shape[1]:
        raise EvaluationError(
            f"labels lie in {labels.min()}..{labels.max()}, the {p.shape[1]} classes in 0..{p.shape[1] - 1}"
        )


def _check_sums(p: np.ndarray) -> None:
    far = np.abs(p.sum(axis=1) - 1) > SUM_TOLERANCE
    negative = (p < 0).any()
    if not (negative or far.any()):
        return
    if negative and p.max() <= 0 and np.allclose(np.exp(p).sum(axis=1), 1, atol=SUM_TOLERANCE):
        raise EvaluationError("these are log-probabilities: save their exp")
    if negative or p.max() > 1 + SUM_TOLERANCE:
        raise EvaluationError(
            f"values lie in {p.min():.4g}..{p.max():.4g}, which looks like logits: save their softmax"
        )
    row = int(far.argmax())
    raise EvaluationError(f"{far.sum()} of {len(p)} rows don't sum to 1 (row {row}: {p[row].sum():.4g})")
