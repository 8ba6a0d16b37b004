"""Kernel Inception Distance (Binkowski et al. 2018) by torch-fidelity."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from ..errors import EvaluationError

SUBSETS, SUBSET_SIZE = 100, 1000


def load() -> ModuleType:
    """torch-fidelity's module. Raises EvaluationError where it is not installed."""
    try:
        from torch_fidelity import metric_kid
    except ImportError as error:
        raise EvaluationError(f"KID needs torch-fidelity ({error}): pip install '.[eval]'") from error
    return metric_kid


def subset_size(reference: int, samples: int) -> int:
    """Images in a subset, of so many."""
    return min(SUBSET_SIZE, reference, samples)


def kernel_distance(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the cubic kernel's MMD^2 over 100 random subsets of 1,000 (of all, where there are fewer).

    Features [N, D] and [M, D]. Raises EvaluationError where torch-fidelity is not installed.
    """
    module, size = load(), subset_size(len(reference), len(samples))
    # Subsets that are the whole of both sets differ in nothing.
    subsets = 1 if size == len(reference) == len(samples) else SUBSETS
    found = module.kid_features_to_metric(
        torch.from_numpy(reference),
        torch.from_numpy(samples),
        kid_subsets=subsets,
        kid_subset_size=size,
        verbose=False,
    )
    return found[module.KEY_METRIC_KID_MEAN], found[module.KEY_METRIC_KID_STD]
