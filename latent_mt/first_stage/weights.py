"""A first stage's weights: of LDM's checkpoints, of ours, and of diffusers' autoencoders."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from guided_mt.errors import UserError
from guided_mt.runs import checkpoint
from guided_mt.runs.weights import refuse_not_finite

from ..runs import hugging_face, ldm_checkpoint
from ..runs.hugging_face import vae
from ..runs.ldm_checkpoint import TRAINING_ONLY
from .ddconfig import DDConfig, read_ddconfig

log = logging.getLogger("latent_mt")


def load_first_stage(model: nn.Module, ddconfig: DDConfig, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
    """Load LDM's autoencoder checkpoint, one of ours, or diffusers' into a `model` of this ddconfig (see first_stages.Autoencoder).

    What only training needs is left out and named in the log. Raises UserError for entries that are missing, unknown or of
    another shape, and for a run of another ddconfig.
    """
    _refuse_other_ddconfig(ddconfig, path)
    state = read_state_dict(path)
    if vae.is_own(state):
        own = [key for key in model.state_dict() if not key.startswith(TRAINING_ONLY)]
        state = vae.state_to_ldm(state, own, len(ddconfig.ch_mult), f"ckpt_path {path}")
    ignored = [key for key in state if key.startswith(tuple(ignore_keys))]
    left_out = [key for key in state if key.startswith(TRAINING_ONLY) and key not in ignored]
    dropped = {*ignored, *left_out}
    load_entries(model, {key: value for key, value in state.items() if key not in dropped}, path, ignore_keys)
    if dropped:
        kinds = sorted({".".join(key.split(".")[:2]) for key in dropped})
        log.info("%s: %d entries not loaded into the autoencoder: %s", path, len(dropped), ", ".join(kinds))


def _saved_ddconfig(path: str | Path) -> Any:
    """That of the run or the folder that `path` means; None where nothing says one."""
    folder = hugging_face.autoencoder_folder(path) or hugging_face.autoencoder_folder(Path(path).parent)
    if folder is not None and (Path(path).is_dir() or vae.is_own(read_state_dict(path))):
        return hugging_face.autoencoder_params(folder)["ddconfig"]
    saved: Any = checkpoint.read_config(checkpoint.find_weights(path, flag="ckpt_path")) or {}
    for key in ("model", "params", "ddconfig"):
        saved = saved.get(key) if isinstance(saved, dict) else None
    return saved


def _refuse_other_ddconfig(ddconfig: DDConfig, file: str | Path) -> None:
    """UserError where the run that `file` is from had another network: not every difference shows in the entries' shapes."""
    saved = _saved_ddconfig(file)
    if not isinstance(saved, dict):
        return
    own, theirs = dataclasses.asdict(ddconfig), dataclasses.asdict(read_ddconfig(saved))
    for free in ("dropout", "resolution"):
        del own[free]
    different = checkpoint.differing_keys(theirs, own)
    if different:
        raise UserError(f"ckpt_path {file}: was trained with another ddconfig: {', '.join(different)}; repeat it here")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The entries of an autoencoder's checkpoint file or folder, by their names there. Raises UserError."""
    folder = hugging_face.autoencoder_folder(path)
    if folder is not None:
        return hugging_face.read_autoencoder(folder)
    return ldm_checkpoint.read_state_dict(checkpoint.find_weights(path, flag="ckpt_path"), "autoencoder")[0]


def load_entries(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, may_lack: Sequence[str] = ()) -> None:
    """Load `state` of `path` into `model`; entries that begin with one of `may_lack` may be missing. Raises UserError."""
    what = checkpoint.difference(state, model.state_dict(), optional=lambda key: key.startswith(tuple(may_lack)))
    if what:
        raise UserError(f"ckpt_path {path}: another {type(model).__name__}: {what}; compare ddconfig and embed_dim")
    refuse_not_finite(state, f"ckpt_path {path}")
    model.load_state_dict(state, strict=False)
