"""Improved precision and recall (Kynkaanniemi et al. 2019), exact at the speed of float32.

All distances come from float32 matrix products, whose error is bounded; the few comparisons that lie within the bound are decided
by float64 differences of the two points. Where they are not few (samples that are all alike), float64 products come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import EvaluationError
from .metrics import finite_array

BLOCK = 2048  # rows and columns of the distances that exist at a time
MOST_OPEN = 1 << 15  # pairs of a block that float32 may leave open before float64 takes it
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
    """A set of points [N, D]: as given, and around `centre`, as one side of a product that is the squared distance:
    (-2 x, |x|^2, 1) . (y, 1, |y|^2) = |x - y|^2."""

    def __init__(self, x: Tensor, centre: Tensor, device: torch.device, block: int) -> None:
        self.x, self.centre, self.device, self.block = x, centre, device, block
        self.norms = torch.empty(len(x), dtype=torch.float64, device=device)
        self._right = torch.empty((len(x), x.shape[1] + 2), device=device)
        for rows in self.slices():
            right = self._make_right(rows)
            self._right[rows], self.norms[rows] = right, right[:, -1]

    def __len__(self) -> int:
        return len(self.x)

    def slices(self) -> Iterator[slice]:
        """The blocks of rows that are worked on at a time."""
        for first in range(0, len(self), self.block):
            yield slice(first, min(first + self.block, len(self)))

    def error(self, dtype: torch.dtype) -> float:
        """How far a product in `dtype` may be off, in units of |x|^2 + |y|^2.

        A dot product of D + 2 terms, by so many roundings of the sum of their sizes (Higham 2002, eq. 3.5), which is at most
        twice that unit; the terms themselves, by fewer than 14.
        """
        return (self.x.shape[1] + 16) * torch.finfo(dtype).eps

    def _make_right(self, rows: slice) -> Tensor:
        x = (self.x[rows].double() - self.centre).to(self.device)
        return torch.cat([x, torch.ones_like(x[:, :1]), torch.linalg.vecdot(x, x)[:, None]], dim=1)

    def right(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The right factor of the squared distances, for these rows."""
        return self._right[rows] if dtype == torch.float32 else self._make_right(rows)

    def left(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The left factor of the squared distances, for these rows."""
        right = self.right(rows, dtype)
        return torch.cat([right[:, :-2] * -2, right[:, -1:], right[:, -2:-1]], dim=1)

    def exact(self, i: Tensor, other: Points, j: Tensor) -> Tensor:
        """Squared distances [P] in float64 of own points `i` to `other`'s points `j`, from their differences: 0 for copies."""
        parts = [torch.empty(0, dtype=torch.float64, device=self.device)]
        size = CACHED_PAIRS if self.device.type == "cpu" else PAIRS
        for a, b in zip(i.cpu().split(size), j.cpu().split(size), strict=True):
            x, y = (points.x.index_select(0, rows).to(self.device) for points, rows in ((self, a), (other, b)))
            parts.append((x.double() - y).square_().sum(1))
        return torch.cat(parts)

    def radii(self, k: int) -> Tensor:
        """[N] float64: squared distance of each point to its k-th nearest other one."""
        count = min(k + SPARE, len(self) - 1)
        everyone = torch.arange(len(self), device=self.device)
        radii, complete = self._kth(everyone, *self._candidates(count), k, torch.float32)
        left = everyone[~complete]
        if len(left):  # too many at nearly the same distance for float32
            radii[left], _ = self._kth(left, *self._candidates_of(left, count), k, torch.float64)
        return radii

    def _kth(self, rows: Tensor, near: Tensor, indices: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of points `rows` with their nearest candidates [n, count] by products in `dtype`: the k-th squared distance, and whether
        it is certain to be that of all points."""
        near = near.double()
        margin = 2 * self.error(dtype) * (self.norms[rows, None] + self.norms.max())
        kth = near[:, k - 1 : k]
        open_ = (near - kth).abs() <= margin  # the true k-th is among these, behind all that are nearer by more
        distances = torch.full_like(near, torch.inf).masked_fill_(near < kth, -1)
        at = open_.nonzero(as_tuple=True)
        distances[at] = self.exact(rows[at[0]], self, indices[at])
        found = distances.kthvalue(k, dim=1).values
        complete = (near[:, -1:] - kth > margin).squeeze(1) | (found == 0)  # nothing is nearer than a copy
        return found, complete | (near.shape[1] == len(self) - 1)

    def _candidates(self, count: int) -> tuple[Tensor, Tensor]:
        """The `count` nearest others of every point by float32 products, ascending, and their indices. Each pair of blocks is
        visited once, for both."""
        nearest, product = _Nearest(len(self), count, torch.float32, self.device), _Product()
        for rows in self.slices():
            left = self.left(rows, torch.float32)
            for columns in self.slices():
                if columns.start < rows.start:
                    continue
                distances = product(left, self.right(columns, torch.float32))
                if rows == columns:
                    distances.fill_diagonal_(torch.inf)
                else:
                    nearest.keep(columns, rows.start, distances.T)
                nearest.keep(rows, columns.start, distances)
        return nearest.values, nearest.indices

    def _candidates_of(self, these: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The same for points `these` alone, by float64 products."""
        own = Points(self.x[these.cpu()], self.centre, self.device, self.block)
        nearest, product = _Nearest(len(own), count, torch.float64, self.device), _Product()
        for rows in own.slices():
            left = own.left(rows, torch.float64)
            for columns in self.slices():
                distances = product(left, self.right(columns, torch.float64))
                itself = these[rows, None] == torch.arange(columns.start, columns.stop, device=self.device)
                nearest.keep(rows, columns.start, distances.masked_fill_(itself, torch.inf))
        return nearest.values, nearest.indices


class _Nearest:
    """The nearest columns of each row, over blocks of columns."""

    def __init__(self, rows: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.full((rows, count), torch.inf, dtype=dtype, device=device)
        self.indices = torch.zeros((rows, count), dtype=torch.long, device=device)

    def keep(self, rows: slice, first: int, distances: Tensor) -> None:
        count = self.values.shape[1]
        values, columns = distances.topk(min(count, distances.shape[1]), dim=1, largest=False)
        values = torch.cat([self.values[rows], values], dim=1)
        indices = torch.cat([self.indices[rows], columns + first], dim=1)
        self.values[rows], best = values.topk(count, dim=1, largest=False)
        self.indices[rows] = indices.gather(1, best)


class _Product:
    """x y', always into the same memory: the last result is gone with the next."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        size = len(x) * len(y)
        if self.memory.numel() < size or self.memory.dtype != x.dtype:
            self.memory = torch.empty(size, dtype=x.dtype, device=x.device)
        out = self.memory[:size].view(len(x), len(y))
        if x.device.type == "cpu":  # numpy's OpenBLAS is a third faster on AMD than torch's MKL, and as fast on Intel
            np.matmul(x.numpy(), y.numpy().T, out=out.numpy())
            return out
        return torch.mm(x, y.T, out=out)


def coverage(a: Points, a_radii: Tensor, b: Points, b_radii: Tensor) -> tuple[Tensor, Tensor]:
    """Which points of `b` lie within the radius of some point of `a`, and the other way round: bool [M], [N]."""
    in_a, in_b = (torch.zeros(len(points), dtype=torch.bool, device=a.device) for points in (b, a))
    products = {torch.float32: _Product(), torch.float64: _Product()}
    for rows in b.slices():
        left = b.left(rows, torch.float32)
        for columns in a.slices():
            # Where float32 leaves too much open, float64 sees the same block.
            for dtype, product in products.items():
                x = left if dtype == torch.float32 else b.left(rows, dtype)
                distances = product(x, a.right(columns, dtype))
                last = dtype == torch.float64
                i, j = _within(distances, a_radii[columns], a, b, rows, columns)
                done = _cover(in_a, b, i + rows.start, a, j + columns.start, a_radii, distances[i, j], last)
                j, i = _within(distances.T, b_radii[rows], b, a, columns, rows)
                done &= _cover(in_b, a, j + columns.start, b, i + rows.start, b_radii, distances[i, j], last)
                if done:
                    break
    return in_a, in_b


def _within(
    distances: Tensor, radii: Tensor, members: Points, points: Points, rows: slice, columns: slice
) -> tuple[Tensor, ...]:
    """Where `distances` [points, members] may be within the radius of the member, for all that rounding can do."""
    margin = points.error(distances.dtype) * (points.norms[rows].max() + members.norms[columns].max())
    limit = (radii + margin).to(distances.dtype)
    return (distances <= torch.nextafter(limit, torch.full_like(limit, torch.inf))).nonzero(as_tuple=True)


def _cover(
    covered: Tensor, points: Points, i: Tensor, members: Points, j: Tensor, radii: Tensor, near: Tensor, last: bool
) -> bool:
    """Set `covered` [N] at those of points `i` [P] that are within the radius of member `j` [P]; `near`: their products.

    False, with some not set, where that would take too many exact distances and the products are not the `last` ones.
    """
    error = points.error(near.dtype) * (points.norms[i] + members.norms[j])
    surely = near.double() + error <= radii[j]
    covered[i[surely]] = True
    open_ = ~surely & ~covered[i]
    i, j = i[open_], j[open_]
    if len(i) > MOST_OPEN and not last:
        return False
    covered[i[points.exact(i, members, j) <= radii[j]]] = True
    return True
