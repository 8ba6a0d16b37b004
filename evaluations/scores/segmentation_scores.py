"""The formulas of Table 4: confusion matrix, per-pixel accuracy, per-class accuracy and class IoU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import EvaluationError
from ..files.palettes import VOID


def confusion_matrix(pred_indices: np.ndarray, ref_indices: np.ndarray, classes: int, void: int = VOID) -> np.ndarray:
    """H[i, j] = number of pixels of true class i predicted as j, int64 [classes, classes].

    pred_indices, ref_indices: integers of one shape in 0..classes-1; pixels whose reference is `void` are left out.
    Raises EvaluationError for other values and for shapes that differ.
    """
    if pred_indices.shape != ref_indices.shape:
        raise EvaluationError(f"predictions {pred_indices.shape} and reference {ref_indices.shape} differ in shape")
    kept = ref_indices != void
    pred, ref = pred_indices[kept].astype(np.int64), ref_indices[kept].astype(np.int64)
    for name, indices in (("predicted", pred), ("reference", ref)):
        if indices.size and (indices.min() < 0 or indices.max() >= classes):
            raise EvaluationError(f"{name} classes lie in {indices.min()}..{indices.max()}, not 0..{classes - 1}")
    return np.bincount(classes * ref + pred, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class SegmentationScores:
    """All as fractions. The first three count absent classes as 0, the `present_` means leave them out."""

    pixel_accuracy: float
    class_accuracy: float
    class_iou: float
    present_class_accuracy: float
    present_class_iou: float
    accuracies: np.ndarray  # float64 [K], 0 for a class that is absent
    ious: np.ndarray  # float64 [K]
    share: np.ndarray  # float64 [K] of the reference's pixels
    present: np.ndarray  # bool [K]: occurs in the reference


def scores(H: np.ndarray) -> SegmentationScores:
    """The scores of a confusion matrix [K, K]. Raises EvaluationError where it is empty."""
    total = H.sum()
    if total == 0:
        raise EvaluationError("no pixel to score: the reference is void everywhere")
    hits, true, predicted = np.diag(H), H.sum(axis=1), H.sum(axis=0)
    accuracies, ious = hits / np.maximum(true, 1), hits / np.maximum(true + predicted - hits, 1)
    present = true > 0
    return SegmentationScores(
        pixel_accuracy=float(hits.sum() / total),
        class_accuracy=float(accuracies.mean()),
        class_iou=float(ious.mean()),
        present_class_accuracy=float(accuracies[present].mean()),
        present_class_iou=float(ious[present].mean()),
        accuracies=accuracies,
        ious=ious,
        share=true / total,
        present=present,
    )
