"""Scores of restored images, the paper's Table 1: LPIPS, and PSNR, SSIM and errors of the masked and unmasked regions.

    mt-diffusion score restoration runs/first/samples/restored_mt_patches10.npz

Reads the .npz files that `restore` writes. --table sets several of them out as Table 1.
"""

from __future__ import annotations

if __package__ in (None, ""):  # run as a file
    from installed import run_as_script

    run_as_script()

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from evaluations.errors import EvaluationError, run, warn
from evaluations.features import weights
from evaluations.features.device import choose_device
from evaluations.files.files import prepare_output, write_json
from evaluations.files.hashing import sha256
from evaluations.files.restored_files import Restoration, read
from evaluations.scores.image_scores import mae, mse, psnr, ssim
from evaluations.scores.perceptual import Lpips, load_package
from evaluations.scores.region_scores import METRICS, Score
from evaluations.tables import table1

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Scored:
    """A file's scores, by metric: of its restored images and of its masked ones (Table 1's Clean-Masked)."""

    file: str
    method: str | None
    patches: int | None
    images: int
    height: int
    width: int
    masked_share: float
    originals_sha256: str = field(repr=False)
    masks_sha256: str = field(repr=False)
    restored: dict[str, Score]
    clean_masked: dict[str, Score]


@dataclass
class Scorer:
    """Measures files with some metrics; equal masked images only once."""

    metrics: Sequence[str]
    lpips: Lpips | None
    device: str
    batch_size: int
    _clean: dict[str, dict[str, Score]] = field(default_factory=dict)

    def score(self, given: table1.Given, found: Restoration) -> Scored:
        count, height, width, _ = found.original.shape
        originals, masks = _digest(found.original), _digest(found.mask, found.masked)
        key = originals + masks
        if key not in self._clean:
            self._clean[key] = self.compare(found.masked, found, f"{given.path.name}, masked")
        return Scored(
            file=str(given.path),
            method=given.method,
            patches=given.patches,
            images=count,
            height=height,
            width=width,
            masked_share=float(found.mask.mean()),
            originals_sha256=originals,
            masks_sha256=masks,
            restored=self.compare(found.restored, found, given.path.name),
            clean_masked=self._clean[key],
        )

    def compare(self, images: np.ndarray, with_: Restoration, label: str) -> dict[str, Score]:
        """The score of each metric that the images are large enough for."""
        import torch

        functions: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]
        functions = {"psnr": psnr, "ssim": ssim, "mse": mse, "mae": mae}
        lpips = self.lpips
        if lpips is not None:
            functions["lpips"] = lambda a, b, _: lpips(a, b)
        size = min(images.shape[1:3])
        values: dict[str, list[np.ndarray]] = {name: [] for name in self.metrics if size >= METRICS[name].least_size}
        with tqdm(total=len(images), desc=label, unit="image", leave=False, disable=None) as bar:
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                a, b, mask = (torch.from_numpy(x[part]).to(self.device) for x in (images, with_.original, with_.mask))
                for name, found in values.items():
                    found.append(functions[name](a, b, mask).cpu().numpy())
                bar.update(len(a))
        masked = with_.mask.sum(axis=(1, 2))
        pixels = {"masked": masked, "unmasked": with_.mask[0].size - masked}
        return {
            name: Score.of(np.concatenate(found), pixels[METRICS[name].region] if METRICS[name].pooled else None)
            for name, found in values.items()
        }


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument(
        "files",
        nargs="+",
        metavar="RESTORED.npz",
        help=f"written by `restore`; METHOD:M=FILE for one with another name than restored_METHOD_patchesM.npz, "
        f"METHOD one of {', '.join(table1.ROWS)}",
    )
    cli.add_argument(
        "--metrics",
        help=f"some of {','.join(METRICS)} (default: all; with --table the one that it shows)",
    )
    cli.add_argument("--lpips_weights", help=f"torchvision's {weights.ALEXNET.name} (default: cache folder, download)")
    cli.add_argument("--table", action="store_true", help="Table 1 of these files")
    cli.add_argument("--table_metric", default="lpips", help="what --table shows (default: lpips)")
    cli.add_argument("--paper", help="CSV of numbers to quote in the table: columns row,patches,lpips")
    cli.add_argument("--csv", help="write the table here as CSV")
    cli.add_argument("--json", help="write all numbers here")
    cli.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there)")
    cli.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    return cli


def main(argv: Sequence[str]) -> None:
    """Raises EvaluationError for input that can't be scored."""
    args = parser().parse_args(argv)
    metrics = chosen_metrics(args)
    if args.batch_size < 1:
        raise EvaluationError(f"--batch_size must be 1 or more, not {args.batch_size}")
    files = [table1.parse_given(text) for text in args.files]
    cells = table1.cells_of(files) if args.table else {}
    quoted = table1.read_quoted(Path(args.paper), args.table_metric) if args.paper else {}

    sizes = [read(given.path).original.shape[1:3] for given in files]  # before hours of work, whether all can be read
    used = [name for name in metrics if fits(name, files, sizes, explicit=bool(args.metrics or args.table))]
    device = choose_device(args.device)
    for path in (args.json, args.csv):
        if path:
            prepare_output(Path(path))
    lpips = load_lpips(args, metrics, device) if "lpips" in used else None
    scorer = Scorer(metrics, lpips, device, args.batch_size)
    scored = [scorer.score(given, read(given.path)) for given in files]
    warn_of_different_images(scored)

    protocol = protocol_of(used, lpips)
    records: list[dict[str, Any]] = []
    if args.table:
        records = table_records(args.table_metric, cells, scored, quoted)
        print_table(args.table_metric, records, bool(args.paper))
        print(f"protocol: {', '.join([*protocol['text'], images_of(scored)])}")
    else:
        for one in scored:
            print_scores(one, protocol["text"], title=len(scored) > 1)
    if args.csv:
        table1.write_csv(Path(args.csv), args.table_metric, records)
    if args.json:
        everything = {"files": [asdict(one) for one in scored], "table": records, "protocol": protocol}
        write_json(Path(args.json), everything)


def chosen_metrics(args: argparse.Namespace) -> list[str]:
    """The metrics to compute. Raises EvaluationError for unknown ones, and for flags that contradict each other."""
    table1.check_name("metric", args.table_metric, METRICS)
    if not args.table:
        needless = [flag for flag in ("csv", "paper") if getattr(args, flag)]
        if needless:
            raise EvaluationError(f"--{needless[0]} is for the table: add --table")
    if not args.metrics:
        return [args.table_metric] if args.table else list(METRICS)
    metrics = list(dict.fromkeys(name.strip() for name in args.metrics.split(",")))
    for name in metrics:
        table1.check_name("metric", name, METRICS)
    if args.table and args.table_metric not in metrics:
        raise EvaluationError(
            f"the table shows {args.table_metric}, which --metrics leaves out: add it, or choose --table_metric {metrics[0]}"
        )
    return metrics


def fits(metric: str, files: Sequence[table1.Given], sizes: Sequence[tuple[int, int]], explicit: bool) -> bool:
    """Whether `metric` has images large enough; a warning for the others, EvaluationError where it was asked for."""
    least = METRICS[metric].least_size
    small = [i for i, size in enumerate(sizes) if min(size) < least]
    if small:
        height, width = sizes[small[0]]
        message = (
            f"{files[small[0]].path}: images of {height}x{width} pixels are too small for {METRICS[metric].label}, which "
            f"needs {least}x{least}"
        )
        if explicit:
            raise EvaluationError(f"{message}: choose others of {','.join(METRICS)} with --metrics or --table_metric")
        warn(f"{message}: left out{f' there and in {len(small) - 1} more files' if len(small) > 1 else ''}")
    return len(small) < len(sizes)


def load_lpips(args: argparse.Namespace, metrics: Sequence[str], device: str) -> Lpips:
    """Raises EvaluationError with the way to do without, where the weights can't be had."""
    others = [name for name in (metrics if len(metrics) > 1 else METRICS) if name != "lpips"]
    without = f"--table_metric {others[0]}" if args.table else f"--metrics {','.join(others)}"
    try:
        load_package()  # before a download
        path = weights.find(weights.ALEXNET, args.lpips_weights)
        model = Lpips(path, device)
    except EvaluationError as error:
        raise EvaluationError(f"{error}; or without LPIPS: {without}") from error
    if not sha256(path).startswith(weights.ALEXNET.sha256):
        warn(
            f"{path}: sha256 does not begin with {weights.ALEXNET.sha256} like torchvision's {weights.ALEXNET.name}: compare "
            "this LPIPS with published ones only if the numbers in it are the same"
        )
    return model


def protocol_of(metrics: Sequence[str], lpips: Lpips | None) -> dict[str, Any]:
    """What the numbers hang on: packages and weights, as fields and as `text`."""
    found: dict[str, Any] = {}
    text = []
    if lpips is not None:
        found |= {"lpips": version("lpips"), "weights": str(lpips.path), "weights_sha256": sha256(lpips.path)}
        text.append(
            f"LPIPS 0.1 AlexNet (package {found['lpips']}), {lpips.path.name} sha256 {found['weights_sha256'][:16]}"
        )
    if "ssim" in metrics:
        found["torchmetrics"] = version("torchmetrics")
        text.append(f"SSIM 11x11 (torchmetrics {found['torchmetrics']})")
    return {**found, "text": text}


def images_of(scored: Sequence[Scored]) -> str:
    """'120 images of 16x16, 40.0 % masked', with all values that occur."""
    counts = sorted({str(one.images) for one in scored}, key=int)
    sizes = sorted({f"{one.height}x{one.width}" for one in scored})
    shares = sorted({100 * one.masked_share for one in scored})
    shown = dict.fromkeys(f"{share:.1f}" for share in shares)
    return f"{' or '.join(counts)} images of {' or '.join(sizes)}, {', '.join(shown)} % masked"


def print_scores(one: Scored, protocol: Sequence[str], title: bool) -> None:
    if title:
        print(f"{one.file}:")
    for name, score in one.restored.items():
        metric, masked = METRICS[name], one.clean_masked[name]
        value = "none" if score.mean is None else f"{score.mean:.{metric.digits}f}"
        if score.standard_error is not None:
            value += f" +- {score.standard_error:.{metric.digits}f}"
        clean = "none" if masked.mean is None else f"{masked.mean:.{metric.digits}f}"
        left = []
        if score.without_region:
            left.append(f"{score.without_region} without {metric.region} pixels")
        if score.exact:
            left.append(f"{score.exact} exact (infinite)")
        note = f"   images left out: {', '.join(left)}" if left else ""
        print(f"{metric.label}: {value}{metric.unit if score.mean is not None else ''}   (Clean-Masked {clean}){note}")
    print(f"protocol: {', '.join([*protocol, images_of([one])])}")


def table_records(
    metric: str, cells: dict[table1.Cell, table1.Given], scored: Sequence[Scored], quoted: dict[table1.Cell, float]
) -> list[dict[str, Any]]:
    """One record per cell with a number, ours or quoted. Clean-Masked is of a column's first file, unless one was given."""
    ours: dict[table1.Cell, tuple[str, Score]] = {}
    for cell, one in zip(cells, scored, strict=True):
        ours[cell] = one.file, one.restored[metric]
    for (_, patches), one in zip(cells, scored, strict=True):
        ours.setdefault((table1.ROWS["none"], patches), (one.file, one.clean_masked[metric]))
    records = []
    for row in table1.ROWS.values():
        for patches in table1.columns(ours, quoted):
            cell = row, patches
            file, score = ours.get(cell, (None, None))
            if score is None and cell not in quoted:
                continue
            records.append(
                {
                    "row": row,
                    "patches": patches,
                    metric: score and score.mean,
                    "standard_error": score and score.standard_error,
                    "images": score and score.images,
                    "quoted": quoted.get(cell),
                    "file": file,
                }
            )
    return records


def print_table(metric: str, records: Sequence[dict[str, Any]], quoting: bool) -> None:
    ours = {(r["row"], r["patches"]): r[metric] for r in records if r["file"] is not None}
    quoted = {(r["row"], r["patches"]): r["quoted"] for r in records if r["quoted"] is not None}
    print(table1.layout(METRICS[metric].label, ours, METRICS[metric].digits, quoted))
    if not quoting:
        print(f"our numbers only; to quote the paper's beside them: --paper FILE.csv, columns row,patches,{metric}")


def warn_of_different_images(scored: Sequence[Scored]) -> None:
    """Methods are compared on the same images, and in one column on the same masks."""
    first: dict[int, Scored] = {}
    for one in scored:
        if one.patches is None:
            continue
        same = first.setdefault(one.patches, one)
        if one.originals_sha256 != next(iter(first.values())).originals_sha256:
            warn(f"{one.file}: other originals than in {next(iter(first.values())).file}: no fair comparison")
        elif one.masks_sha256 != same.masks_sha256 and one.originals_sha256 == same.originals_sha256:
            warn(f"{one.file}: other masks than in {same.file}: no fair comparison")


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
