"""Pretrained weights: a file given, one in a cache folder, or a download that resumes and is checked before it is used."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import EvaluationError
from ..files.hashing import sha256

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """A published file. `sha256` is its hash or as much of its beginning as its publisher states, "" where nothing is."""

    name: str
    url: str
    sha256: str
    flag: str


INCEPTION_TORCH = Weights(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    "--inception",
)
INCEPTION_TENSORFLOW = Weights(
    "classify_image_graph_def.pb",
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
    "",
    "--inception",
)
ALEXNET = Weights(
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be79",
    "--lpips_weights",
)


WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
NO_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, the file itself was not fetched (git lfs pull)",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "a server's message (XML)",
}


def cache_folder() -> Path:
    """`$MT_DIFFUSION_CACHE`, else `mt-diffusion` in the user's cache folder."""
    own = os.environ.get("MT_DIFFUSION_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mt-diffusion"


def torch_hub_folder() -> Path:
    """Where torch.hub, and so torchvision and torch-fidelity, keep what they once downloaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub" / "checkpoints"


def find(weights: Weights, given: str | Path | None = None) -> Path:
    """The file of `weights`: `given`, or one in a cache folder, or a download into ours.

    Raises EvaluationError where `given` is no file, or where nothing is there and nothing can be fetched.
    """
    if given:
        if not Path(given).is_file():
            raise EvaluationError(f"{given}: no such file ({weights.flag})")
        return Path(given)
    for folder in (cache_folder(), torch_hub_folder()):
        if (folder / weights.name).is_file():
            return folder / weights.name
    return download(weights, cache_folder())


def download(weights: Weights, folder: Path) -> Path:
    """Fetch `weights` into `folder`: a stopped download goes on where it was, and only a checked file gets its name."""
    try:
        import requests
    except ImportError as error:
        by_hand = f"or put {weights.name} into {folder}, or give its path with {weights.flag}"
        raise EvaluationError(f"a download needs requests ({error}): pip install '.[eval]', {by_hand}") from error
    target, part = folder / weights.name, folder / f"{weights.name}.part"
    by_hand = f"put {weights.name} into {folder}, or give its path with {weights.flag}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            if target.is_file():  # another process was first
                return target
            _fetch(requests, weights, part)
            found = sha256(part)
            if not found.startswith(weights.sha256):
                part.unlink()
                raise EvaluationError(
                    f"{weights.url}: arrived with sha256 {found[:16]}..., published is {weights.sha256}...; {by_hand}"
                )
            os.replace(part, target)
    except requests.RequestException as error:
        reason = type(error).__name__ if error.response is None else f"HTTP {error.response.status_code}"
        raise EvaluationError(f"{weights.url}: cannot be downloaded ({reason}); {by_hand}") from error
    except OSError as error:
        where = f"with {weights.flag}, or another folder with MT_DIFFUSION_CACHE"
        raise EvaluationError(
            f"{folder}: cannot be written ({error}); give the path of {weights.name} {where}"
        ) from error
    return target


def _fetch(requests: ModuleType, weights: Weights, part: Path) -> None:
    """Append to `part` what is missing. Raises requests.RequestException where the connection ends early."""
    part.touch()
    have = part.stat().st_size
    with requests.get(
        weights.url, stream=True, timeout=(10, 60), headers={"Range": f"bytes={have}-"} if have else {}
    ) as response:
        if response.status_code == 416:  # nothing is missing
            return
        response.raise_for_status()
        if response.status_code != 206:
            have = 0
        if "Content-Length" not in response.headers:
            raise requests.ConnectionError("without a length, nobody knows whether it is complete")
        total = have + int(response.headers["Content-Length"])
        with (
            open(part, "r+b") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=weights.name) as bar,
        ):
            file.truncate(have)
            file.seek(have)
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Hold `part` against other processes that want the same download, where the system can."""
    with open(part, "ab") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if part.is_file() and not part.stat().st_size:
                part.unlink()


def read_tensors(path: Path, takes: str) -> dict[str, Tensor]:
    """A state dict from a file of torch.save or safetensors, whatever its name; nothing in the file is run. `takes` says in an
    error what the flag takes.

    Raises EvaluationError for any other file, or one that holds other objects than tensors.
    """
    import torch

    with open(path, "rb") as file:
        head = file.read(256)
    for beginning, what in NO_WEIGHTS.items():
        if head.lstrip().lower().startswith(beginning):
            raise EvaluationError(f"{path}: is {what}, no weights file; {takes}")
    try:
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            with open(path, "rb") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that is something else fails in as many ways as there are files
        raise EvaluationError(f"{path}: not a PyTorch file of tensors, or a damaged one; {takes}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise EvaluationError(f"{path}: holds no state dict of tensors; {takes}")
    while state and all(key.startswith(WRAPPERS) for key in state):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state
