"""Reference batches: an .npz of statistics and images in ADM's layout, written as a stream."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from ..files.files import replacing
from ..files.images import ImageSet
from .features import Features

WEIGHTS = "network_sha256"


def write_reference(
    out: Path, images: ImageSet, features: Features, network_sha256: str, kept: int, batch_size: int, workers: int
) -> int:
    """Write mu, sigma, mu_s, sigma_s of all `images` and arr_0 of `kept` of them, evenly spaced. Returns how many those are.

    The images are never in memory together, and the file gets its name when it is complete.
    """
    kept = min(kept, images.count)
    chosen = np.zeros(images.count, dtype=bool)
    chosen[np.arange(kept) * images.count // max(kept, 1)] = True
    (mu, sigma), (mu_s, sigma_s) = features.pool_statistics, features.spatial_statistics
    small = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, WEIGHTS: np.array(network_sha256)}
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        if kept:
            shape = (kept, images.height, images.width, 3)
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                start = 0
                for batch in images.batches(batch_size, workers):
                    file.write(batch[chosen[start : start + len(batch)]].tobytes())
                    start += len(batch)
    return kept


def stored_weights(path: Path) -> str | None:
    """`Backend.network_sha256` of the statistics in a file of `write_reference`; None for others."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file[WEIGHTS]) if WEIGHTS in file else None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
