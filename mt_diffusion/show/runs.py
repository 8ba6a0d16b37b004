"""What a run, one of its checkpoints, or its configuration is."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_mt.errors import UserError
from guided_mt.runs.checkpoint import checkpoint_step, checkpoints, read_classes, read_config

from . import latent, pixel
from .facts import Facts, shortened, size_of
from .tensors import parameters, read_shapes

HIDDEN = ("samples", "lr", "images_per_second")  # columns of progress.csv that are no losses
MOST = 12  # losses that are shown


def run(path: str) -> Facts:
    """A run folder. Raises UserError where its configuration or newest weights are damaged."""
    folder = Path(path).expanduser()
    found = checkpoints(folder)
    newest = found[-1] if found else None
    config = read_config((newest or folder) / "model.safetensors")
    facts = Facts(path, f"a run: {describe_config(config)}")
    if newest is None:
        facts.kind += ", without a checkpoint so far"
    _fill(facts, config or {}, newest, path)
    if found:
        facts.add("checkpoints", shortened([f"{checkpoint_step(one):,}" for one in reversed(found)]))
    facts.add("last losses", last_row(folder / "progress.csv"))
    facts.add("files in samples/", shortened(sorted(file.name for file in (folder / "samples").glob("*.*"))))
    facts.add("size on disk", size_of(folder))
    if newest is None:
        facts.commands.clear()
    _go_on(facts, config or {}, path)
    return facts


def checkpoints_of(path: str) -> Facts:
    """The folder of a run's checkpoints: the run itself."""
    return run(str(Path(path).expanduser().absolute().parent if Path(path).parent == Path() else Path(path).parent))


def checkpoint(path: str) -> Facts:
    """A folder with model.safetensors."""
    folder = Path(path).expanduser()
    config = read_config(folder / "model.safetensors")
    facts = Facts(path, f"a checkpoint: {describe_config(config)}")
    _fill(facts, config or {}, folder, path)
    facts.add("last losses", last_row(folder.parent.parent / "progress.csv", _step(folder)))
    facts.add("size on disk", size_of(folder))
    return facts


def weights_of_run(path: str, config: Mapping[str, Any]) -> Facts:
    """A weights file with the configuration beside it."""
    file = Path(path).expanduser()
    which = "the weights" if file.stem == "model" else f"averaged weights ({file.stem.removeprefix('ema_')})"
    facts = Facts(path, f"{which} of a checkpoint: {describe_config(config)}")
    _fill(facts, config, file.parent, path)
    facts.add("size on disk", size_of(file))
    return facts


def several(path: str) -> Facts:
    """A folder of runs."""
    from .recognised import is_run

    facts = Facts(path, "a folder of runs")
    for entry in sorted(Path(path).expanduser().iterdir()):
        if is_run(entry):
            found = checkpoints(entry)
            try:
                what = describe_config(read_config((found[-1] if found else entry) / "config.yaml"))
            except UserError as error:
                what = str(error)
            facts.add(entry.name, f"{what}, {f'{checkpoint_step(found[-1]):,} steps' if found else 'no checkpoint'}")
            facts.command(entry.name, "show", entry)
    return facts


def configuration(path: str) -> Facts:
    """A YAML file of flags, or of a latent model."""
    file = Path(path).expanduser()
    config = read_config(file) if file.name == "config.yaml" else _read_yaml(file)
    facts = Facts(path, f"a configuration: {describe_config(config)}")
    _settings(facts, config or {})
    if is_latent(config or {}):
        name = "autoencoder-train" if latent.is_autoencoder(config or {}) else "latent-train"
        facts.command("train by it", name, "--config", path)
    else:
        facts.command("train by it", "train", "--config", path)
    return facts


def progress(path: str) -> Facts:
    """A run's progress.csv."""
    file = Path(path).expanduser()
    row = last_row(file)
    if not row:
        raise UserError(f"{path}: no table of a run with a column step; mt-diffusion show takes progress.csv")
    facts = Facts(path, "the losses of a run by step")
    facts.add("last losses", row)
    facts.command("the run itself", "show", file.parent)
    return facts


# ---------------------------------------------------------------- parts


def describe_config(config: Mapping[str, Any] | None) -> str:
    """In a few words what a configuration describes."""
    if config is None:
        return "of a model that no config.yaml describes"
    if is_latent(config):
        return latent.title(config)
    if pixel.is_classifier(config):
        return "a classifier of noisy images" if config.get("noised", True) else "a classifier of images"
    return pixel.title(config) if "mt_task" in config or "image_size" in config else "settings of an unknown kind"


def is_latent(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is a YAML file of latent_mt."""
    return isinstance(config.get("model"), Mapping)


def _settings(facts: Facts, config: Mapping[str, Any]) -> None:
    (latent if is_latent(config) else pixel).settings(facts, config)


def _fill(facts: Facts, config: Mapping[str, Any], folder: Path | None, path: str) -> None:
    """Rows and commands of a configuration, with its checkpoint where there is one. path: what to give to other commands."""
    _settings(facts, config)
    if folder is None:
        return
    facts.add("classes", shortened(read_classes(folder) or []))
    total = (config.get("run") or config).get("total_steps")
    step = _step(folder)
    if step is not None:
        facts.add("steps trained", f"{step:,}" + (f" of {total:,}" if isinstance(total, int) else ""))
    facts.add("parameters", parameters(read_shapes(folder / "model.safetensors").shapes))
    facts.add(
        "averages", [file.stem.removeprefix("ema_") for file in sorted(folder.glob("ema_*.safetensors"))] or "none"
    )
    (latent if is_latent(config) else pixel).commands(facts, config, path)


def _step(folder: Path) -> int | None:
    return checkpoint_step(folder) if re.fullmatch(r"step_\d+", folder.name) else None


def _go_on(facts: Facts, config: Mapping[str, Any], path: str) -> None:
    """How to train the run further."""
    file = Path(path) / "config.yaml"
    if is_latent(config):
        name = "autoencoder-train" if latent.is_autoencoder(config) else "latent-train"
        facts.command("train it further", name, "--config", file, f"run.log_dir={path}", "run.total_steps=N")
    elif pixel.is_classifier(config):
        facts.command("train another from it", "classifier-train", "--resume_checkpoint", path, "--data_dir", "IMAGES")
    elif "mt_task" in config:
        facts.command("train it further", "train", "--config", file, "--log_dir", path, "--total_steps", "N")


def last_row(file: Path, step: int | None = None) -> dict[str, str]:
    """The losses of the last row of progress.csv, or of the one at `step`; {} where there is none."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if (row.get("step") or "").isdigit()]
    except (OSError, ValueError, csv.Error):
        return {}
    rows = [row for row in rows if step is None or int(row["step"]) == step]
    if not rows:
        return {}
    shown = {key: value for key, value in rows[-1].items() if key and value and key not in HIDDEN and "_q" not in key}
    return dict(list(shown.items())[: MOST + 1])


def _read_yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    except Exception as error:  # OmegaConf and PyYAML raise many kinds
        raise UserError(f"{file}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a YAML file of 'key: value' lines is expected")
    return content
