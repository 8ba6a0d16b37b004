"""The denoisers of MT-Diffusion: a backbone with the multi-task part before it."""

from __future__ import annotations

from ..diffusion.network import ModelOutput
from .dit import DiT
from .multi_task import VARIANTS, MultiTask
from .unet import UNetModel

__all__ = ["VARIANTS", "MTDiT", "MTModel", "MTUNet", "ModelOutput"]


class MTUNet(MultiTask, UNetModel):  # type: ignore[misc]  # forward is that of MultiTask
    """ADM's U-Net with heads and inputs for modalities. Its state dict is ADM's plus that of `MultiTask`, and the attention blocks'
    `encoder_kv.*` where there is something to attend to."""


class MTDiT(MultiTask, DiT):  # type: ignore[misc]  # forward is that of MultiTask
    """DiT with heads and inputs for modalities. Its state dict is DiT's plus that of `MultiTask`, and `blocks.N.context_attn.*` or
    `context_embedder.*` where there is something to attend to."""


MTModel = MTUNet
