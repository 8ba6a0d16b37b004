"""The formulas, in float64: Frechet distance, Inception Score, and precision and recall."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .errors import EvaluationError

BLOCK = 2048  # rows of one block: 32 MiB per block of float64 distances


class PrecisionRecall(NamedTuple):
    """Shares of the samples that look real, and of the real images that the samples reach."""

    precision: float
    recall: float


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017), |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    mu [D], sigma [D, D]. With S1 = A A' and S2 = B B', tr (S1 S2)^(1/2) is the sum of the singular values of A'B: no matrix
    root, nothing complex, and singular covariances need no jitter. Raises EvaluationError for other shapes, or values not finite.
    """
    mu1, sigma1, mu2, sigma2 = (_finite(x, "statistics") for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        shapes = ", ".join(str(list(x.shape)) for x in (mu1, sigma1, mu2, sigma2))
        raise EvaluationError(f"the Frechet distance takes mu [D] and sigma [D, D] of one D, found {shapes}")
    cross = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding may leave -1e-12 between equal Gaussians


def _factor(sigma: Tensor) -> Tensor:
    """A [D, R] with A A' = sigma, of the rank that float64 can tell from zero."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(features: ArrayLike, softmax_weight: ArrayLike, split_size: int = 5000) -> float:
    """exp of the mean KL(p(y|x) || p(y)), averaged over consecutive splits (Salimans et al. 2016), as ADM computes it.

    features [N, D] of the pool layer, softmax_weight [D, classes]. p = softmax(features @ softmax_weight), without the layer's
    bias; a last shorter split counts like the others. Raises EvaluationError for shapes that don't fit, or values not finite.
    """
    x, weight = _finite(features, "features"), _finite(softmax_weight, "softmax weights")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0] or not len(x) or split_size < 1:
        raise EvaluationError(
            f"the Inception Score takes features [N, D] and weights [D, classes], "
            f"found {list(x.shape)} and {list(weight.shape)}"
        )
    scores = []
    for split in x.split(split_size):
        log_p = torch.log_softmax(split @ weight, dim=1)  # [n, classes]
        log_marginal = torch.logsumexp(log_p, dim=0) - np.log(len(split))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    reference_features: ArrayLike,
    sample_features: ArrayLike,
    k: int = 3,
    *,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): a point is covered by a set if it lies within the distance from
    some member of the set to that member's k-th nearest other member.

    reference_features [N, D], sample_features [M, D]; D, N and M of any size: distances exist one block at a time, on `device`.
    Raises EvaluationError for fewer than k + 1 rows, different D, or values not finite.
    """
    reference, samples = (torch.as_tensor(_array(x, "features")) for x in (reference_features, sample_features))
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise EvaluationError(
            f"precision and recall take features [N, D] and [M, D], found {list(reference.shape)} and {list(samples.shape)}"
        )
    least = min(len(reference), len(samples))
    if not 1 <= k < least:
        raise EvaluationError(
            f"precision and recall with k = {k} need at least {k + 1} images on both sides, found {least}"
        )
    # Distances don't change, and the squares that cancel in them get small.
    centre = (reference.double().mean(0) + samples.double().mean(0)) / 2
    reference_blocks, sample_blocks = (_Blocks(x, centre, block, device) for x in (reference, samples))
    reference_radii, sample_radii = _radii(reference_blocks, k), _radii(sample_blocks, k)
    real = torch.zeros(len(samples), dtype=torch.bool, device=device)
    reached = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, x in sample_blocks:
        for columns, y in reference_blocks:
            distances = _squared_distances(x, y)
            real[rows] |= (distances <= reference_radii[columns]).any(dim=1)
            reached[columns] |= (distances <= sample_radii[rows, None]).any(dim=0)
    return PrecisionRecall(float(real.double().mean()), float(reached.double().mean()))


class _Blocks:
    """Rows of a matrix, a block at a time: centred, float64, on the device."""

    def __init__(self, x: Tensor, centre: Tensor, size: int, device: torch.device | str) -> None:
        self.x, self.centre, self.size, self.device = x, centre, size, device

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self.after(0)

    def after(self, start: int) -> Iterator[tuple[slice, Tensor]]:
        for first in range(start, len(self.x), self.size):
            rows = slice(first, min(first + self.size, len(self.x)))
            yield rows, (self.x[rows].double() - self.centre).to(self.device)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, D], [M, D] -> [N, M]. Points closer than float32 features can tell apart have distance 0, so that copies of one image
    are copies whatever the rounding."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    distances = torch.addmm(squares, x, y.T, alpha=-2)
    return distances.masked_fill_(distances < 1e-13 * squares, 0)


def _radii(blocks: _Blocks, k: int) -> Tensor:
    """[N]: squared distance of each row to its k-th nearest other row. Each pair of blocks is visited once, for both."""
    nearest = torch.full((len(blocks), k), torch.inf, dtype=torch.float64, device=blocks.device)

    def keep(rows: slice, distances: Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], distances], dim=1).topk(k, dim=1, largest=False).values

    for rows, x in blocks:
        for columns, y in blocks.after(rows.start):
            distances = _squared_distances(x, y)
            if rows == columns:
                distances.fill_diagonal_(torch.inf)
            else:
                keep(columns, distances.T)
            keep(rows, distances)
    return nearest.amax(dim=1)


def _array(x: ArrayLike, what: str) -> np.ndarray:
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise EvaluationError(f"{what} are not finite floats: are weights and images what they should be?")
    return array


def _finite(x: ArrayLike, what: str) -> Tensor:
    return torch.as_tensor(_array(x, what)).double()
