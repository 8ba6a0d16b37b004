"""Where Inception features come from: torch-fidelity's port in this process, or TensorFlow in one of its own."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import EvaluationError
from ..files.hashing import sha256
from ..files.images import ImageSet
from . import frozen_graph, inception
from .device import choose_device
from .features import Features, extract
from .weights import INCEPTION_TENSORFLOW, find


class Backend(Protocol):
    """An Inception network with its weights. `sha256` is that of the weights file `path`."""

    name: str
    software: str
    path: Path
    sha256: str

    @property
    def softmax_weight(self) -> np.ndarray:
        """[2048, 1008]."""

    @property
    def network_sha256(self) -> str:
        """Of the numbers, the same for every file and backend that holds them."""

    def features(self, images: ImageSet, what: str) -> Features: ...


class TorchBackend:
    """torch-fidelity's port (the default)."""

    name = "torch"

    def __init__(self, given: str | None, device: str, batch_size: int, workers: int) -> None:
        self.batch_size, self.workers = batch_size, workers
        self.network = inception.load(given, device)
        self.path, self.sha256, self.software = self.network.path, self.network.sha256, self.network.software
        self.softmax_weight = self.network.softmax_weight
        self.network_sha256 = digest(self.softmax_weight)

    def features(self, images: ImageSet, what: str) -> Features:
        return extract(images, self.network, self.batch_size, self.workers, what)


class TensorFlowBackend:
    """The original frozen graph. TensorFlow aborts beside torch-fidelity, so it gets a process (`tensorflow_worker`)."""

    name = "tensorflow"

    def __init__(self, given: str | None, device: str, batch_size: int, workers: int) -> None:
        self.batch_size, self.workers, self.device = batch_size, workers, device
        self.software = f"TensorFlow {installed_tensorflow()}"
        self.path = find(INCEPTION_TENSORFLOW, given)
        self.sha256 = sha256(self.path)

    @cached_property
    def softmax_weight(self) -> np.ndarray:
        return frozen_graph.read_state_dict(self.path)["fc.weight"].T.contiguous().numpy()

    @cached_property
    def network_sha256(self) -> str:
        return digest(self.softmax_weight)

    def features(self, images: ImageSet, what: str) -> Features:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "features.npz"
            command: list[str | Path | int] = [sys.executable, "-m", "evaluations.features.tensorflow_worker"]
            command += [Path(images.path).resolve(), self.path.resolve(), out]
            command += ["--batch_size", self.batch_size, "--workers", self.workers, "--what", what]
            command += ["--device", self.device]
            root = Path(__file__).resolve().parents[2]  # where -m finds the package, installed or not
            code = subprocess.run(list(map(str, command)), cwd=root, check=False).returncode
            if code == 2:  # it has said why
                raise SystemExit(2)
            if code:
                raise EvaluationError(
                    f"{images.path}: the TensorFlow process ended with code {code}; --backend torch needs none"
                )
            return Features.load(out)


def digest(softmax_weight: np.ndarray) -> str:
    """The last layer stands for the network."""
    return hashlib.sha256(np.ascontiguousarray(softmax_weight, dtype="<f4").data).hexdigest()


def installed_tensorflow() -> str:
    """The version. Raises EvaluationError where there is none."""
    for package in ("tensorflow", "tensorflow-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise EvaluationError("--backend tensorflow: TensorFlow is not installed: pip install '.[tensorflow]'")


BACKENDS: dict[str, Callable[[str | None, str, int, int], Backend]] = {
    "torch": TorchBackend,
    "tensorflow": TensorFlowBackend,
}


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how features are made, for every command that makes them."""
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default="torch", help="tensorflow: the original frozen graph"
    )
    parser.add_argument(
        "--inception", help="weights: torch-fidelity's .pth, or the frozen graph .pb, which both backends read"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per pass through the network")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and decode images")


def check_backend_flags(args: argparse.Namespace) -> None:
    """Raises EvaluationError for values out of range; `args.device` becomes the device that is used."""
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise EvaluationError(f"--{name} must be {least} or more, not {getattr(args, name)}")
    args.device = choose_device(args.device)


def load_backend(args: argparse.Namespace) -> Backend:
    """The backend that the flags name, with the weights given, in a cache, or downloaded."""
    return BACKENDS[args.backend](args.inception, args.device, args.batch_size, args.workers)
