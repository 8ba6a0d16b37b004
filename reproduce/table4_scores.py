"""The paper's Table 4: what is measured of translated images, the rows that it quotes, and its layout with our rows below.

Maps of photos are scored as segmentation.py does it; days of nights by PSNR, SSIM, mean absolute error, FID and Inception Score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluations import evaluator
from evaluations.features.weights import INCEPTION_TORCH, cache_folder, torch_hub_folder
from evaluations.files.label_maps import open_label_maps
from evaluations.files.npz import open_npz, read_array
from evaluations.files.palettes import palette_of, read_classes
from evaluations.scores.image_scores import whole_image_scores
from evaluations.segmentation import QUOTED, as_json, count, scores
from evaluations.tables.seeds import Column, Measured, mean_and_spread, rows_of, shown_columns

BATCH = 16  # images at once
INCEPTION = ("fid", "inception_score")  # columns that need its weights
QUOTED_IMAGES: dict[str, tuple[float | None, ...]] = {  # FID, Inception Score
    "MT-Diffusion paper, single-task": (40.73, 3.84),
    "MT-Diffusion paper": (37.93, 3.94),
}


@dataclass(frozen=True)
class Half:
    """One half of the table: its columns, and the quoted rows with the data that they are on. keys: the columns they have."""

    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[float | None, ...]]
    keys: tuple[str, ...]
    data: str

    @property
    def quoted(self) -> list[Measured]:
        return [
            Measured(
                f"{name} (quoted, {self.data})",
                None,
                {key: value for key, value in zip(self.keys, row, strict=True) if value is not None},
            )
            for name, row in self.rows.items()
        ]


MAP_KEYS = ("per_pixel_accuracy", "per_class_accuracy", "class_iou")
MAPS = Half(
    tuple(
        Column(key, title)
        for key, title in zip(MAP_KEYS, ("per-pixel accuracy", "per-class accuracy", "class IoU"), strict=True)
    ),
    QUOTED,
    MAP_KEYS,
    "Cityscapes",
)
IMAGES = Half(
    (
        Column("psnr", "PSNR, dB", 2),
        Column("ssim", "SSIM"),
        Column("mae", "mean absolute error, of [-1, 1]"),
        Column("fid", "FID", 2),
        Column("inception_score", "Inception Score", 2),
    ),
    QUOTED_IMAGES,
    INCEPTION,
    "night2day",
)
HALVES = {"maps": MAPS, "images": IMAGES}


# ---------------------------------------------------------------- scores


def score_maps(made: Path, truth: Path, classes: Path) -> dict[str, float]:
    """Painted maps against maps of class indices, folders paired by name. classes: lines `index name R G B`."""
    palette = palette_of(read_classes(classes), str(classes))
    pred, ref = (open_label_maps(path, "arr_0", palette, lambda stem: False) for path in (made, truth))
    tally = count(pred, ref, palette)
    found = as_json(scores(tally.confusion), tally, palette)
    return {key: found[key] for key in (*MAP_KEYS, "per_class_accuracy_of_present", "class_iou_of_present")}


def score_images(made: Path, truth: Path) -> dict[str, float]:
    """PSNR (dB), SSIM and mean absolute error, means over images (see whole_image_scores).

    Both files are .npz with arr_0 uint8 [N, H, W, 3], in the same order.
    """
    sides = []
    for path in (made, truth):
        with open_npz(path) as file:
            sides.append(torch.from_numpy(read_array(file, "arr_0", path)).split(BATCH))
    parts = [whole_image_scores(x, y) for x, y in zip(*sides, strict=True)]
    return {name: float(torch.cat([part[name] for part in parts]).double().mean()) for name in parts[0]}


def score_features(made: Path, truth: Path, weights: str) -> dict[str, float]:
    """FID to the true images and Inception Score, by `evaluate`; its protocol stays beside `made` in NAME_scores.json."""
    file = made.with_name(f"{made.stem}_scores.json")
    given = ["--inception", weights] if weights else []
    evaluator.main([str(truth), str(made), "--metrics", "fid,is", "--json", str(file), *given])
    found = json.loads(file.read_text())["scores"]
    return {key: found[key] for key in INCEPTION}


def has_inception(given: str) -> bool:
    """Whether Inception's weights are given, or in a cache folder."""
    return bool(given) or any((f / INCEPTION_TORCH.name).is_file() for f in (cache_folder(), torch_hub_folder()))


# ---------------------------------------------------------------- table


def summary(results: Sequence[Measured], row: str) -> dict[str, Any]:
    """One row: of each number mean and spread, then every seed's numbers."""
    own = [result for result in results if result.row == row]
    numbers = {}
    for key in own[0].values:
        values = np.array([result.values[key] for result in own])
        spread = {"std": float(values.std(ddof=1))} if len(values) > 1 else {}
        numbers[key] = {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max()), **spread}
    return {"row": row, **numbers, "seeds": [{"seed": r.seed, **r.values} for r in own if r.seed is not None]}


def layout(half: Half, results: Sequence[Measured], not_run: Sequence[str] = ()) -> str:
    """Markdown: the quoted rows with the digits they were printed with, then ours as mean +- sample standard deviation.

    not_run: columns that say so in our rows; other cells without a number are "-".
    """
    columns = shown_columns([*half.quoted, *results], half.columns)
    lines = [["", *(column.title for column in columns)], ["---"] * (1 + len(columns))]
    for quoted in half.quoted:
        lines.append([quoted.row, *(f"{quoted.values[c.key]:.2f}" if c.key in quoted.values else "-" for c in columns)])
    for row in rows_of(results):
        cells = [row]
        for column in columns:
            values = [r.values[column.key] for r in results if r.row == row and column.key in r.values]
            cells.append(mean_and_spread(values, column.digits) or ("not run" if column.key in not_run else "-"))
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
