"""Checkpoints: one folder per step, written under a temporary name and renamed when complete.

    RUN/config.yaml
    RUN/checkpoints/step_00010000/{config.yaml, model.safetensors, ema_0.9999.safetensors, training_state.pt, classes.json}

Weights are safetensors with ADM's keys plus ours. How files are read, foreign ones too, is in `weights`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from .config import ModelConfig
from .recognise import RUNS, recognise, run_family
from .weights import RefusedFile as RefusedFile
from .weights import read_state as read_state
from .weights import read_weights as read_weights
from .weights import refuse_foreign, refuse_not_finite, shapes_of

OWN_PREFIXES = (
    "heads.",
    "head_variance.",
    "condition_in.",
    "context_in.",
    "null_token.",
    "modality_embedding.",
    "units.",
    "context_embedder.",
)
OWN_PARTS = (".encoder_kv.", ".context_attn.")  # of a U-Net's and a transformer's blocks
# Of a folder in the layout of Hugging Face's diffusers; it stands for the folder's weights.
PIPELINE = "model_index.json"
CLASSIFIER_HEAD = "heads.label.classifier."  # where a run with the E head keeps ADM's classifier
_STEP = re.compile(r"step_(\d{8,})$")


# ---------------------------------------------------------------- writing


def save_checkpoint(
    run: Path,
    step: int,
    *,
    config_yaml: str,
    weights: Mapping[str, Mapping[str, Tensor]],
    training_state: Mapping[str, Any],
    classes: Sequence[str] | None,
    keep: int = 0,
) -> Path:
    """Write RUN/checkpoints/step_NNNNNNNN with `weights` {file stem: state dict}, then drop all but the newest `keep`.

    On any error the half-written folder is removed, older checkpoints stay, and a UserError says why.
    """
    final = step_folder(run, step)
    folder, temporary = final.parent, final.with_name(f".tmp_{final.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".tmp_step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        (temporary / "config.yaml").write_text(config_yaml)
        (temporary / "classes.json").write_text(json.dumps(list(classes) if classes else None))
        for stem, state in weights.items():
            contiguous = {key: value.detach().to("cpu").contiguous() for key, value in state.items()}
            save_file(contiguous, str(temporary / f"{stem}.safetensors"))
        torch.save(dict(training_state), temporary / "training_state.pt")
        for file in temporary.iterdir():
            sync(file)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise not_written(final, error) from None
    if keep:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def not_written(final: Path, error: Exception) -> UserError:
    """What to say of the checkpoint `final` that could not be written."""
    return UserError(f"{final}: the checkpoint could not be written ({error}); earlier checkpoints are intact")


# What network, FUSE and shared file systems answer to an fsync of a folder that they have no notion of.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR)


def sync(path: Path) -> None:
    """Write a file or a folder's entries through to the disk. A file system that can't do that for folders is left to its own."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FOLDER_SYNC:
            raise


# ---------------------------------------------------------------- finding


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [entry for entry in (run / "checkpoints").glob("step_*") if _STEP.search(entry.name) and entry.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    return int(checkpoint.name.rpartition("_")[2])


def find_weights(path: str | Path, ema: str = "", flag: str = "--model_path") -> Path:
    """The weights file that `--model_path` (or `flag`) means: a file, or the chosen one of a checkpoint, or of a run's newest.

    ema: '' takes the slowest average there is, 'none' the raw weights, '0.9999' that rate.
    """
    path = Path(path)
    if not str(path) or str(path) == ".":
        raise UserError(f"{flag} is missing: name a run folder, a checkpoint folder or a weights file")
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / PIPELINE).is_file():
        return path / PIPELINE
    if not (path / "model.safetensors").exists():
        found = checkpoints(path) or (checkpoints(path.parent) if path.name == "checkpoints" else [])
        if not found and (path / "unet" / "config.json").is_file():
            raise UserError(f"{path}: is a folder of diffusers' without its {PIPELINE}; copy that file, too")
        if not found:
            raise UserError(f"{path}: holds no complete checkpoint (checkpoints/step_*/model.safetensors)")
        path = found[-1]
    if ema == "none":
        return path / "model.safetensors"
    averages = [file for file in path.glob("ema_*.safetensors") if re.fullmatch(r"ema_[0-9.]+", file.stem)]
    averages.sort(key=lambda file: float(file.stem[4:]))
    rates = [file.stem[4:] for file in averages]
    if ema and ema not in rates:
        raise UserError(f"{path}: has no averaged weights '{ema}'; there are {', '.join(rates) or 'none'}")
    if ema:
        return path / f"ema_{ema}.safetensors"
    return averages[-1] if averages else path / "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """A weights file and what lies beside it: its run's configuration and the names of its classes, each None where it has none."""

    file: Path
    settings: dict[str, Any] | None
    classes: list[str] | None

    @classmethod
    def find(cls, path: str | Path, ema: str = "", flag: str = "--model_path") -> Weights:
        """Those that `path` means, see `find_weights`. Asked once: beside a running training the newest ones change."""
        file = find_weights(path, ema, flag)
        return cls(file, read_config(file), read_classes(file.parent))


def read_config(weights: Path, *families: str) -> dict[str, Any] | None:
    """The configuration beside a weights file; None for a foreign file without one.

    families: the keys of RUNS that are meant, none for any. Raises UserError for a run of another, and for a damaged file.
    """
    file = weights.parent / "config.yaml"
    if not file.exists():
        return None
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # OmegaConf and PyYAML raise many kinds
        raise UserError(f"{file}: can't be read ({str(error).splitlines()[0]}); copy it again from the run") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is damaged, it must hold 'key: value' lines; copy it again from the run")
    found = run_family(content)
    if families and found not in (*families, ""):
        raise UserError(f"{weights}: is of a run that holds {RUNS[found][0]}; {RUNS[found][1]}")
    return content


def read_classes(checkpoint: Path) -> list[str] | None:
    """Class names by id, as they were in training; None without classes."""
    file = checkpoint / "classes.json"
    try:
        names = json.loads(file.read_text()) if file.exists() else None
    except ValueError:
        names = 0
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file}: is damaged (not a JSON list of names); copy it again from the run")
    return names


# ---------------------------------------------------------------- reading


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    allow_new: bool = False,
    settings: Mapping[str, Any] | None = None,
    averaged: bool = True,
) -> list[str]:
    """Load a weights file into `model`; float16 files are widened. averaged: see `weights.find_state`.

    allow_new: keys of ours (heads, condition inputs) may be missing, as in ADM's released files; the new inputs are then set
    to zero, so that the model's output is the loaded one's exactly. settings: the model's configuration, to compare with the
    one saved beside the file. Returns the new keys. Raises UserError naming what differs, or what holds NaN.
    """
    state = read_weights(path, averaged)
    own = model.state_dict()
    what = difference(state, own, optional=is_own if allow_new else None)
    if what:
        different = differing_keys(read_config(path) or {}, _network_settings(settings or {}))
        raise UserError(f"{path}: {mismatch(state, own, what, ', '.join(different) or 'the model flags')}")
    refuse_not_finite(state, path)
    return fill(model, state)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load the entries of `state` that `model` has; condition inputs that it lacks are set to zero (see `load_weights`).

    Returns the keys of ours that `state` lacks.
    """
    own = model.state_dict()
    new = [key for key in own if key not in state and is_own(key)]
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    with torch.no_grad():
        for key in new:
            if key.startswith("condition_in."):
                model.get_parameter(key).zero_()
    return new


def mismatch(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, compare: str) -> str:
    """What to say where `what` (see `difference`) keeps `state` from being loaded into a model with the entries `own`.

    compare: the settings to look at, where both are of the same family; else what `state` looks like, and what loads it.
    """
    theirs, ours = recognise(shapes_of(state)), recognise(shapes_of(own))
    if theirs and ours and theirs.family != ours.family:
        return f"has the keys of {theirs.name}, and this model is {ours.name}; {theirs.loads_it}"
    return f"another architecture: {what}; compare {compare}"


def difference(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: Callable[[str], bool] | None = None
) -> str:
    """The first of what keeps `state` from being loaded into a model with the entries `own`; '' where nothing does.

    optional: keys that one of the two may have alone.
    """
    needed = [key for key in own if not (optional and optional(key))]
    absent = [key for key in needed if key not in state]
    extra = [key for key in state if key not in own and not (optional and optional(key))]
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    if absent:
        return f"it lacks {len(absent)} of the model's {len(own)} entries, first '{absent[0]}'"
    if extra:
        return f"it has {len(extra)} entries that the model lacks, first '{extra[0]}'"
    if shapes:
        return f"'{shapes[0]}' is {list(state[shapes[0]].shape)} there and {list(own[shapes[0]].shape)} here"
    return ""


def classifier_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """ADM's noisy classifier in a state dict: all of it, or what a run with the E head holds. Raises UserError for neither."""
    refuse_foreign(state, path, "classifier", "pixel", known=True)
    inside = {
        key.removeprefix(CLASSIFIER_HEAD): value for key, value in state.items() if key.startswith(CLASSIFIER_HEAD)
    }
    if not inside and any(key.startswith(("output_blocks.", "final_layer.")) for key in state):
        raise UserError(
            f"{path}: a diffusion model without a classifier inside; give a classifier, or a run trained with "
            "--mt_task label --mt_label_head E"
        )
    return inside or dict(state)


def load_classifier_weights(model: nn.Module, path: Path, settings: Mapping[str, Any], averaged: bool = True) -> None:
    """Load the classifier of a weights file (see `classifier_state`) into `model`; float16 files are widened.

    settings: the model's configuration, to compare with the one saved beside the file. averaged: see `weights.find_state`. Raises
    UserError naming what differs, or what holds NaN.
    """
    state = classifier_state(read_weights(path, averaged), path)
    what = difference(state, model.state_dict())
    if what:
        different = differing_keys(read_config(path) or {}, settings)
        raise UserError(
            f"{path}: another classifier: {what}; compare {', '.join(different) or 'the classifier flags and --num_classes'}"
        )
    refuse_not_finite(state, path)
    model.load_state_dict(state)


def is_own(key: str) -> bool:
    """Whether a key of an MT model's state dict is none of the published network's."""
    return key.startswith(OWN_PREFIXES) or any(part in key for part in OWN_PARTS)


def adm_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that the backbone's own code loads (ADM's, DiT's): the network without heads and inputs of
    modalities."""
    return {key: value for key, value in state.items() if not is_own(key)}


def _network_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration, what decides the shapes of the weights."""
    free = ("dropout", "use_checkpoint", "use_fp16", "precision", "compile")
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in free]
    return {
        key: settings[key]
        for key in (*names, "learn_sigma", "diffusion_steps", "mt_task", "mt_variant")
        if key in settings
    }


def differing_keys(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """'key (saved value there, wanted value here)' for every key of `wanted` that was saved with another value."""
    return [f"{k} ({saved[k]} there, {v} here)" for k, v in wanted.items() if k in saved and saved[k] != v]
