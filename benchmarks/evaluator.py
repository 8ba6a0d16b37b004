"""Speed and memory of the evaluator.

    python benchmarks/evaluator.py [--images 10000] [--large]

* FID, sFID, precision and recall from given features, against the choices of ADM's evaluator: numpy.cov, SciPy's matrix root,
  float16 distances in TensorFlow (which get a process, as they must).
* --large: precision and recall of 50,000 against 50,000 images, with the peak of the process's memory.
* Inception features through `extract`, against calling torch-fidelity's module on arrays that are ready (random weights).

Times are medians where a part is short; compare within one run only.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
POOL, SPATIAL = 2048, 2023


def synthetic_features(count: int, width: int, seed: int) -> np.ndarray:
    """float32 [count, width], non-negative and correlated, with a spectrum that falls as Inception's does."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((width, width)) * np.arange(1, width + 1)[:, None] ** -0.5
    mix = (mix / np.sqrt(width)).astype(np.float32)
    return np.maximum(rng.standard_normal((count, width), dtype=np.float32) @ mix + 0.1 + 0.02 * seed, 0)


def seconds(f: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def ours(pools: list[np.ndarray], maps: list[np.ndarray]) -> dict[str, tuple[float, object]]:
    from evaluations.features.moments import statistics
    from evaluations.scores.manifolds import precision_recall
    from evaluations.scores.metrics import frechet_distance

    return {
        "FID": seconds(lambda: frechet_distance(*statistics(pools[0]), *statistics(pools[1]))),
        "sFID": seconds(lambda: frechet_distance(*statistics(maps[0]), *statistics(maps[1]))),
        "P/R": seconds(lambda: tuple(precision_recall(*pools))),
    }


def adm_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The matrix root of the product of covariances, which need not be symmetric: a complex Schur decomposition."""
    from scipy.linalg import sqrtm

    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    try:
        root, _ = sqrtm(s1 @ s2, disp=False)  # with an estimate of the error, as ADM asks for
    except TypeError:  # SciPy 1.18
        root = sqrtm(s1 @ s2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))


def adm_precision_recall(folder: Path, k: int = 3, rows: int = 10000) -> tuple[float, float]:
    """In TensorFlow's process: float16 distances, float32 where those overflow, and numpy's partition for the radii."""
    import tensorflow as tf

    sets = [np.load(folder / f"pool{i}.npy") for i in (0, 1)]

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        def squared(a, b):
            norms = tf.reduce_sum(a * a, 1)[:, None] + tf.reduce_sum(b * b, 1)[None]
            return tf.maximum(norms - 2 * tf.matmul(a, b, transpose_b=True), 0)

        half = squared(tf.cast(a, tf.float16), tf.cast(b, tf.float16))
        finite = tf.reduce_all(tf.math.is_finite(half))
        return (tf.cast(half, tf.float32) if finite else squared(tf.constant(a), tf.constant(b))).numpy()

    def blocks(x: np.ndarray) -> list[np.ndarray]:
        return [x[i : i + rows] for i in range(0, len(x), rows)]

    def partition(rows: np.ndarray) -> np.ndarray:
        """In as many threads as there are cores."""
        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            parts = pool.map(lambda part: np.partition(part, range(k + 1), axis=1), np.array_split(rows, workers))
            return np.concatenate(list(parts))

    def radii(x: np.ndarray) -> np.ndarray:
        rows = [np.concatenate([distances(a, b) for b in blocks(x)], 1) for a in blocks(x)]
        return np.concatenate([partition(row)[:, k] for row in rows])

    radius = [radii(x) for x in sets]
    between = np.concatenate([np.concatenate([distances(a, b) for b in blocks(sets[1])], 1) for a in blocks(sets[0])])
    precision = (between <= radius[0][:, None]).any(axis=0).mean()
    return float(precision), float((between <= radius[1][None]).any(axis=1).mean())


def compare_statistics(images: int) -> None:
    pools, maps = ([synthetic_features(images, width, i) for i in (0, 1)] for width in (POOL, SPATIAL))
    own = ours(pools, maps)
    theirs = {"FID": seconds(lambda: adm_frechet(*pools)), "sFID": seconds(lambda: adm_frechet(*maps))}
    with tempfile.TemporaryDirectory() as folder:
        for i in (0, 1):
            np.save(Path(folder) / f"pool{i}.npy", pools[i])
        command = [sys.executable, __file__, "--adm_precision_recall", folder]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    theirs["P/R"] = float(output[0]), (float(output[1]), float(output[2]))
    print(f"{images} against {images} images           ours        ADM's choices")
    for name in own:
        print(f"  {name:5s} {own[name][0]:10.1f} s {theirs[name][0]:10.1f} s    {own[name][1]} / {theirs[name][1]}")
    total, reference = (sum(t for t, _ in side.values()) for side in (own, theirs))
    print(f"  all   {total:10.1f} s {reference:10.1f} s    {total / reference:.3f} of the time", flush=True)


def large_precision_recall(images: int = 50000) -> None:
    """In a process of its own, for the peak."""
    from evaluations.scores.manifolds import precision_recall

    pools = [synthetic_features(images, POOL, i) for i in (0, 1)]
    took, found = seconds(lambda: precision_recall(*pools))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"P/R of {images} against {images}: {took:.0f} s, peak of the process {peak:.2f} GiB, {found}", flush=True)


def compare_throughput(images: int = 128, batch_size: int = 16, rounds: int = 3) -> None:
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from inception_graph import write_graph

    from evaluations.features.features import extract
    from evaluations.features.inception import TorchInception
    from evaluations.files.images import open_images

    with tempfile.TemporaryDirectory() as folder:
        network = TorchInception(write_graph(Path(folder) / "graph.pb"))
        path = Path(folder) / "images.npz"
        pixels = np.random.default_rng(0).integers(0, 256, (images, 64, 64, 3), dtype=np.uint8)
        np.savez(path, arr_0=pixels)
        ready = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

        module = copy.deepcopy(network.module).to(memory_format=torch.contiguous_format)  # as torch-fidelity has it

        def direct() -> None:
            with torch.inference_mode():
                for i in range(0, images, batch_size):
                    module(ready[i : i + batch_size])

        times: dict[str, list[float]] = {"direct": [], "extract": []}
        direct()
        for _ in range(rounds):
            times["direct"].append(seconds(direct)[0])
            times["extract"].append(seconds(lambda: extract(open_images(path), network, batch_size, 2, "images"))[0])
    rates = {name: images / stats.median(values) for name, values in times.items()}
    print(
        f"Inception, {images} images, batch {batch_size}: torch-fidelity directly {rates['direct']:.1f} img/s, "
        f"through extract {rates['extract']:.1f} img/s ({rates['extract'] / rates['direct']:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--adm_precision_recall", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--large_precision_recall", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.adm_precision_recall:
        import tensorflow  # noqa: F401  (not part of the time)

        took, found = seconds(lambda: adm_precision_recall(args.adm_precision_recall))
        print(took, *found)
        return
    if args.large_precision_recall:
        large_precision_recall(args.large_precision_recall)
        return
    compare_throughput()
    compare_statistics(args.images)
    if args.large:
        subprocess.run([sys.executable, __file__, "--large_precision_recall", "50000"], check=True)


if __name__ == "__main__":
    main()
