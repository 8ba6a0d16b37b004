"""The denoisers of MT-Diffusion: a backbone with the multi-task part before it. A new backbone is a class and a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..diffusion.network import ModelOutput
from .create import create_model
from .multi_task import VARIANTS, MultiTask
from .unet import UNetModel

__all__ = ["BACKBONES", "VARIANTS", "MTModel", "MTUNet", "ModelOutput"]


class MTUNet(MultiTask, UNetModel):  # type: ignore[misc]  # forward is that of MultiTask
    """ADM's U-Net with heads and inputs for modalities. Its state dict is ADM's plus that of `MultiTask`, and the attention blocks'
    `encoder_kv.*` where there is something to attend to."""


MTModel = MTUNet

# {name of --mt_backbone: the keywords of `create_model` and of `MultiTask` -> the untrained network}
BACKBONES: dict[str, Callable[..., MultiTask]] = {
    "unet": partial(create_model, factory=MTUNet)  # type: ignore[dict-item]  # what the factory makes
}
