"""Improved precision and recall (Kynkaanniemi et al. 2019), exact at the speed of float32.

All pairs of distances come from float32 matrix products, whose error is bounded; the few comparisons that lie within the bound
are decided by float64 differences of the two points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .errors import EvaluationError
from .metrics import finite_array

BLOCK = 2048  # rows and columns of the distances that exist at a time
PAIRS = 1 << 14  # whose differences exist at a time
CACHED_PAIRS = 128  # on a CPU, whose cache holds so many
SPARE = 5  # candidates beyond the k-th neighbour


class PrecisionRecall(NamedTuple):
    """Shares of the samples that look real, and of the real images that the samples reach."""

    precision: float
    recall: float


def precision_recall(
    reference_features: ArrayLike,
    sample_features: ArrayLike,
    k: int = 3,
    *,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> PrecisionRecall:
    """A point is covered by a set if it lies within the distance from some member of the set to that member's k-th nearest
    other member. Precision: the share of samples that the reference covers; recall: of reference images that the samples cover.

    reference_features [N, D], sample_features [M, D]; distances exist one block at a time, on `device`.
    Raises EvaluationError for fewer than k + 1 rows, different D, or values not finite.
    """
    reference, samples = (torch.as_tensor(finite_array(x, "features")) for x in (reference_features, sample_features))
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
    centre = (reference.mean(0, dtype=torch.float64) + samples.mean(0, dtype=torch.float64)) / 2
    real, fake = (Points(x, centre, torch.device(device), block) for x in (reference, samples))
    covered_fake, covered_real = coverage(real, real.radii(k), fake, fake.radii(k))
    return PrecisionRecall(float(covered_fake.double().mean()), float(covered_real.double().mean()))


class Points:
    """A set of points [N, D]: as given, and around `centre` in float32 as the two sides of a product that is the squared distance:
    (-2 x, |x|^2, 1) . (y, 1, |y|^2) = |x - y|^2."""

    def __init__(self, x: Tensor, centre: Tensor, device: torch.device, block: int) -> None:
        self.x, self.centre, self.device, self.block = x, centre, device, block
        width = x.shape[1]
        self.right = torch.empty((len(x), width + 2), device=device)
        self.norms = torch.empty(len(x), dtype=torch.float64, device=device)
        for rows in self.slices():
            centred = (x[rows].double() - centre).to(device)
            self.right[rows, :width] = centred
            self.norms[rows] = torch.linalg.vecdot(centred, centred)
        self.right[:, -2], self.right[:, -1] = 1, self.norms
        # How far float32 is off, in units of |x|^2 + |y|^2: a dot product of D + 2 terms by so many roundings of the sum of
        # their sizes (Higham 2002, eq. 3.5), which is at most twice that unit; the terms themselves by fewer than 14.
        self.error = 2 * (width + 16) * torch.finfo(torch.float32).eps / 2

    def __len__(self) -> int:
        return len(self.x)

    def left(self, rows: slice) -> Tensor:
        right = self.right[rows]
        return torch.cat([right[:, :-2] * -2, right[:, -1:], right[:, -2:-1]], dim=1)

    def slices(self, start: int = 0) -> Iterator[slice]:
        for first in range(start, len(self), self.block):
            yield slice(first, min(first + self.block, len(self)))

    def exact(self, i: Tensor, other: Points, j: Tensor) -> Tensor:
        """Squared distances [P] in float64 of own points `i` to `other`'s points `j`, from their differences: 0 for copies."""
        parts = [torch.empty(0, dtype=torch.float64, device=self.device)]
        size = CACHED_PAIRS if self.device.type == "cpu" else PAIRS
        for a, b in zip(i.cpu().split(size), j.cpu().split(size), strict=True):
            x, y = (points.x.index_select(0, rows).to(self.device) for points, rows in ((self, a), (other, b)))
            parts.append((x.double() - y).square_().sum(1))
        return torch.cat(parts)

    def subset(self, rows: Tensor) -> Points:
        return Points(self.x[rows.cpu()], self.centre, self.device, self.block)

    def radii(self, k: int) -> Tensor:
        """[N] float64: squared distance of each point to its k-th nearest other one."""
        radii = torch.empty(len(self), dtype=torch.float64, device=self.device)
        count = min(k + SPARE, len(self) - 1)
        near, indices = self._candidates(count)
        left = torch.arange(len(self), device=self.device)
        while True:
            found, complete = self._kth(left, near, indices, k)
            radii[left[complete]] = found[complete]
            left = left[~complete]
            if not len(left):
                return radii
            count = min(4 * count, len(self) - 1)  # many points at nearly the same distance
            near, indices = self._candidates_of(left, count)

    def _kth(self, rows: Tensor, near: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of points `rows` with their nearest candidates [n, count], in float32: the k-th squared distance, and whether it is
        that of all points."""
        near = near.double()
        margin = 2 * self.error * (self.norms[rows, None] + self.norms.max())
        kth = near[:, k - 1 : k]
        open_ = (near - kth).abs() <= margin  # the true k-th is among these, behind all that are nearer by more
        distances = torch.full_like(near, torch.inf).masked_fill_(near < kth, -1)
        at = open_.nonzero(as_tuple=True)
        distances[at] = self.exact(rows[at[0]], self, indices[at])
        found = distances.kthvalue(k, dim=1).values
        complete = (near[:, -1:] - kth > margin).squeeze(1) | (found == 0)  # nothing is nearer than a copy
        return found, complete | (near.shape[1] == len(self) - 1)

    def _candidates(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` nearest others of every point by float32 distances, ascending, and their indices. Each pair of blocks is
        visited once, for both."""
        nearest, product = _Nearest(len(self), count, self.device), _Product()
        for rows in self.slices():
            left = self.left(rows)
            for columns in self.slices(rows.start):
                distances = product(left, self.right[columns])
                if rows == columns:
                    distances.fill_diagonal_(torch.inf)
                else:
                    nearest.keep(columns, rows.start, distances.T)
                nearest.keep(rows, columns.start, distances)
        return nearest.values, nearest.indices

    def _candidates_of(self, these: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The same for points `these` alone."""
        own = self.subset(these)
        nearest, product = _Nearest(len(own), count, self.device), _Product()
        for rows in own.slices():
            left = own.left(rows)
            for columns in self.slices():
                distances = product(left, self.right[columns])
                itself = these[rows, None] == torch.arange(columns.start, columns.stop, device=self.device)
                nearest.keep(rows, columns.start, distances.masked_fill_(itself, torch.inf))
        return nearest.values, nearest.indices


class _Nearest:
    """The nearest columns of each row, over blocks of columns."""

    def __init__(self, rows: int, count: int, device: torch.device) -> None:
        self.values = torch.full((rows, count), torch.inf, device=device)
        self.indices = torch.zeros((rows, count), dtype=torch.long, device=device)

    def keep(self, rows: slice, first: int, distances: Tensor) -> None:
        count = self.values.shape[1]
        values, columns = distances.topk(min(count, distances.shape[1]), dim=1, largest=False)
        values = torch.cat([self.values[rows], values], dim=1)
        indices = torch.cat([self.indices[rows], columns + first], dim=1)
        self.values[rows], best = values.topk(count, dim=1, largest=False)
        self.indices[rows] = indices.gather(1, best)


class _Product:
    """x y' in float32, always into the same memory: the last result is gone with the next."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        size = len(x) * len(y)
        if self.memory.numel() < size:
            self.memory = torch.empty(size, device=x.device)
        out = self.memory[:size].view(len(x), len(y))
        if x.device.type == "cpu":  # numpy's OpenBLAS is a third faster on AMD than torch's MKL, and as fast on Intel
            np.matmul(x.numpy(), y.numpy().T, out=out.numpy())
            return out
        return torch.mm(x, y.T, out=out)


def coverage(a: Points, a_radii: Tensor, b: Points, b_radii: Tensor) -> tuple[Tensor, Tensor]:
    """Which points of `b` lie within the radius of some point of `a`, and the other way round: bool [M], [N]."""
    in_a, in_b = (torch.zeros(len(points), dtype=torch.bool, device=a.device) for points in (b, a))
    product = _Product()
    for rows in b.slices():
        left = b.left(rows)
        for columns in a.slices():
            distances = product(left, a.right[columns])
            margin = a.error * (b.norms[rows].max() + a.norms[columns].max())
            i, j = (distances <= _above(a_radii[columns] + margin)).nonzero(as_tuple=True)
            _cover(in_a, b, i + rows.start, a, j + columns.start, a_radii, distances[i, j])
            i, j = (distances <= _above(b_radii[rows] + margin)[:, None]).nonzero(as_tuple=True)
            _cover(in_b, a, j + columns.start, b, i + rows.start, b_radii, distances[i, j])
    return in_a, in_b


def _above(x: Tensor) -> Tensor:
    """The float32 numbers next above."""
    x = x.float()
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def _cover(covered: Tensor, points: Points, i: Tensor, members: Points, j: Tensor, radii: Tensor, near: Tensor) -> None:
    """Set `covered` [N] at those of points `i` [P] that are within the radius of member `j` [P]; `near`: float32 distances."""
    error = points.error * (points.norms[i] + members.norms[j])
    surely = near.double() + error <= radii[j]
    covered[i[surely]] = True
    open_ = ~surely & ~covered[i]
    i, j = i[open_], j[open_]
    covered[i[points.exact(i, members, j) <= radii[j]]] = True
