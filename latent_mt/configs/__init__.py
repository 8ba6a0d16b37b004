"""The named configurations of latent models: NAME.yaml here is `--config NAME`. The comment in its first line says what it is."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def file_of(name: str) -> Path:
    """The file of a name in `names`."""
    return FOLDER / f"{name}.yaml"
