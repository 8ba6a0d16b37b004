"""What a classifier says of clean images: the features before its last layer, and the classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..data.images import from_uint8
from ..errors import UserError
from .noisy_classifier import NoisyClassifier

_PASS = 256  # images per forward pass


@dataclass(frozen=True)
class ClassifiedImages:
    """Of N images: features [N, D], classes [N]."""

    features: np.ndarray
    classes: np.ndarray


class FeatureClassifier:
    """A noisy classifier at timestep 0, on clean images.

    Features are the input of its last layer: with `--classifier_pool adaptive`, the only pool taken here, the mean over positions
    of its last feature map. Raises UserError for another pool.
    """

    def __init__(self, classifier: NoisyClassifier):
        self.model, self.classes, self.size = classifier.model, classifier.classes, classifier.config.image_size
        if self.model.pool != "adaptive":
            raise UserError(f"images are classified by one with --classifier_pool adaptive, not {self.model.pool}")
        self._seen: list[torch.Tensor] = []
        last = self.model.out[-2]  # the linear layer, as a 1x1 convolution
        last.register_forward_pre_hook(lambda layer, inputs: self._seen.append(inputs[0].flatten(1)))

    @torch.no_grad()
    def classify(self, images: np.ndarray) -> ClassifiedImages:
        """uint8 [N, H, W, 3] -> their features and classes."""
        classes, device = [], next(self.model.parameters()).device
        self._seen.clear()
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(_PASS):
            logits = self.model(from_uint8(part.to(device)), torch.zeros(len(part), device=device))
            classes.append(logits.argmax(dim=1))
        return ClassifiedImages(torch.cat(self._seen).float().cpu().numpy(), torch.cat(classes).cpu().numpy())
