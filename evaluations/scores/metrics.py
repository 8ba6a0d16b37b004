"""The formulas, in float64: Frechet distance and Inception Score."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import EvaluationError


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017), |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    mu [D], sigma [D, D]. With S1 = A A' and S2 = B B', tr (S1 S2)^(1/2) is the sum of the singular values of A'B: no matrix
    root, nothing complex, and singular covariances need no jitter. Raises EvaluationError for other shapes, or values not finite.
    """
    mu1, sigma1, mu2, sigma2 = (finite_array(x, "statistics").astype(np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        shapes = ", ".join(str(list(x.shape)) for x in (mu1, sigma1, mu2, sigma2))
        raise EvaluationError(f"the Frechet distance takes mu [D] and sigma [D, D] of one D, found {shapes}")
    traces = np.trace(sigma1) + np.trace(sigma2)
    cross = _nuclear_norm(_factor(sigma1).T @ _factor(sigma2), tolerance=1e-8 * traces)
    distance = ((mu1 - mu2) ** 2).sum() + traces - 2 * cross
    return max(0.0, float(distance))  # rounding may leave -1e-12 between equal Gaussians


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A [D, R] with A A' = sigma, of the rank R that float64 can tell from zero. Reads sigma's lower half alone."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * np.finfo(values.dtype).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def _nuclear_norm(c: np.ndarray, tolerance: float) -> float:
    """The sum of the singular values of `c`: roots of the eigenvalues of c c' where that is within `tolerance`, since it is five
    times as fast."""
    squares = np.linalg.eigvalsh(c @ c.T if c.shape[0] <= c.shape[1] else c.T @ c)
    if len(squares) and squares[-1] > 0:
        values = np.sqrt(np.maximum(squares, 0))
        noise = (
            10 * np.finfo(c.dtype).eps * squares[-1]
        )  # of the squares, so noise / 2 s of a root s, or its own root at 0
        if (noise / np.maximum(values, np.sqrt(noise))).sum() <= tolerance:
            return float(values.sum())
    return float(np.linalg.svd(c, compute_uv=False).sum())


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


def finite_array(x: ArrayLike, what: str) -> np.ndarray:
    """`x` as an array. Raises EvaluationError, in which `what` names it, unless it holds finite floats."""
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise EvaluationError(f"{what} are not finite floats: are weights and images what they should be?")
    return array


def _finite(x: ArrayLike, what: str) -> Tensor:
    return torch.as_tensor(finite_array(x, what)).double()
