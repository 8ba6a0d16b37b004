"""LPIPS (Zhang et al., CVPR 2018), version 0.1 on AlexNet: the authors' package, with AlexNet's weights from a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import EvaluationError
from ..features.device import without_tf32
from ..features.weights import ALEXNET, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_SIZE = 31  # pixels: of fewer, AlexNet's second pooling leaves nothing


class Lpips:
    """The distance between images, 0 for equal ones.

    `weights_path`: torchvision's AlexNet, .pth or .safetensors; the linear heads come with package lpips. Raises
    EvaluationError where the package is missing or the file is something else.
    """

    def __init__(self, weights_path: str | Path, device: str | torch.device = "cpu") -> None:
        lpips = load_package()
        self.path = Path(weights_path)
        trunk = read_tensors(self.path, f"--lpips_weights takes {ALEXNET.name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in a deprecated way
            self.model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        own = self.model.net.state_dict()
        # lpips cuts AlexNet into slices and keeps the layers' numbers: slice2.3.weight is features.3.weight.
        wanted = {name: "features." + name.split(".", 1)[1] for name in own}
        for name, published in wanted.items():
            found = getattr(trunk.get(published), "shape", None)
            if found != own[name].shape:
                what = f"has {published} {list(found)}" if found is not None else f"has no {published}"
                raise EvaluationError(
                    f"{self.path}: {what}, torchvision's AlexNet has {published} {list(own[name].shape)}: "
                    "give alexnet-owt-7be5be79.pth with --lpips_weights"
                )
        self.model.net.load_state_dict({name: trunk[published] for name, published in wanted.items()})
        self.model.to(device).eval()

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS [N] between images `a` and `b`, uint8 [N, H, W, 3] with H and W of LEAST_SIZE or more.

        Raises EvaluationError for smaller images, and for weights that lead to something that is no number.
        """
        import torch

        if min(a.shape[1:3]) < LEAST_SIZE:
            raise EvaluationError(
                f"images of {a.shape[1]}x{a.shape[2]} pixels: LPIPS needs {LEAST_SIZE}x{LEAST_SIZE} or more"
            )
        device = next(self.model.parameters()).device
        a, b = (torch.as_tensor(x).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (a, b))
        with torch.no_grad(), without_tf32():
            distance = self.model(a, b).flatten()
        if not distance.isfinite().all():
            raise EvaluationError(f"{self.path}: LPIPS with these weights is not a number: they are damaged")
        return distance


def load_package() -> ModuleType:
    """Package lpips. Raises EvaluationError where it is not installed."""
    try:
        import lpips
    except ImportError as error:
        raise EvaluationError(f"LPIPS needs package lpips ({error}): pip install '.[eval]'") from error
    return lpips
