"""Scores of label maps made of photos (Table 4), as CycleGAN and pix2pix score Cityscapes.

    mt-diffusion score segmentation PRED REF [--classes FILE]

The papers are Zhu et al., ICCV 2017, and Isola et al., CVPR 2017.

PRED and REF are folders, .zip or .tar of images, paired by name without suffix, or .npz, paired by order. Every predicted
pixel gets the class of the nearest palette colour (squared Euclidean distance in RGB). From the confusion matrix H,
H[i, j] = number of pixels of true class i predicted as j:

    per-pixel accuracy = sum_i H_ii / sum_ij H_ij
    per-class accuracy = mean_i H_ii / sum_j H_ij
    class IoU          = mean_i H_ii / (sum_j H_ij + sum_j H_ji - H_ii)

- A class without pixels counts as 0 in the means, as in pix2pix's code (1e-12 in every denominator). A warning names such
  classes, and the means over the classes that occur in the reference are given beside it.
- Pixels whose reference is void are left out. Void is no candidate for predictions: every predicted pixel is one of the
  classes. Void's index in a map of indices is read as void's colour, so a map and its painted picture score the same.
- Reference colours that are not exactly in the palette go to the nearest one, void included, with a warning.
- Cityscapes is built in. Its label ids (0..33) become training ids in files named *_labelIds, by --label_ids (of REF) and
  --pred_label_ids (of PRED). A warning says where ids look like label ids and were read as training ids.
"""

from __future__ import annotations

if __package__ in (None, ""):  # run as a file
    from installed import run_as_script

    run_as_script()

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluations.errors import EvaluationError, run, warn
from evaluations.files.files import prepare_output, write_json
from evaluations.files.label_maps import (
    Decoded,
    LabelMaps,
    decode_prediction,
    decode_reference,
    open_label_maps,
    pairs,
    resize,
)
from evaluations.files.palettes import (
    CITYSCAPES,
    CITYSCAPES_LABEL_IDS,
    VOID,
    Palette,
    nearest_class,
    palette_of,
    read_classes,
    training_ids,
)
from evaluations.scores.segmentation_scores import SegmentationScores, confusion_matrix, scores
from evaluations.tables.figures import plot_confusion

__all__ = ["SegmentationScores", "confusion_matrix", "count", "main", "nearest_class", "scores"]

FAR = 30.0  # in RGB; compression and smoothing stay below it, colours of another palette seldom do

# Table 4 of the MT-Diffusion paper: per-pixel accuracy, per-class accuracy, class IoU; None: not stated. InternImage-H, a
# network for segmentation alone, is Wang et al., CVPR 2023.
QUOTED: dict[str, tuple[float | None, ...]] = {
    "CycleGAN": (0.58, 0.22, 0.16),
    "pix2pix": (0.85, 0.40, 0.32),
    "InternImage-H": (None, None, 0.86),
    "MT-Diffusion paper, single-task": (0.72, 0.54, 0.32),
    "MT-Diffusion paper": (0.95, 0.85, 0.70),
}


# ---------------------------------------------------------------- label maps -> confusion matrix


@dataclass
class Tally:
    """What was counted over all pairs."""

    confusion: np.ndarray  # int64 [K, K]
    images: int = 0
    void_pixels: int = 0
    predicted_void: int = 0  # pixels with void's index, among those that are scored
    off_palette: int = 0  # reference pixels whose colour no class has
    largest_distance: float = field(default=0.0)  # of these, in RGB


def count(pred: LabelMaps, ref: LabelMaps, palette: Palette, resize_reference: bool = False) -> Tally:
    """Confusion matrix of all pairs. Raises EvaluationError for sizes that differ and for unknown indices."""
    classes = len(palette.classes)
    tally = Tally(np.zeros((classes, classes), np.int64))
    for i, j in tqdm(pairs(pred, ref), unit="image", disable=None):
        predicted = _decode(decode_prediction, pred, i, palette, "--pred_label_ids")
        reference = _decode(decode_reference, ref, j, palette, "--label_ids")
        size, wanted = reference.positions.shape, predicted.positions.shape
        if size != wanted:
            if not resize_reference:
                raise EvaluationError(
                    f"{pred.names[i]} is {wanted[1]}x{wanted[0]}, {ref.names[j]} {size[1]}x{size[0]};"
                    " --resize brings the reference to the prediction's size"
                )
            reference = resize(reference, wanted)
        void = reference.positions == VOID
        tally.confusion += confusion_matrix(predicted.positions, reference.positions, classes)
        tally.images += 1
        tally.void_pixels += int(void.sum())
        tally.predicted_void += int((predicted.inexact & ~void).sum())
        tally.off_palette += int(reference.inexact.sum())
        tally.largest_distance = max(tally.largest_distance, reference.largest_distance)
    return tally


def _decode(decode: Callable[..., Decoded], maps: LabelMaps, i: int, palette: Palette, flag: str) -> Decoded:
    """flag: what says that these maps hold label ids."""
    array = maps.read(i)
    try:
        return decode(array, palette)
    except EvaluationError as error:
        hint = f"; if these are Cityscapes' label ids: {flag}" if palette.cityscapes and array.ndim == 2 else ""
        raise EvaluationError(f"{maps.names[i]}: {error}{hint}") from error


# ---------------------------------------------------------------- reports


def warn_about(tally: Tally, found: SegmentationScores, palette: Palette) -> None:
    absent = [name for name, here in zip(palette.names, found.present, strict=True) if not here]
    if absent:
        warn(f"not in the reference, counted as 0 in the means: {', '.join(absent)}")
    if tally.predicted_void:
        warn(f"{tally.predicted_void:,} scored pixels are predicted as void; they count as the class nearest in colour")
    if tally.off_palette:
        far = f"; is this the palette of the reference ({palette.source})?" if tally.largest_distance > FAR else ""
        warn(
            f"{tally.off_palette:,} reference pixels have a colour of no class and go to the nearest,"
            f" at most {tally.largest_distance:.1f} away in RGB{far}"
        )


def warn_about_label_ids(tally: Tally, palette: Palette, told: Sequence[str]) -> None:
    """Say where maps look like Cityscapes' label ids though they were read as training ids: those below 19 are valid as both.

    told: flags that are given, of what was read as label ids.
    """
    if not palette.cityscapes or len(palette.classes) != len(CITYSCAPES_LABEL_IDS):
        return
    suspected = label_ids_suspected(tally.confusion)
    if len(suspected) == 2 and told:
        return  # what is left of these few classes says nothing
    for name, flag in (side for side in suspected if side[1] not in told):
        warn(
            f"{name} looks like Cityscapes' label ids (7 road, 8 sidewalk, 11 building, ...), but was read as training ids "
            f"(0 road, 1 sidewalk, 2 building, ...); if it has label ids, the scores are wrong: {flag}"
        )


def label_ids_suspected(H: np.ndarray) -> list[tuple[str, str]]:
    """(PRED or REF, its flag) of what has label ids by the evidence of the confusion matrix [19, 19].

    Read as label ids, one side agrees with the other on more pixels; or neither side has a class that is no label id, and both
    lack 0 to 6, where the road is.
    """
    label_ids = np.array([k for k in CITYSCAPES_LABEL_IDS if k < len(H)])
    ids = training_ids(label_ids)  # what they mean
    agreed = np.trace(H)
    both = (("PRED", "--pred_label_ids"), ("REF", "--label_ids"))
    only = np.setdiff1d(np.arange(len(H)), label_ids)
    if H.any() and not H[only].any() and not H[:, only].any():
        return list(both)
    return [
        side for side, found in zip(both, (H[ids, label_ids], H[label_ids, ids]), strict=True) if found.sum() > agreed
    ]


def report(found: SegmentationScores, tally: Tally, palette: Palette) -> str:
    present = f"{found.present.sum()} of {len(palette.classes)} classes that occur in the reference"
    width = max(len(name) for name in [*palette.names, "class"])
    rows = zip(palette.names, found.accuracies, found.ious, found.share, found.present, strict=True)
    pixels = int(tally.confusion.sum())
    void = ", ".join(entry.name for entry in palette.void) or "none"
    return "\n".join(
        [
            f"Per-pixel accuracy: {found.pixel_accuracy:.4f}",
            f"Per-class accuracy: {found.class_accuracy:.4f}",
            f"Class IoU: {found.class_iou:.4f}",
            f"Over the {present}: per-class accuracy {found.present_class_accuracy:.4f},"
            f" class IoU {found.present_class_iou:.4f}",
            "",
            f"{'class':{width}}  accuracy     IoU   pixels",
            *(
                f"{name:{width}}  {f'{accuracy:8.4f}' if here else '  absent'}  {iou:6.4f}  {100 * share:6.2f}%"
                for name, accuracy, iou, share, here in rows
            ),
            "",
            f"Protocol: {tally.images} images, {pixels:,} pixels scored, {tally.void_pixels:,} void pixels left out"
            f" (void: {void}); nearest of {len(palette.classes)} colours; classes: {palette.source}",
        ]
    )


def table(found: SegmentationScores, palette: Palette) -> str:
    """The paper's Table 4 with this run below. The quoted rows are on Cityscapes."""
    own = (found.pixel_accuracy, found.class_accuracy, found.class_iou)
    rows = [(f"{name} (quoted, Cityscapes)", values) for name, values in QUOTED.items()]
    rows.append((f"this run ({Path(palette.source).name})", own))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'photo -> labels':{width}}  per-pixel acc.  per-class acc.  class IoU"]
    for name, values in rows:
        a, b, c = ("-" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"{name:{width}}  {a:>14}  {b:>14}  {c:>9}")
    return "\n".join(lines)


def as_json(found: SegmentationScores, tally: Tally, palette: Palette) -> dict:
    columns = zip(palette.classes, found.accuracies, found.ious, found.share, found.present, strict=True)
    return {
        "per_pixel_accuracy": found.pixel_accuracy,
        "per_class_accuracy": found.class_accuracy,
        "class_iou": found.class_iou,
        "per_class_accuracy_of_present": found.present_class_accuracy,
        "class_iou_of_present": found.present_class_iou,
        "classes": [
            {
                "index": entry.index,
                "name": entry.name,
                "accuracy": float(accuracy),
                "iou": float(iou),
                "share": float(share),
                "present": bool(present),
            }
            for entry, accuracy, iou, share, present in columns
        ],
        "confusion": tally.confusion.tolist(),
        "images": tally.images,
        "pixels": int(tally.confusion.sum()),
        "void_pixels": tally.void_pixels,
        "predicted_void_pixels": tally.predicted_void,
        "off_palette_pixels": tally.off_palette,
        "off_palette_distance": tally.largest_distance,
        "void": [entry.name for entry in palette.void],
        "classes_from": palette.source,
    }


def write_confusion(H: np.ndarray, names: Sequence[str], folder: Path) -> None:
    """`confusion.csv`, counts, and `confusion.png`, each row as shares of its true class."""
    with open(folder / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, H.tolist(), strict=True))
    plot_confusion(H, names, folder / "confusion.png", "pixels")


# ---------------------------------------------------------------- command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("pred", type=Path, metavar="PRED", help="predicted label maps: folder, .zip, .tar or .npz")
    p.add_argument("ref", type=Path, metavar="REF", help="true label maps, in the same forms")
    p.add_argument("--classes", type=Path, metavar="FILE", help="lines `index name R G B`; default: Cityscapes")
    p.add_argument(
        "--void",
        action="append",
        metavar="NAME_OR_INDEX",
        help="class to leave out (repeatable); default: those called void, unlabelled, unlabeled or ignore",
    )
    p.add_argument("--label_ids", action="store_true", help="REF's indices are Cityscapes' label ids (0..33)")
    p.add_argument("--pred_label_ids", action="store_true", help="PRED's indices are Cityscapes' label ids (0..33)")
    p.add_argument("--pred_key", default="arr_0", metavar="NAME", help="array of PRED where it is an .npz (arr_0)")
    p.add_argument("--ref_key", default="arr_0", metavar="NAME", help="array of REF where it is an .npz (arr_0)")
    p.add_argument("--resize", action="store_true", help="bring the reference to the prediction's size (nearest)")
    p.add_argument("--table", action="store_true", help="print the paper's Table 4 with this run")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    p.add_argument("--out_dir", type=Path, metavar="DIR", help="write confusion.csv and confusion.png there")
    return p


def load_palette(classes: Path | None, void: Sequence[str] | None) -> Palette:
    if classes is None:
        return palette_of(CITYSCAPES, "Cityscapes", void)
    return palette_of(read_classes(classes), str(classes), void)


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    if args.json:
        prepare_output(args.json)
    if args.out_dir:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    palette = load_palette(args.classes, args.void)
    for flag in ("label_ids", "pred_label_ids"):
        if getattr(args, flag) and not palette.cityscapes:
            raise EvaluationError(f"--{flag} are Cityscapes' label ids and do not go with --classes")

    def by_name(stem: str) -> bool:
        return palette.cityscapes and stem.endswith("_labelIds")

    pred = open_label_maps(args.pred, args.pred_key, palette, lambda stem: args.pred_label_ids or by_name(stem))
    ref = open_label_maps(args.ref, args.ref_key, palette, lambda stem: args.label_ids or by_name(stem))
    tally = count(pred, ref, palette, args.resize)
    found = scores(tally.confusion)
    warn_about(tally, found, palette)
    told = [f"--{flag}" for flag in ("label_ids", "pred_label_ids") if getattr(args, flag)]
    warn_about_label_ids(tally, palette, told)
    print(report(found, tally, palette))
    if args.table:
        print(f"\n{table(found, palette)}")
    if args.json:
        write_json(args.json, {"pred": str(args.pred), "ref": str(args.ref), **as_json(found, tally, palette)})
    if args.out_dir:
        write_confusion(tally.confusion, palette.names, args.out_dir)


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
