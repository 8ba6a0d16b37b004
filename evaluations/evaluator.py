"""ADM's evaluator: Inception Score, FID, sFID, precision and recall of samples against a reference batch.

    python evaluations/evaluator.py ref.npz samples.npz

Either is an .npz (arr_0 uint8 [N, H, W, 3]), a folder, .zip or .tar of images, or a folder of parquet files. A reference that
holds mu, sigma, mu_s and sigma_s lends these to FID and sFID, as in ADM.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluations.backends import Backend, add_backend_flags, check_backend_flags, load_backend
from evaluations.errors import EvaluationError, nearest, run, warn
from evaluations.feature_cache import cached_features
from evaluations.features import POOL, Features
from evaluations.images import ImageSet, open_images
from evaluations.kid import kernel_distance
from evaluations.manifolds import precision_recall
from evaluations.metrics import frechet_distance, inception_score
from evaluations.moments import Statistics
from evaluations.reference import stored_weights

__all__ = ["frechet_distance", "inception_score", "main", "precision_recall"]


@dataclass(frozen=True)
class Score:
    key: str
    label: str
    value: float


@dataclass
class Comparison:
    """Samples against a reference, whose features are made when a score first asks for them."""

    reference: ImageSet
    samples: ImageSet
    args: argparse.Namespace
    used: dict[str, str] = field(default_factory=dict)

    @cached_property
    def backend(self) -> Backend:
        return load_backend(self.args)

    @cached_property
    def reference_features(self) -> Features:
        if self.args.no_cache:
            return self.backend.features(self.reference, "reference")
        return cached_features(self.reference, self.backend, "reference")

    @cached_property
    def sample_features(self) -> Features:
        return self.backend.features(self.samples, "samples")

    def reference_statistics(self, suffix: str) -> Statistics:
        """The file's own mu and sigma (`suffix` "_s": spatial), or those of its images."""
        stored = self.reference.statistics
        if f"mu{suffix}" in stored and f"sigma{suffix}" in stored:
            return Statistics(stored[f"mu{suffix}"], stored[f"sigma{suffix}"])
        features = self.reference_features
        return features.spatial_statistics if suffix else features.pool_statistics

    def inception_score(self) -> list[Score]:
        value = inception_score(self.sample_features.pool, self.backend.softmax_weight, self.args.split_size)
        return [Score("inception_score", "Inception Score", value)]

    def fid(self) -> list[Score]:
        return [
            Score("fid", "FID", frechet_distance(*self.reference_statistics(""), *self.sample_features.pool_statistics))
        ]

    def sfid(self) -> list[Score]:
        samples = self.sample_features.spatial_statistics
        return [Score("sfid", "sFID", frechet_distance(*self.reference_statistics("_s"), *samples))]

    def precision_recall(self) -> list[Score]:
        found = precision_recall(
            self.reference_features.pool, self.sample_features.pool, self.args.k, device=self.args.device
        )
        return [Score("precision", "Precision", found.precision), Score("recall", "Recall", found.recall)]

    def kid(self) -> list[Score]:
        mean, deviation = kernel_distance(self.reference_features.pool, self.sample_features.pool)
        return [Score("kid", "KID", mean), Score("kid_std", "KID standard deviation", deviation)]

    def fd_dinov2(self) -> list[Score]:
        from evaluations.dinov2 import DinoV2

        network = DinoV2(self.args.device)
        options = self.args.batch_size, self.args.workers
        reference = network.statistics(self.reference, *options, "reference, DINOv2")
        samples = network.statistics(self.samples, *options, "samples, DINOv2")
        return [Score("fd_dinov2", "FD-DINOv2", frechet_distance(*reference, *samples))]


@dataclass(frozen=True)
class Metric:
    """A row of `--metrics`. `statistics` are what a reference may hold in the place of images, () where nothing replaces them."""

    scores: Callable[[Comparison], list[Score]]
    default: bool = True
    uses_reference: bool = True
    statistics: tuple[str, ...] = ()


METRICS = {
    "is": Metric(Comparison.inception_score, uses_reference=False),
    "fid": Metric(Comparison.fid, statistics=("mu", "sigma")),
    "sfid": Metric(Comparison.sfid, statistics=("mu_s", "sigma_s")),
    "pr": Metric(Comparison.precision_recall),
    "kid": Metric(Comparison.kid, default=False),
    "fd_dinov2": Metric(Comparison.fd_dinov2, default=False),
}


def choose_metrics(given: str | None, reference: ImageSet, samples: ImageSet, k: int) -> list[str]:
    """Names from `--metrics`, or ADM's five; with KID where FID's covariance is singular.

    Raises EvaluationError for an unknown name, or one that these files don't suffice for.
    """
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
    counts = [images.count for images in (reference, samples) if images.count]
    if "pr" in names and min(counts) <= k:
        raise EvaluationError(
            f"precision and recall with k = {k} need at least {k + 1} images on both sides, found {min(counts)}"
        )
    few = [images for images in (reference, samples) if 0 < images.count <= POOL and not has(images, "mu", "sigma")]
    if few and ("fid" in names or "sfid" in names):
        beside = "; KID, which needs fewer, is given beside it" if reference.count and "kid" not in names else ""
        warn(
            f"{few[0].path}: {few[0].count} images for {POOL} features: the covariance is singular and FID far too "
            f"dependent on the number of images{beside}"
        )
        if beside:
            names.append("kid")
    return [name for name in METRICS if name in names]


def has(images: ImageSet, *arrays: str) -> bool:
    return all(name in images.statistics for name in arrays)


def suffices(metric: Metric, reference: ImageSet) -> bool:
    stored = bool(metric.statistics) and has(reference, *metric.statistics)
    return bool(reference.count) or stored or not metric.uses_reference


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref_batch", help="reference images or statistics")
    parser.add_argument("sample_batch", help="images to score")
    parser.add_argument("--metrics", help=f"of {','.join(METRICS)}; default is,fid,sfid,pr")
    parser.add_argument("--json", type=Path, help="write scores and protocol here")
    add_backend_flags(parser)
    parser.add_argument("--split_size", type=int, default=5000, help="images in a split of the Inception Score")
    parser.add_argument("--k", type=int, default=3, help="the neighbour that sets the radius in precision and recall")
    parser.add_argument("--no_cache", action="store_true", help="do not keep the reference's features for next time")
    args = parser.parse_args(argv)
    check_backend_flags(args)
    for name in ("split_size", "k"):
        if getattr(args, name) < 1:
            raise EvaluationError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    # A reference of statistics alone is enough for FID and sFID.
    reference, samples = open_images(args.ref_batch, need_images=False), open_images(args.sample_batch)
    names = choose_metrics(args.metrics, reference, samples, args.k)
    sizes = [(images.height, images.width) for images in (reference, samples) if images.count]
    if len(set(sizes)) > 1:
        (h, w), (height, width) = sizes
        warn(f"reference images are {h}x{w}, samples {height}x{width}; each goes into the network as it is, as in ADM")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(reference, samples, args)
    scores: list[Score] = []
    for name in names:
        for score in METRICS[name].scores(comparison):
            print(f"{score.label}: {score.value:.6g}", flush=True)
            scores.append(score)
    protocol = describe(comparison, names)
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    if args.json:
        content = {"scores": {score.key: score.value for score in scores}, "protocol": protocol}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def describe(comparison: Comparison, names: Sequence[str]) -> dict[str, str | int]:
    """What the numbers depend on, in a line."""
    args, reference, samples = comparison.args, comparison.reference, comparison.samples
    protocol: dict[str, str | int] = {}
    if set(names) - {"fd_dinov2"}:
        backend = comparison.backend
        protocol |= {
            "backend": f"{backend.name} ({backend.software})",
            "weights": backend.path.name,
            "sha256": backend.sha256,
        }
        made_with = stored_weights(reference.path) if reference.statistics else None
        if made_with and made_with != backend.sha256:
            warn(f"{reference.path}: its statistics were made with other weights (sha256 {made_with[:16]}...)")
    protocol |= {"reference": describe_images(reference), "samples": describe_images(samples)}
    if "is" in names:
        protocol["split_size"] = args.split_size
    if "pr" in names:
        protocol["k"] = args.k
    if "fd_dinov2" in names:
        protocol["FD-DINOv2"] = "dinov2-vit-l-14, PIL bicubic to 224"
    return protocol


def describe_images(images: ImageSet) -> str:
    parts = [f"{images.count} images of {images.height}x{images.width}"] if images.count else []
    parts += ["stored statistics"] if images.statistics else []
    return f"{Path(images.path).name} ({' and '.join(parts)})"


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
