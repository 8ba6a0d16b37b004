"""The files of a translation: images by name, and the truth beside them for the evaluator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from guided_mt.data import ImageSource
from guided_mt.data.images import save_npz
from guided_mt.errors import UserError

from ..data import PairSource


def unique_stems(names: Sequence[str], path: str) -> list[str]:
    """File names without folder and suffix, or after their folders where two would be the same: CLASS_NAME of CLASS/NAME.jpg.

    Raises UserError where two are the same even then.
    """
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        stems = [str(Path(name).with_suffix("")).replace("/", "_") for name in names]
    twice = next((stem for stem, count in Counter(stems).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"{path}: two images are called {twice}, so their results would overwrite each other; rename one"
        )
    return stems


def write_folder(folder: Path, stems: Sequence[str], images: np.ndarray) -> None:
    """Images uint8 [N, H, W, 3] or maps [N, H, W] as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, image in zip(stems, images, strict=True):
        Image.fromarray(image).save(folder / f"{stem}.png")


def write_truth(
    out: Path,
    target: str,
    source: ImageSource,
    indices: Sequence[int],
    stems: Sequence[str],
    images: np.ndarray,
    size: int,
) -> None:
    """The true target side: NAME_truth.npz (arr_0) for the evaluator, and for label maps their indices as PNG and classes.txt."""
    save_npz(out / f"{target}_truth.npz", {"arr_0": images})
    side = next((side for side in getattr(source, "sides", ()) if side.name == target), None)
    if not isinstance(source, PairSource) or side is None or side.palette is None:  # no label map
        return
    write_folder(out / f"{target}_truth", stems, np.stack([source.label_map(i, size) for i in indices]))
    lines = [
        f"{c.index} {c.name.replace(' ', '_')} {' '.join(map(str, c.colour))}"
        for c in (*side.palette.classes, *side.palette.void)
    ]
    (out / "classes.txt").write_text("\n".join(["# index name R G B", *lines, ""]))
    print(
        f"{out / target}_truth/: the true classes; score with evaluations/segmentation.py --classes {out / 'classes.txt'}"
    )
