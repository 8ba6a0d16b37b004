"""List the named settings that come along, with a line each, or print one of them.

    mt-diffusion presets
    mt-diffusion presets camvid_mt
    mt-diffusion presets masked-digits > mine.yaml     # to change it: mt-diffusion train --config mine.yaml

A preset is a YAML file of flags or of a latent configuration.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluations.errors import EvaluationError, nearest, run
from guided_mt.runs import presets as pixel
from latent_mt import configs as latent
from reproduce.table4_presets import PRESETS as TABLE4


@dataclass(frozen=True)
class Kind:
    """Settings that one command takes by name. lines() -> {name: its line}; text(name) -> all of it."""

    used_by: str
    lines: Callable[[], dict[str, str]]
    text: Callable[[str], str]


def first_line(file: Path) -> str:
    """The comment that a file of settings begins with."""
    with open(file, encoding="utf-8") as lines:
        return next(lines).removeprefix("#").strip()


def _pixel() -> dict[str, str]:
    return {name: first_line(pixel.file_of(name)) for name in pixel.names()}


def _latent(first_stages: bool) -> dict[str, str]:
    chosen = [name for name in latent.names() if name.startswith("autoencoder") == first_stages]
    return {name: first_line(latent.file_of(name)) for name in chosen}


def _latent_text(name: str) -> str:
    return latent.file_of(name).read_text(encoding="utf-8")


def _table4() -> dict[str, str]:
    return {name: f"{row.made} of {row.given}: {row.line}" for name, row in TABLE4.items()}


def _table4_text(name: str) -> str:
    row, files = TABLE4[name], ", ".join([TABLE4[name].autoencoder, f"{name}_single", f"{name}_mt"])
    return f"# {row.made} of {row.given}: {row.line}\n# made of the configurations {files}\n"


KINDS = (
    Kind("train --preset NAME", _pixel, lambda name: pixel.file_of(name).read_text(encoding="utf-8")),
    Kind("autoencoder-train --config NAME", lambda: _latent(True), _latent_text),
    Kind("latent-train --config NAME", lambda: _latent(False), _latent_text),
    Kind("table4 --preset NAME", _table4, _table4_text),
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="print this one's file")
    name = parser.parse_args(argv).name
    if name:
        print(text(name), end="")
        return
    listed = [(kind.used_by, kind.lines()) for kind in KINDS]
    width = max(len(name) for _, lines in listed for name in lines) + 2
    for used_by, lines in listed:
        print(f"mt-diffusion {used_by}")
        for name, line in lines.items():
            print(f"  {name:{width}s}{line}")
        print()
    print("mt-diffusion presets NAME prints one of them.")


def text(name: str) -> str:
    """The file of a named setting. Raises EvaluationError for an unknown name."""
    for kind in KINDS:
        if name in kind.lines():
            return kind.text(name)
    known = [name for kind in KINDS for name in kind.lines()]
    raise EvaluationError(f"unknown preset '{name}'{nearest(name, known)}; mt-diffusion presets lists them")


def console() -> None:
    run(main)
