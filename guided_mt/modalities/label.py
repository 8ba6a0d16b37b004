"""Class labels (section 4.2, appendix E.3)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ..data import ImageSource
from ..data.sources.classes import is_number
from ..diffusion.random import SampleStreams
from ..errors import NPZ_ERRORS, UserError, reason
from ..runs.distributed import Processes
from .base import Images, Modality
from .classes import class_id
from .tokens import rms

log = logging.getLogger("guided_mt")

_PASS = 64  # classes per forward pass while a table is filled: bounds the memory


class LabelModality(Modality):
    """x is a class id [B] where it is known, and a vector of probabilities [B, K] where it is estimated.

    refresh: 1 encodes with the weights of the moment; K > 1 keeps a table of all classes'
    encodings, computed every K training steps (`--mt_encoder_refresh`).
    """

    has_spread = True
    is_class = True

    def __init__(self, num_classes: int, refresh: int = 1, name: str = "label"):
        super().__init__(name)
        self.num_classes, self.refresh = num_classes, refresh
        self.used = num_classes  # the first so many occur in the images; the rest was never trained
        self.table: Tensor | None = None  # [K, C, H, W]

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        if images.labels is None:
            raise ValueError(f"modality '{self.name}' needs images with classes")
        return images.labels.clamp(min=0) if self.partly else images.labels

    @override
    def prepare(self, images: ImageSource) -> None:
        self.partly |= images.labels is not None and bool((images.labels < 0).any())

    @override
    def present(self, images: Images) -> Tensor | None:
        return images.labels >= 0 if self.partly and images.labels is not None else None

    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        """One class each, uniformly drawn: z_T then has the law it has in training, where classes are about alike often."""
        return F.one_hot(streams.integers(self.used), self.num_classes).float()

    @override
    def default(self, streams: SampleStreams) -> Tensor:
        return streams.integers(self.used)

    @override
    def use_classes(self, names: Sequence[str]) -> None:
        self.used = min(len(names), self.num_classes)

    @override
    def encode(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return super().encode(x)
        if self.table is not None:
            return self.table[x]
        # Each class once; which ones occur is not asked, since that would wait for a GPU.
        if self.num_classes <= len(x):
            return self._encode_ids(torch.arange(self.num_classes, device=x.device))[x]
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            distinct, where = x.unique(return_inverse=True)
            return self._encode_ids(distinct)[where]
        return self._encode_ids(x)

    def _encode_ids(self, ids: Tensor) -> Tensor:
        return torch.cat([super(LabelModality, self).encode(part) for part in ids.split(_PASS)])

    @torch.no_grad()
    def encoding_spread(self, device: torch.device) -> Tensor:
        """Over the first 16 classes."""
        encodings = self.encode(torch.arange(min(16, self.num_classes), device=device))
        return rms(encodings - encodings.mean(dim=0)).square().mean().sqrt()

    def before_step(self, step: int, processes: Processes) -> None:
        """Every `refresh` steps, each process encodes its share of the classes."""
        if self.refresh == 1 or (self.table is not None and step % self.refresh):
            return
        share = math.ceil(self.num_classes / processes.world_size)
        first = processes.rank * share
        ids = torch.arange(first, first + share, device=processes.device) % self.num_classes  # shares of equal size
        self.table = processes.all_gather(self._encode_ids(ids))[: self.num_classes]

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.table is None else {"table": self.table}

    @override
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.table = state.get("table")

    @override
    def estimate(self, prediction: Tensor) -> Tensor:
        return prediction.softmax(dim=-1)

    @override
    def loss(self, prediction: Tensor, x: Tensor) -> Tensor:
        return F.cross_entropy(prediction, x, reduction="none")

    @override
    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return -F.cross_entropy(prediction, x, reduction="none")

    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        """A class name or id, or an .npz with ids in arr_1 (or `labels`)."""
        names = list(classes) if classes else [str(i) for i in range(self.num_classes)]
        if text.endswith(".npz"):
            return self._read_file(Path(text), names)
        return torch.tensor([class_id(text, names, f"--given {self.name}={text}")])

    def _read_file(self, path: Path, names: Sequence[str]) -> Tensor:
        try:
            with np.load(path, allow_pickle=False) as file:
                found = next((file[key] for key in ("arr_1", "labels", "label") if key in file.files), None)
        except NPZ_ERRORS as error:
            raise UserError(f"--given {self.name}={path}: can't be read as .npz ({reason(error)})") from None
        if found is None or found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
            raise UserError(f"--given {self.name}={path}: needs class ids [N] as array arr_1 or labels")
        if found.min() < 0 or found.max() >= len(names):
            raise UserError(
                f"--given {self.name}={path}: ids run from {found.min()} to {found.max()}, this model has {len(names)} classes"
            )
        other = next((k for k in found.tolist() if is_number(names[k]) and int(names[k]) != k), None)
        if other is not None:
            log.info(
                "--given %s=%s: its numbers are ids of the model: %d is class %s", self.name, path, other, names[other]
            )
        return torch.from_numpy(found.astype(np.int64))

    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        """The ids: of `label` arr_1, as ADM writes labels, else of the modality's name. Where estimated also NAME_probabilities."""
        ids = "arr_1" if self.name == "label" else self.name
        if not x.is_floating_point():
            return {ids: x.cpu().numpy()}
        return {ids: x.argmax(dim=-1).cpu().numpy(), f"{self.name}_probabilities": x.float().cpu().numpy()}

    def drawn(self, x: Tensor, streams: SampleStreams) -> dict[str, np.ndarray]:
        """A label from the estimated probabilities, NAME_draw."""
        if not x.is_floating_point():
            return {}
        label = (x.cumsum(1) < streams.uniform(1)).sum(1).clamp(max=x.shape[1] - 1)
        return {f"{self.name}_draw": label.cpu().numpy()}


class RandomLabel(LabelModality):
    """A label that knows nothing of the image, drawn anew each time: appendix E.5's control for negative transfer."""

    is_class = False

    def prepare(self, images: ImageSource) -> None:
        """Every image has one."""

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        return streams.integers(self.num_classes)

    def use_classes(self, names: Sequence[str]) -> None:
        """Its classes are none of the images'."""

    @override
    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        return super().read(text, size, None)
