"""The layout of the paper's Table 1: four methods in rows, the number of masked patches in columns."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import EvaluationError, nearest

ROWS = {"none": "Clean-Masked", "sdedit": "SDEdit-", "repaint": "RePaint", "mt": "MT-Diffusion"}  # by --method
PATCHES = (5, 10, 15, 20)
Cell = tuple[str, int]  # row, number of patches


@dataclass(frozen=True)
class Given:
    """A file, and the method and number of patches that it was named with (None: not known)."""

    path: Path
    method: str | None = None
    patches: int | None = None


def parse_given(text: str) -> Given:
    """`FILE` by the name that image_restore gives it, or `METHOD:M=FILE`. Raises EvaluationError for another METHOD or M."""
    named = re.fullmatch(r"([\w-]+)(?::([^=/]*))?=(.+)", text)
    if named and not Path(text).exists() and (":" in text or named[1] in ROWS):
        method, patches, path = named.groups()
        check_name("method", method, ROWS)
        if not (patches or "").isdecimal() or int(patches) < 1:
            raise EvaluationError(f"{text}: which number of patches? Write it as {method}:10={path}")
        return Given(Path(path), method, int(patches))
    path = Path(text)
    default = re.fullmatch(rf"restored_({'|'.join(ROWS)})_patches([1-9]\d*)\.npz", path.name)
    return Given(path, default[1], int(default[2])) if default else Given(path)


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises EvaluationError with the nearest name where `name` is not a `known` one."""
    known = list(known)
    if name not in known:
        raise EvaluationError(f"unknown {kind} {name!r}{nearest(name, known)}: there are {', '.join(known)}")


def cells_of(files: Sequence[Given]) -> dict[Cell, Given]:
    """The file of each cell. Raises EvaluationError for a file without a cell, and for two with the same one."""
    cells: dict[Cell, Given] = {}
    for file in files:
        if file.method is None or file.patches is None:
            raise EvaluationError(
                f"{file.path}: --table needs its method and number of patches: name it restored_METHOD_patchesM.npz, as "
                f"`restore` does, or write METHOD:M={file.path}, like mt:10={file.path}"
            )
        cell = ROWS[file.method], file.patches
        if cell in cells:
            raise EvaluationError(
                f"{cells[cell].path} and {file.path}: both are {cell[0]} with {cell[1]} patches; give one of them"
            )
        cells[cell] = file
    return cells


def read_quoted(path: Path, metric: str) -> dict[Cell, float]:
    """Numbers of a CSV file with columns row, patches and `metric`, as `write_csv` writes. Raises EvaluationError."""
    quoted: dict[Cell, float] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"row", "patches", metric} - set(reader.fieldnames or ())
            if missing:
                raise EvaluationError(
                    f"{path}: no column {', '.join(sorted(missing))}; --paper needs row,patches,{metric}"
                )
            for line in reader:
                where = f"{path}, line {reader.line_num}"
                row = ROWS.get((line["row"] or "").strip(), (line["row"] or "").strip())
                if row not in ROWS.values():
                    raise EvaluationError(f"{where}: unknown row {row!r}: there are {', '.join(ROWS.values())}")
                if not (line[metric] or "").strip():  # a row of which nothing is known
                    continue
                try:
                    cell, value = (row, int(line["patches"])), float(line[metric])
                except (TypeError, ValueError):
                    value = math.nan
                if not math.isfinite(value):
                    raise EvaluationError(
                        f"{where}: not numbers: patches {line['patches']!r}, {metric} {line[metric]!r}"
                    )
                if cell in quoted:
                    raise EvaluationError(f"{where}: {row} with {cell[1]} patches a second time")
                quoted[cell] = value
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path}: not a CSV file ({error})") from error
    return quoted


def columns(*tables: Mapping[Cell, object]) -> list[int]:
    """The paper's numbers of patches, and all others that occur."""
    return sorted(set(PATCHES) | {patches for table in tables for _, patches in table})


def layout(
    title: str, ours: Mapping[Cell, float | None], digits: int, quoted: Mapping[Cell, float] | None = None
) -> str:
    """Table 1 as text: "-" where no file was given, "n/a" (None) where a file has no such number."""
    quoted = quoted or {}

    def text(cell: Cell) -> str:
        own = "-" if cell not in ours else "n/a" if ours[cell] is None else f"{ours[cell]:.{digits}f}"
        return f"{own}  {quoted[cell]:.{digits}f} (quoted)" if cell in quoted else own

    shown = columns(ours, quoted)
    lines = [[title, *(f"m = {patches}" for patches in shown)]]
    lines += [[row, *(text((row, patches)) for patches in shown)] for row in ROWS.values()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("   ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_csv(path: Path, metric: str, records: Sequence[Mapping[str, object]]) -> None:
    """One line per filled cell; `--paper` can read it again."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["row", "patches", metric, "standard_error", "images", "quoted", "file"])
        writer.writeheader()
        writer.writerows(records)
