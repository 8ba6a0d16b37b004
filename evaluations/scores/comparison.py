"""Samples against a reference: which scores there are, and what each of them needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import EvaluationError, nearest, warn
from ..features.backends import Backend, load_backend
from ..features.dinov2 import DinoV2
from ..features.feature_cache import cached
from ..features.features import POOL, SPATIAL, Features
from ..features.moments import Statistics
from ..files.images import ImageSet
from . import kid
from .manifolds import precision_recall
from .metrics import frechet_distance, inception_score

Protocol = dict[str, str | int]  # what numbers depend on, by name


@dataclass(frozen=True)
class Score:
    key: str
    label: str
    value: float


class Side:
    """One set of images, whose features are made when a score first asks for them."""

    def __init__(self, images: ImageSet, make: Callable[[], Features]) -> None:
        self.images, self.make = images, make

    @cached_property
    def features(self) -> Features:
        return self.make()

    def statistics(self, suffix: str) -> Statistics:
        """The file's own mu and sigma (`suffix` "_s": spatial) where it has them, as in ADM, or those of its images."""
        stored = self.images.statistics
        if has(self.images, f"mu{suffix}", f"sigma{suffix}"):
            return Statistics(stored[f"mu{suffix}"], stored[f"sigma{suffix}"])
        return self.features.spatial_statistics if suffix else self.features.pool_statistics


class Comparison:
    """`args` are the flags of `evaluate`. Networks are loaded when they are first asked for."""

    def __init__(self, reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> None:
        self.args = args
        self.reference = Side(reference, self._reference_features)
        self.samples = Side(samples, lambda: self.backend.features(samples, "samples"))

    @cached_property
    def backend(self) -> Backend:
        return load_backend(self.args)

    @cached_property
    def dinov2(self) -> DinoV2:
        return DinoV2(self.args.device)

    def _reference_features(self) -> Features:
        images, backend = self.reference.images, self.backend

        def make() -> Features:
            return backend.features(images, "reference")

        if self.args.no_cache:
            return make()
        return cached(images, f"{backend.name} {backend.software} {backend.sha256}", make, Features.load)

    def inception_score(self) -> list[Score]:
        pool = self.samples.features.pool
        value = inception_score(pool, self.backend.softmax_weight, self.args.split_size)
        return [Score("inception_score", "Inception Score", value)]

    def fid(self) -> list[Score]:
        value = frechet_distance(*self.reference.statistics(""), *self.samples.statistics(""))
        return [Score("fid", "FID", value)]

    def sfid(self) -> list[Score]:
        value = frechet_distance(*self.reference.statistics("_s"), *self.samples.statistics("_s"))
        return [Score("sfid", "sFID", value)]

    def precision_recall(self) -> list[Score]:
        pools = self.reference.features.pool, self.samples.features.pool
        found = precision_recall(*pools, self.args.k, device=self.args.device)
        return [Score("precision", "Precision", found.precision), Score("recall", "Recall", found.recall)]

    def kid(self) -> list[Score]:
        mean, deviation = kid.kernel_distance(self.reference.features.pool, self.samples.features.pool)
        return [Score("kid", "KID", mean), Score("kid_std", "KID standard deviation", deviation)]

    def fd_dinov2(self) -> list[Score]:
        network, args = self.dinov2, self.args

        def statistics(side: Side, what: str) -> Statistics:
            return network.statistics(side.images, args.batch_size, args.workers, what)

        def make() -> Statistics:
            return statistics(self.reference, "reference, DINOv2")

        images, name = self.reference.images, f"{network.software} {network.sha256}"
        reference = make() if args.no_cache else cached(images, name, make, Statistics.load)
        value = frechet_distance(*reference, *statistics(self.samples, "samples, DINOv2"))
        return [Score("fd_dinov2", "FD-DINOv2", value)]

    def network_protocol(self) -> Protocol:
        """Of the Inception network."""
        found: Protocol = {"backend": f"{self.backend.name} ({self.backend.software})"}
        return found | {"weights": self.backend.path.name, "sha256": self.backend.sha256}

    def kid_protocol(self) -> Protocol:
        return {"kid_subset_size": kid.subset_size(self.reference.images.count, self.samples.images.count)}

    def dinov2_protocol(self) -> Protocol:
        network = self.dinov2
        return {"dinov2": f"{network.software}, PIL bicubic to 224", "dinov2_sha256": network.sha256}


# ---------------------------------------------------------------- what the metrics need


def check_statistics(reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> None:
    """Raises EvaluationError for stored statistics that are not Inception's."""
    for images in (reference, samples):
        for name, width in (("mu", POOL), ("mu_s", SPATIAL)):
            if has(images, name) and len(images.statistics[name]) != width:
                found = len(images.statistics[name])
                raise EvaluationError(f"{images.path}: {name} has {found} values, Inception's has {width}")


def check_counts(reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> None:
    """Raises EvaluationError for fewer images than the k-th neighbour of each needs."""
    counts, k = [images.count for images in (reference, samples) if images.count], args.k
    if min(counts) <= k:
        raise EvaluationError(
            f"--k {k}: scores of neighbours need at least {k + 1} images on both sides, found {min(counts)}"
        )


def kid_can_be_had(reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> None:
    """Raises EvaluationError without the package that computes it."""
    kid.load()


@dataclass(frozen=True)
class Metric:
    """A row of `--metrics`.

    statistics: what a reference may hold in the place of images, () where nothing replaces them. check: raises EvaluationError
    where files, flags or installed packages don't suffice. protocol: what this row's numbers depend on beyond the network's
    weights, the images and the device. inception: whether that network is Inception.
    """

    scores: Callable[[Comparison], list[Score]]
    default: bool = True
    uses_reference: bool = True
    statistics: tuple[str, ...] = ()
    check: Callable[[ImageSet, ImageSet, argparse.Namespace], None] = lambda reference, samples, args: None
    protocol: Callable[[Comparison], Protocol] = lambda comparison: {}
    inception: bool = True


METRICS = {
    "is": Metric(
        Comparison.inception_score,
        uses_reference=False,
        protocol=lambda comparison: {"split_size": comparison.args.split_size},
    ),
    "fid": Metric(Comparison.fid, statistics=("mu", "sigma"), check=check_statistics),
    "sfid": Metric(Comparison.sfid, statistics=("mu_s", "sigma_s"), check=check_statistics),
    "pr": Metric(Comparison.precision_recall, check=check_counts, protocol=lambda comparison: {"k": comparison.args.k}),
    "kid": Metric(
        Comparison.kid,
        default=False,
        check=kid_can_be_had,
        protocol=Comparison.kid_protocol,
    ),
    "fd_dinov2": Metric(Comparison.fd_dinov2, default=False, protocol=Comparison.dinov2_protocol, inception=False),
}


def choose_metrics(reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> list[str]:
    """Names from `--metrics`, or ADM's five; with KID where FID's covariance is singular.

    Raises EvaluationError for an unknown name, or one that these files or the installed packages don't suffice for.
    """
    given = args.metrics
    names = [name.strip() for name in given.split(",")] if given else [n for n, m in METRICS.items() if m.default]
    for name in names:
        if name not in METRICS:
            raise EvaluationError(f"--metrics: no '{name}'{nearest(name, METRICS)}; there are {', '.join(METRICS)}")
    lacking = [name for name in names if not suffices(METRICS[name], reference)]
    if lacking and (given or len(lacking) == len(names)):
        raise EvaluationError(f"{reference.path}: holds no images (arr_0), which {', '.join(lacking)} need")
    if lacking:
        warn(f"{reference.path}: holds no images (arr_0), so these are left out: {', '.join(lacking)}")
        names = [name for name in names if name not in lacking]
    for name in names:
        METRICS[name].check(reference, samples, args)
    if any(METRICS[name].statistics for name in names):
        names += beside_few_images(reference, samples, names)
    return [name for name in METRICS if name in names]


def beside_few_images(reference: ImageSet, samples: ImageSet, names: list[str]) -> list[str]:
    """["kid"] with a warning, where FID is of too few images for its covariance and KID is not among `names` and possible."""
    few = [images for images in (reference, samples) if 0 < images.count <= POOL and not has(images, "mu", "sigma")]
    if not few:
        return []
    beside, note = [], ""
    if reference.count and "kid" not in names:
        try:
            kid.load()
            beside, note = ["kid"], "; KID, which needs fewer, is given beside it"
        except EvaluationError as error:
            note = f"; {error}, which needs fewer"
    warn(
        f"{few[0].path}: {few[0].count} images for {POOL} features: the covariance is singular and FID depends "
        f"on the number of images{note}"
    )
    return beside


def has(images: ImageSet, *arrays: str) -> bool:
    return all(name in images.statistics for name in arrays)


def suffices(metric: Metric, reference: ImageSet) -> bool:
    stored = bool(metric.statistics) and has(reference, *metric.statistics)
    return bool(reference.count) or stored or not metric.uses_reference


def describe(comparison: Comparison, names: list[str]) -> Protocol:
    """What the numbers depend on."""
    args, reference, samples = comparison.args, comparison.reference.images, comparison.samples.images
    protocol: Protocol = comparison.network_protocol() if any(METRICS[name].inception for name in names) else {}
    protocol |= {"reference": describe_images(reference), "samples": describe_images(samples)}
    protocol |= {"reference_images": reference.count, "sample_images": samples.count, "device": args.device}
    for name in names:
        protocol |= METRICS[name].protocol(comparison)
    return protocol


def describe_images(images: ImageSet) -> str:
    parts = [f"{images.count} images of {images.height}x{images.width}"] if images.count else []
    parts += ["stored statistics"] if images.statistics else []
    return f"{Path(images.path).name} ({' and '.join(parts)})"
