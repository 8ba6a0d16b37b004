"""Accuracy and calibration of class probabilities; over several training steps, Figure 6.

    mt-diffusion score classification FILE.npz                       top-1, top-5, expected calibration error
    mt-diffusion score classification 'mt=run1/*.npz' 'single=run2/*.npz' --csv steps.csv --plot steps.png

A file holds `probabilities` [N, K] (also `probs`, `label_probabilities`, `arr_0`) and `labels` [N] (also `label`, `arr_1`),
and may hold its training `step`; without it the step is the last step_NNN in the path, or the number its name ends in, or a
folder whose name is a number. A series is `NAME=FILE`, `NAME=GLOB`, or the folder that holds the files or their step folders.

- Top-k: the label is among the k largest probabilities; of equal ones the lower class comes first.
- Expected calibration error (Guo et al., ICML 2017, eq. 3): 15 equal bins (lo, hi] of the largest probability,
  sum_b |B_b| / N |accuracy(B_b) - confidence(B_b)|.
- Negative log-likelihood: mean of -log p(label) in nats, p not below 1e-12.
"""

from __future__ import annotations

if __package__ in (None, ""):  # run as a file
    from installed import run_as_script

    run_as_script()

import argparse
import csv
import glob
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluations.errors import EvaluationError, run, warn
from evaluations.files.files import prepare_output, write_json
from evaluations.files.npz import open_npz, read_array
from evaluations.scores.classification_scores import (
    BINS,
    LEAST_PROBABILITY,
    ClassificationScores,
    classification_scores,
)
from evaluations.scores.segmentation_scores import confusion_matrix
from evaluations.tables.figures import new_figure, plot_confusion, save_figure

PROBABILITIES = ("probabilities", "probs", "label_probabilities", "arr_0")
LABELS = ("labels", "label", "arr_1")
STEP_FOLDER = re.compile(r"(step[_-]?)?\d+", re.IGNORECASE)


# ---------------------------------------------------------------- files


class Result(NamedTuple):
    """One file: its place in Figure 6 and its scores."""

    series: str
    step: int | None
    path: Path
    arrays: tuple[str, str]
    scores: ClassificationScores


def files_of(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """FILE, GLOB, NAME=FILE or NAME=GLOB -> (series, file). Raises EvaluationError where nothing is there."""
    found: list[tuple[str | None, Path]] = []
    for argument in arguments:
        name, pattern = None, argument
        if "=" in argument and not Path(argument).exists():
            name, pattern = argument.split("=", 1)
        paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not paths or name == "":
            raise EvaluationError(f"{argument}: no such file; expected FILE.npz or NAME=FILE.npz (or a quoted pattern)")
        for path in paths:
            if path.is_dir():
                raise EvaluationError(f"{path} is a folder: give its files, such as '{path}/*.npz'")
        found += [(name, path) for path in paths]
    folders = {_series_folder(path) for name, path in found if name is None}
    names = {folder: folder.name for folder in folders}
    alike = len(set(names.values())) < len(names)  # then only the whole path tells them apart
    return [
        (name or (str(_series_folder(path)) if alike else names[_series_folder(path)]), path) for name, path in found
    ]


def _series_folder(path: Path) -> Path:
    """The first folder above that is not named after a step."""
    folders = path.absolute().parents
    return next((folder for folder in folders if folder.name and not STEP_FOLDER.fullmatch(folder.name)), folders[0])


def step_of(path: Path) -> int | None:
    """The training step that a path tells: its last step_NNN, the number its name ends in, or a folder that is a number."""
    named = re.findall(r"step[_-]?(\d+)", str(path), re.IGNORECASE)
    if named:
        return int(named[-1])
    if trailing := re.search(r"\d+$", path.stem):
        return int(trailing[0])
    return next((int(part) for part in reversed(path.parts[:-1]) if part.isdecimal()), None)


def score_file(series: str, path: Path, bins: int = BINS) -> Result:
    """Raises EvaluationError naming the file."""
    with open_npz(path) as file:
        used = []
        for what, names in (("probabilities", PROBABILITIES), ("labels", LABELS)):
            name = next((name for name in names if name in file.files), None)
            if name is None:
                holds = ", ".join(file.files) or "nothing"
                raise EvaluationError(f"{path}: no {what} ({', '.join(names)}); it holds {holds}")
            used.append(name)
        probabilities, labels = (read_array(file, name, path) for name in used)
        step = read_array(file, "step", path) if "step" in file.files else None
    if step is not None and (step.size != 1 or step.dtype.kind not in "iu"):
        raise EvaluationError(f"{path}: array step is {step.dtype} {list(step.shape)}, expected one integer")
    try:
        found = classification_scores(probabilities, labels, bins)
    except EvaluationError as error:
        raise EvaluationError(f"{path}: {error}") from error
    if found.impossible:
        warn(
            f"{path}: {found.impossible} labels have no probability; they count as {LEAST_PROBABILITY:g} in the likelihood"
        )
    return Result(series, step_of(path) if step is None else int(step.item()), path, (used[0], used[1]), found)


def by_series(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each series by step. Raises EvaluationError where a step is unknown or comes twice."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.step is None:
            raise EvaluationError(f"{result.path}: no training step; save an array `step` or name it ..._STEP.npz")
        groups[result.series].append(result)
    for group in groups.values():
        group.sort(key=attrgetter("step"))
        for before, after in pairwise(group):
            if before.step == after.step:
                raise EvaluationError(f"{before.path} and {after.path} are both step {after.step} of {after.series}")
    return dict(groups)


# ---------------------------------------------------------------- reports


def report_one(result: Result, bins: int) -> str:
    found = result.scores
    return "\n".join(
        [
            f"Top-1 accuracy: {found.top1:.4f}",
            f"Top-5 accuracy: {found.top5:.4f}",
            f"Expected calibration error: {found.ece:.4f}",
            f"Negative log-likelihood: {found.nll:.4f}",
            "",
            f"Protocol: {found.count:,} samples, {found.classes} classes; arrays {' and '.join(result.arrays)};"
            f" {bins} bins{few_classes(found)}",
        ]
    )


def few_classes(found: ClassificationScores) -> str:
    return f"; top-5 is top-{found.classes}, there are no more classes" if found.classes <= 5 else ""


def report_steps(series: dict[str, list[Result]], bins: int) -> str:
    width = max(len(name) for name in [*series, "series"])
    lines = [f"{'series':{width}}        step   top-1   top-5     ECE     NLL    samples"]
    results = [result for group in series.values() for result in group]
    for result in results:
        found = result.scores
        lines.append(
            f"{result.series:{width}}  {result.step:>10}  {found.top1:.4f}  {found.top5:.4f}  {found.ece:.4f}"
            f"  {found.nll:6.3f}  {found.count:>9,}"
        )
    arrays = sorted({" and ".join(result.arrays) for result in results})
    return "\n".join([*lines, "", f"Protocol: arrays {', '.join(arrays)}; {bins} bins{few_classes(results[0].scores)}"])


def as_json(results: Sequence[Result], bins: int) -> dict:
    """All numbers of all files; an empty bin's accuracy and confidence are null."""

    def row(result: Result) -> dict:
        found = result.scores
        low, high = found.bins.edges[:-1].tolist(), found.bins.edges[1:].tolist()
        columns = zip(low, high, found.bins.count.tolist(), found.bins.accuracy, found.bins.confidence, strict=True)
        return {
            "series": result.series,
            "step": result.step,
            "file": str(result.path),
            "arrays": list(result.arrays),
            "top1": found.top1,
            "top5": found.top5,
            "ece": found.ece,
            "nll": found.nll,
            "count": found.count,
            "classes": found.classes,
            "calibration": [
                {
                    "over": lo,
                    "to": hi,
                    "count": count,
                    "accuracy": float(accuracy) if count else None,
                    "confidence": float(confidence) if count else None,
                }
                for lo, hi, count, accuracy, confidence in columns
            ],
        }

    return {"bins": bins, "results": [row(result) for result in results]}


def write_csv(results: Sequence[Result], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["series", "step", "top1", "top5", "ece", "nll", "count"])
        for result in results:
            found = result.scores
            writer.writerow([result.series, result.step, found.top1, found.top5, found.ece, found.nll, found.count])


def plot_steps(series: dict[str, list[Result]], path: Path) -> None:
    """Figure 6: accuracy against training step, top-1 solid and top-5 dashed."""
    figure, axes = new_figure(6.4, 4.2)
    for i, (name, group) in enumerate(series.items()):
        steps = np.array([result.step for result in group])
        for score, style in (("top1", "-"), ("top5", "--")):
            values = [getattr(result.scores, score) for result in group]
            label = f"{name}, top-{score[3:]}"
            axes.plot(steps, values, style, color=f"C{i % 10}", marker="o", markersize=3.5, label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, handlelength=3.5)
    save_figure(figure, path)


def plot_reliability(found: ClassificationScores, path: Path) -> None:
    """Accuracy against confidence per bin (Guo et al. 2017, Figure 1), and how many samples are in it."""
    figure, axes = new_figure(4.8, 5.4)
    bins = found.bins
    width, filled = 1 / len(bins.count), bins.count > 0
    middle = (bins.edges[:-1] + bins.edges[1:]) / 2
    axes.bar(middle[filled], bins.accuracy[filled], width, color="C0", alpha=0.45, edgecolor="C0", label="accuracy")
    axes.bar(middle, bins.count / found.count, width / 3, color="0.35", label="share of the samples")
    axes.plot([0, 1], [0, 1], "--", color="0.2", linewidth=1, label="calibrated")
    axes.plot(
        bins.confidence[filled],
        bins.accuracy[filled],
        "o",
        color="C3",
        markersize=4,
        clip_on=False,
        label="mean confidence of a bin",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    axes.set_title(f"expected calibration error {found.ece:.4f}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    save_figure(figure, path)


def draw_confusion(result: Result, path: Path) -> None:
    """True against predicted class, over the classes that occur; an array `classes` of the file gives their names."""
    with open_npz(result.path) as file:
        probabilities, labels = (read_array(file, name, result.path) for name in result.arrays)
        names = read_array(file, "classes", result.path).astype(str).tolist() if "classes" in file.files else []
    count = result.scores.classes
    names = [*names[:count], *map(str, range(len(names), count))]
    predicted = probabilities.argmax(axis=1)
    occurring = np.union1d(predicted, labels)
    H = confusion_matrix(predicted, labels, count)[np.ix_(occurring, occurring)]
    plot_confusion(H, [names[i] for i in occurring], path, "images")


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "files", nargs="+", metavar="[NAME=]FILE.npz", help="probabilities and labels; several: one per training step"
    )
    p.add_argument("--bins", type=int, default=BINS, help=f"bins of the calibration error ({BINS})")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write series,step,top1,top5,ece,nll,count")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy against training step")
    p.add_argument("--reliability", type=Path, metavar="FILE.png", help="draw the reliability diagram of a single file")
    p.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix of a single file")
    return p


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    for path in (args.json, args.csv, args.plot, args.reliability, args.confusion):
        if path:
            prepare_output(path)
    results = [score_file(series, path, args.bins) for series, path in files_of(args.files)]
    single = len(results) == 1
    for flag in ("reliability", "confusion"):
        if getattr(args, flag) and not single:
            raise EvaluationError(f"--{flag} draws one file, not {len(results)}")
    series = {} if single and not args.plot else by_series(results)
    if series:
        results = [result for group in series.values() for result in group]
    print(report_one(results[0], args.bins) if single else report_steps(series, args.bins))
    if args.json:
        write_json(args.json, as_json(results, args.bins))
    if args.csv:
        write_csv(results, args.csv)
    if args.plot:
        plot_steps(series, args.plot)
    if args.reliability:
        plot_reliability(results[0].scores, args.reliability)
    if args.confusion:
        draw_confusion(results[0], args.confusion)


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
