"""Latent models of any rows of TASKS for the tests: the data that they need, and what their YAML file says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from tiny_latent import SIZE, write_config, write_images, write_labelled_pairs

from guided_mt.modalities.registry import TASKS

SIDES = ["photo", "map", "edges"]
DRIVES = ("0001TP", "0006R0", "Seq05VD")  # the classes of the streets
COUNT, VAL_COUNT = 9, 4  # training items, in either kind of data; validation items of the streets


def write_data(folder: Path) -> Path:
    """`folder` with streets (photos and maps of three drives), images of three classes, their negatives by the same names, a
    vector for each item, and captions of both."""
    write_labelled_pairs(folder / "streets", COUNT, VAL_COUNT, drives=DRIVES)
    for file in write_images(folder / "images", COUNT // 3).rglob("*.png"):
        negative = folder / "negatives" / file.relative_to(folder / "images")
        negative.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(file))).save(negative)
    for place in ("streets", "images"):
        files = sorted((folder / place).rglob("*.*g"))  # of maps too, which no item is called by
        rows = [f"{file.relative_to(folder / place)},a picture of {file.stem}" for file in files]
        (folder / place / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    vectors = np.random.default_rng(0).normal(size=(COUNT, 5)).astype(np.float32)
    np.savez(folder / "vectors.npz", representation=vectors)
    return folder


def entries(rows: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """`mt_tasks` of these rows, each under its own name, with the options that have no default."""
    found: dict[str, dict[str, Any]] = {row: {} for row in rows}
    for row, entry in found.items():
        if "num_classes" in TASKS[row].run_options:
            entry["num_classes"] = len(DRIVES)
        if "representation" in row:
            entry["representation_file"] = str(folder / "vectors.npz")
    return found


def several(folder: Path) -> dict[str, Any]:
    """mt_sides and mt_tasks of a model of the streets with three sides and every row that is no side."""
    return {
        "mt_sides": SIDES,
        "mt_tasks": entries((row for row, task in TASKS.items() if not task.is_side), folder),
        "mt_swap_prob": 0.5,
    }


def write_tasks(file: Path, folder: Path, run: Path, settings: dict[str, Any] | None = None, **params: Any) -> Path:
    """The YAML file of a tiny run on the data of `write_data`: the streets where `params` has mt_sides, else the images, with
    their negatives where a task is a side. settings: over its `run` section."""
    params = {"mt_sides": [], "mt_swap_prob": 0.0, **params}
    rows = [(entry or {}).get("task", name) for name, entry in (params.get("mt_tasks") or {}).items()]
    write_config(file, folder / ("streets" if params["mt_sides"] else "images"), run, **params)
    config = OmegaConf.load(file)
    if params["mt_sides"]:
        computed = dict.fromkeys(params["mt_sides"][2:], "edges")
        config.data.params |= {"sides": params["mt_sides"][:2], "computed": computed, "labels": "prefix"}
    else:
        sides = {row: str(folder / "negatives") for row in rows if row in TASKS and TASKS[row].is_side}
        config.data.params |= {"paired": sides} if sides else {}
    captions = {"captions": "captions.csv"} if any("caption" in str(row) for row in rows) else {}
    config.data.params |= {"image_size": SIZE, **captions}
    config.run |= settings or {}
    file.write_text(OmegaConf.to_yaml(config))
    return file
