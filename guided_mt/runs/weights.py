"""The one reader of weights: files as training here saves them, and as other tools do.

Safetensors and torch.save are told apart by the file's bytes, not its name. State dicts may lie in a dictionary ({"state_dict"},
{"model", "ema", "opt"}) and under the prefixes of DistributedDataParallel, torch.compile, FSDP and AveragedModel. Nothing is
unpickled: files that hold other objects than tensors, and plain settings beside them, are refused.
"""

from __future__ import annotations

import functools
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .file_kinds import AGAIN, SAFETENSORS, container
from .recognise import Kind, recognise

# Where other tools keep a state dict in a file: averaged weights, and the weights themselves. The first that is there is meant.
AVERAGED = (
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema_state_dict",
    "params_ema",
    "g_ema",
)
PLAIN = (
    "state_dict",
    "model",
    "model_state_dict",
    "params",
    "net",
    "network",
    "unet",
    "generator",
    "weights",
    "module",
)
_COMPONENT = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MASKS = "mask"  # ends the name of buffers that may hold -inf, such as CLIP's attn_mask
# Settings and records that trainers keep beside the weights, by their classes. None is imported: an `Inert` stands for each.
PICKLED = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "datetime.datetime",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)
log = logging.getLogger("guided_mt")


class RefusedFile(UserError):
    """A weights file that holds objects other than tensors, or is damaged: nothing of it was unpickled."""


class Inert:
    """In the place of an object that is not loaded: takes whatever it is made of, and does nothing."""

    def __init__(self, *parts: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class Found:
    """The state dict of a weights file: its entries, the key that they lay under ('' for none), and what lay beside them."""

    state: dict[str, Tensor]
    under: str = ""
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind | None:
        """What it looks like; see `recognise`."""
        return recognise(shapes_of(self.state))


def read_state(path: Path, lazily: bool = False) -> Any:
    """The whole content of a .safetensors, .pt or .ckpt file, whatever its name, on the CPU.

    lazily: torch's files are mapped, so that entries are read when they are used, as those of safetensors are anyway.
    Raises UserError for a file that is damaged or no weights file, saying what it is, and RefusedFile for one that holds code.
    """
    try:
        if container(path) == SAFETENSORS:
            return _read_safetensors(path)[0]
        with path.open("rb") as file, torch.serialization.safe_globals([(Inert, name) for name in PICKLED]):
            mapped = lazily and zipfile.is_zipfile(path)  # what torch.save wrote before its zip files can't be mapped
            content = str(path) if mapped else file
            return torch.load(content, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise RefusedFile(f"{path}: refused, {_why_refused(str(error))}") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{path}: is truncated or no weights file ({reason}); {AGAIN}") from None


def _why_refused(text: str) -> str:
    named = re.search(r"GLOBAL (\S+)", text)  # torch's other lines are only advice to load it all the same
    first = named.group(1) if named else "as its pickle is read no further"
    return (
        f"it is damaged or holds objects other than tensors ({first}); where it was made, save its weights alone: "
        "torch.save(model.state_dict(), 'weights.pt')"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def find_state(path: Path, averaged: bool = True, lazily: bool = False) -> Found:
    """The state dict of a weights file, without its wrappers. averaged: prefer averages where the file has both (said in a line).
    lazily: see `read_state`.

    Raises UserError as `read_state` does, and for a file that holds something else, such as an optimiser's state.
    """
    try:
        if container(path) == SAFETENSORS:
            state, metadata = _read_safetensors(path)
            return Found(unwrapped(state), "", metadata)
    except (OSError, SafetensorError):
        pass  # `read_state` says what is wrong
    content = read_state(path, lazily)
    if _is_state(content):
        return Found(unwrapped(content))
    if isinstance(content, Mapping) and "param_groups" not in content:
        there = [key for key in (*AVERAGED, *PLAIN) if _inner(content.get(key)) is not None]
        ours = [key for key in there if (key in AVERAGED) == averaged] or there
        if ours:
            if any(key in AVERAGED for key in there) and any(key in PLAIN for key in there):
                other = next(key for key in there if (key in AVERAGED) != (ours[0] in AVERAGED))
                _say(f"{path}: takes {_named(ours[0])}, not '{other}'")
            beside = {key: value for key, value in content.items() if key != ours[0]}
            return Found(unwrapped(_inner(content[ours[0]]) or {}), ours[0], beside)
    if isinstance(content, Mapping) and any(key in content for key in ("param_groups", "optimizer", "optimizers")):
        raise UserError(
            f"{path}: holds an optimiser's state, not a model; give the model*.pt, ema*.pt or .safetensors file"
        )
    raise UserError(f"{path}: holds no state dict of tensors{_holds(content)}")


@functools.cache
def _say(text: str) -> None:
    """Log it, once however often a file is read, and by the main process alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        log.info("%s", text)


def _named(key: str) -> str:
    return f"its averages '{key}'" if key in AVERAGED else f"'{key}'"


def _holds(content: Any) -> str:
    if isinstance(content, Mapping):
        names = ", ".join(f"'{key}'" for key in list(content)[:5])
        return f", but {names}" if names else ", but an empty dictionary"
    return f", but a {type(content).__name__}"


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(x, Tensor) for x in content.values())


def _inner(content: Any) -> Mapping[str, Tensor] | None:
    """The state dict that stands in a file under some key, perhaps once more under one of PLAIN; None: no state dict."""
    while isinstance(content, Mapping) and content and not _is_state(content):
        content = next((content[key] for key in PLAIN if isinstance(content.get(key), Mapping)), None)
    return content if _is_state(content) else None


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries without what wrappers put before and into their names, nested in any order."""
    plain = {_COMPONENT.sub("", key): value for key, value in state.items()}
    state = plain if len(plain) == len(state) else dict(state)
    # Dots are gone from the names of LDM's averages, and with them the end of the wrapper's.
    state = {key.replace("_orig_mod", "") if key.startswith("model_ema.") else key: x for key, x in state.items()}
    named = [key for key in state if key != "n_averaged"]  # AveragedModel's count of updates
    if named and all(key.startswith("module.") for key in named):
        return unwrapped({key.removeprefix("module."): state[key] for key in named})
    return state


def read_weights(path: Path, averaged: bool = True) -> dict[str, Tensor]:
    """A state dict {key: tensor}; see `find_state`."""
    return find_state(path, averaged).state


# ---------------------------------------------------------------- what keeps a state dict from being loaded


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """The shape of each entry of a state dict."""
    return {key: value.shape for key, value in state.items()}


def refuse_foreign(state: Mapping[str, Tensor], path: str | Path, *families: str, known: bool = False) -> None:
    """UserError where a state dict looks like something of another family than these (see `recognise`): what, and what loads it.

    known: also where it looks like nothing that is known.
    """
    kind = recognise(shapes_of(state))
    if kind is None and known:
        raise UserError(f"{path}: holds no network that is known here (its first entry is '{next(iter(state))}')")
    if kind is not None and kind.family not in families:
        raise UserError(f"{path}: has the keys of {kind.name}; {kind.loads_it}")


def refuse_not_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """UserError where entries hold NaN or infinity, naming the first: a network that has them draws nothing but black."""
    bad = [key for key, value in state.items() if not key.endswith(MASKS) and not is_finite(value)]
    if bad:
        first = ", ".join(f"'{key}'" for key in bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise UserError(
            f"{path}: {len(bad)} of {len(state)} entries hold NaN or infinity ({first}): weights of a run that diverged, or a "
            "merge in half precision; take an earlier checkpoint or other averages"
        )


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass over the memory, and no copy."""
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value if value.dtype.itemsize > 1 else value.float())
    return bool(torch.isfinite(low) & torch.isfinite(high))
