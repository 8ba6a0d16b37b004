"""Which kind of thing a path is. A further kind is a row of KINDS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from evaluations.errors import EvaluationError
from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import PIPELINE

from .facts import Facts

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
ARRAYS = (".npz", ".npy")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jfif")


@dataclass(frozen=True)
class Kind:
    """accepts(path) -> whether it is one; describe: "module:function" of this package, which takes the path as it was typed."""

    accepts: Callable[[Path], bool]
    describe: str


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a checkpoint folder."""
    return path.is_dir() and (path / "model.safetensors").exists()


def is_run(path: Path) -> bool:
    """Whether the path is a run folder, also before its first checkpoint."""
    return path.is_dir() and ((path / "checkpoints").is_dir() or _is_begun(path))


def _is_begun(path: Path) -> bool:
    """A run without a checkpoint so far."""
    return (path / "config.yaml").exists() and not is_checkpoint(path)


def _has_runs(path: Path) -> bool:
    return path.is_dir() and any(is_run(entry) for entry in path.iterdir())


def _is_cache(path: Path) -> bool:
    return path.is_dir() and any(
        (folder / "latents.bin").exists() for folder in (path, *path.iterdir()) if folder.is_dir()
    )


def _named(*suffixes: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.suffix.lower() in suffixes


def _is_checkpoints(path: Path) -> bool:
    """The folder of a run that its checkpoints are in."""
    return path.name == "checkpoints" and path.is_dir() and any(map(is_checkpoint, path.iterdir()))


def _is_pipeline(path: Path) -> bool:
    """A folder in the layout of Hugging Face's diffusers."""
    return path.is_dir() and (path / PIPELINE).is_file()


KINDS = (
    Kind(_is_pipeline, "weights:pipeline"),
    Kind(_is_checkpoints, "runs:checkpoints_of"),
    Kind(is_checkpoint, "runs:checkpoint"),
    Kind(is_run, "runs:run"),
    Kind(_is_cache, "data:cache"),
    Kind(_has_runs, "runs:several"),
    Kind(_named(*ARRAYS), "arrays:describe"),
    Kind(_named(*WEIGHTS), "weights:describe"),
    Kind(_named(".yaml", ".yml"), "runs:configuration"),
    Kind(_named(".csv"), "runs:progress"),
    Kind(_named(*PICTURES), "data:picture"),
)


def describe(path: str) -> Facts:
    """What is at `path`. Raises EvaluationError for nothing, and for what is broken."""
    place = Path(path).expanduser()
    try:
        found = next((kind.describe for kind in KINDS if kind.accepts(place)), "data:describe")
        module, _, function = found.partition(":")
        facts: Facts = getattr(import_module(f".{module}", __package__), function)(path)
    except UserError as error:
        raise EvaluationError(str(error)) from None
    except PermissionError as error:
        raise EvaluationError(f"{path}: can't be read ({error.strerror})") from None
    return facts
