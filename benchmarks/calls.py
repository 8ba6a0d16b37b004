"""How many network calls trained models need: restoration, Frechet distance and label agreement by sampler and number of calls.

    python scripts/image_train.py --preset masked-digits --log_dir runs/masked
    python scripts/compare.py --run runs/compare --rows none,label-m,masked --seeds 0,1,2
    python benchmarks/calls.py --masked runs/masked --compare runs/compare --out runs/calls

Draws with each sampler at 5, 10, 20 and 50 calls (two of them at 250), from the models of every seed, and writes OUT/calls.csv and
OUT/calls.png. What is drawn already is not drawn again. The classifier of compare.py reads the images.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import numpy as np
import torch

from evaluations.tables.figures import new_figure, save_figure
from guided_mt.commands import restore, sample
from guided_mt.commands.restore import region_errors
from guided_mt.data import load_images, open_source
from guided_mt.generation.feature_classifier import FeatureClassifier
from guided_mt.generation.noisy_classifier import load_classifier
from guided_mt.runs.checkpoint import checkpoints
from reproduce.compare import distance, to_arrays

CALLS = (5, 10, 20, 50, 250)
SAMPLERS = ("ddpm", "ddim", "dpm++", "sde-dpm++", "unipc")
HELD_OUT = "builtin:digits-test"
FIGURES = {
    "restoration": "masked digits, form X: mse in the mask",
    "none": "no modality: Frechet distance",
    "label-m": "label drawn with the image: Frechet distance",
    "agreement": "drawn label is the drawn image's",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", type=Path, required=True, help="run of the preset masked-digits")
    parser.add_argument("--compare", type=Path, required=True, help="run of scripts/compare.py")
    parser.add_argument("--out", type=Path, default=Path("runs/calls"))
    parser.add_argument("--num_samples", type=int, default=360)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    classifier = FeatureClassifier(load_classifier(str(args.compare / "classifier")))
    held_out = load_images(open_source(HELD_OUT, class_names=classifier.classes), classifier.size)
    real = classifier.classify(to_arrays(held_out.images))
    rows: list[dict[str, object]] = []
    for sampler in SAMPLERS:
        for calls in calls_of(sampler):
            how = ["--sampler", sampler, "--steps", str(calls), "--batch_size", "100"]
            name = f"{sampler}_{calls}.npz"
            restored = args.out / f"restored_{name}"
            options = [
                "--model_path",
                str(args.masked),
                "--data_dir",
                HELD_OUT,
                "--mask",
                "patches:10",
                "--num_samples",
                "120",
            ]
            with drawn(restore.main, [*options, *how], restored) as file:
                add(rows, "restoration", sampler, calls, 0, region_errors(dict(file))["masked_mse"])
            for row in ("none", "label-m"):
                for run in sorted((args.compare / row).glob("seed_*")):
                    seed = int(run.name.removeprefix("seed_"))
                    first = seed * 10**6
                    options = ["--model_path", str(checkpoints(run)[-1]), "--num_samples", str(args.num_samples)]
                    options += ["--seeds", f"{first}-{first + args.num_samples - 1}"]
                    with drawn(sample.main, [*options, *how], args.out / f"{row}_{seed}_{name}") as file:
                        seen = classifier.classify(file["arr_0"])
                        add(rows, row, sampler, calls, seed, distance(seen, real))
                        if row == "label-m":
                            add(rows, "agreement", sampler, calls, seed, float((seen.classes == file["arr_1"]).mean()))
    with open(args.out / "calls.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / "calls.png")
    for figure, title in FIGURES.items():
        print(f"\n| {title} | {' | '.join(map(str, CALLS))} |\n| --- |{' --- |' * len(CALLS)}")
        for sampler in SAMPLERS:
            print(f"| {sampler} | {' | '.join(cell(rows, figure, sampler, calls) for calls in CALLS)} |")


def calls_of(sampler: str) -> tuple[int, ...]:
    """250 for the two that are the references there."""
    return CALLS if sampler in ("ddpm", "dpm++") else CALLS[:-1]


def drawn(command, argv: list[str], out: Path):
    """The .npz that a command writes, written before or now."""
    if not out.exists():
        command([*argv, "--out", str(out), "--device", "cpu"])
    return np.load(out, allow_pickle=False)


def add(rows: list, figure: str, sampler: str, calls: int, seed: int, value: float) -> None:
    rows.append({"figure": figure, "sampler": sampler, "calls": calls, "seed": seed, "value": value})


def values(rows: list, figure: str, sampler: str, calls: int) -> list[float]:
    key = (figure, sampler, calls)
    return [row["value"] for row in rows if (row["figure"], row["sampler"], row["calls"]) == key]


def cell(rows: list, figure: str, sampler: str, calls: int) -> str:
    found = values(rows, figure, sampler, calls)
    if not found:
        return ""
    spread = f" +- {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""
    return f"{np.mean(found):.3f}{spread}"


def plot(rows: list, path: Path) -> None:
    figure, _ = new_figure(11, 8)
    figure.clear()
    axes = figure.subplots(2, 2)
    for axis, (key, title) in zip(np.ravel(axes), FIGURES.items(), strict=True):
        for sampler in SAMPLERS:
            axis.plot(
                calls_of(sampler),
                [np.mean(values(rows, key, sampler, calls)) for calls in calls_of(sampler)],
                marker="o",
                label=sampler,
            )
        axis.set(xscale="log", title=title, xlabel="network calls")
        if re.search("Frechet|mse", title):
            axis.set_yscale("log")
    np.ravel(axes)[0].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main()
