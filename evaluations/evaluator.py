"""Inception Score, FID, sFID, precision and recall of samples against a reference batch, as ADM's evaluator gives them.

    mt-diffusion evaluate ref.npz samples.npz

Either is an .npz (arr_0 uint8 [N, H, W, 3]), a folder, .zip or .tar of images, or a folder of parquet files. A file that holds
mu, sigma, mu_s and sigma_s lends these to FID and sFID, as in ADM.
"""

from __future__ import annotations

if __package__ in (None, ""):  # run as a file
    from installed import run_as_script

    run_as_script()

import argparse
from collections.abc import Sequence
from pathlib import Path

from evaluations.errors import EvaluationError, run, warn
from evaluations.features.backends import add_backend_flags, check_backend_flags
from evaluations.features.reference import stored_weights
from evaluations.files.files import prepare_output, write_json
from evaluations.files.images import open_images
from evaluations.scores.comparison import METRICS, Comparison, Score, choose_metrics, describe
from evaluations.scores.manifolds import precision_recall
from evaluations.scores.metrics import frechet_distance, inception_score

__all__ = ["frechet_distance", "inception_score", "main", "precision_recall"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref_batch", help="reference images or statistics")
    parser.add_argument("sample_batch", help="images to score")
    parser.add_argument("--metrics", help=f"of {','.join(METRICS)}; default is,fid,sfid,pr")
    parser.add_argument("--json", type=Path, help="write scores and protocol here")
    add_backend_flags(parser)
    parser.add_argument("--split_size", type=int, default=5000, help="images in a split of the Inception Score")
    parser.add_argument("--k", type=int, default=3, help="the neighbour that sets the radius in precision and recall")
    parser.add_argument(
        "--no_cache", action="store_true", help="neither use the reference's features of last time nor keep these"
    )
    args = parser.parse_args(argv)
    check_backend_flags(args)
    for name in ("split_size", "k"):
        if getattr(args, name) < 1:
            raise EvaluationError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.json:
        prepare_output(args.json)
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    # A reference of statistics alone is enough for FID and sFID.
    reference, samples = open_images(args.ref_batch, need_images=False), open_images(args.sample_batch)
    names = choose_metrics(reference, samples, args)
    sizes = [(images.height, images.width) for images in (reference, samples) if images.count]
    if len(set(sizes)) > 1:
        (h, w), (height, width) = sizes
        warn(f"reference images are {h}x{w}, samples {height}x{width}; each goes into the network as it is, as in ADM")
    comparison = Comparison(reference, samples, args)
    protocol = describe(comparison, names)  # loads the networks: what is missing is said before the work
    for images in (reference, samples):
        made_with = stored_weights(images.path) if images.statistics and {"fid", "sfid"} & set(names) else None
        if made_with and made_with != comparison.backend.network_sha256:
            warn(f"{images.path}: its statistics were made with other weights than {comparison.backend.path.name}")
    scores: list[Score] = []
    for name in names:
        for score in METRICS[name].scores(comparison):
            print(f"{score.label}: {score.value:.6g}", flush=True)
            scores.append(score)
        if args.json:  # after each, so that nothing that was computed is lost
            write_json(args.json, {"scores": {score.key: score.value for score in scores}, "protocol": protocol})
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
