"""Inception features by torch-fidelity's port of the network of 2015-12-05."""

from __future__ import annotations

import io
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaluationError
from ..files.hashing import sha256
from . import frozen_graph
from .device import without_tf32
from .features import SPATIAL_CHANNELS
from .weights import INCEPTION_TORCH, find, read_tensors


class TorchInception:
    """torch-fidelity's `FeatureExtractorInceptionV3`, with TensorFlow's resize, and the spatial features that sFID uses.

    Weights are torch-fidelity's `.pth`, or the frozen graph `.pb` that it was made from.
    Raises EvaluationError for any other file, or where torch-fidelity is not installed.
    """

    name = "torch"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        extractor = extractor_class()
        self.path, self.sha256, self.device = path, sha256(path), torch.device(device)
        self.software = f"torch-fidelity {version('torch-fidelity')}"
        # Its constructor unpickles the file that it is given, so it is given one in memory that we wrote.
        checked = io.BytesIO()
        torch.save(read_weights(path), checked)
        checked.seek(0)
        try:
            self.module = extractor("inception-v3-compat", ["2048"], checked)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise EvaluationError(f"{path}: not the weights of torch-fidelity's Inception network ({first})") from error
        # Images arrive with channels last, and on a CPU the whole network is then 1.4 times as fast.
        self.module.to(
            self.device, memory_format=torch.channels_last if self.device.type == "cpu" else torch.preserve_format
        )
        self.module.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.softmax_weight = self.module.fc.weight.detach().T.contiguous().cpu().numpy()  # [2048, 1008]

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """`mixed_6/conv` [B, 192, 17, 17], after batch norm and ReLU."""
        self._mapped = output[:, :SPATIAL_CHANNELS]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W, 3] -> pool [B, 2048], spatial [B, 17 * 17 * 7] in TensorFlow's order (row, column, channel)."""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        with without_tf32():
            (pool,) = self.module(x)
        return pool.cpu().numpy(), self._mapped.permute(0, 2, 3, 1).flatten(1).cpu().numpy()


def extractor_class() -> type:
    """torch-fidelity's class. Raises EvaluationError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision's loading
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise EvaluationError(f"the torch backend needs torch-fidelity ({error}): pip install '.[eval]'") from error
    return FeatureExtractorInceptionV3


def load(given: str | None, device: torch.device | str) -> TorchInception:
    """The network with the weights at `given`, in a cache folder, or downloaded (see `weights.find`)."""
    extractor_class()  # before a download
    return TorchInception(find(INCEPTION_TORCH, given), device)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from `.pb` or `.pth`, of tensors only. Raises EvaluationError for what is neither, or holds other objects."""
    if Path(path).suffix.lower() == ".pb":
        return frozen_graph.read_state_dict(path)
    return read_tensors(path, f"--inception takes {INCEPTION_TORCH.name} or a frozen .pb")
