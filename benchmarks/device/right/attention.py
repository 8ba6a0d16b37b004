"""The kernels of scaled_dot_product_attention, one by one, at the shapes of the U-Net's attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..runner import Needs, Stage, within
from .arithmetic import FLOAT32, SAFETY, distance

DIM = 64
SHAPES = {"256 positions": (2, 4, 256, 256, False), "a context of 3, some left out": (2, 4, 64, 67, True)}
UNITS = {
    torch.float32: 2.0**-10,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}  # of float32: TF32, which kernels may take
REFUSALS = ("No available kernel", "No viable backend")  # on a GPU, and on a CPU


def run(stage: Stage) -> None:
    types = (torch.float32, torch.bfloat16, torch.float16) if stage.device.type == "cuda" else (torch.float32,)
    for backend in ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
        stage.check(f"attention: {backend}", lambda backend=backend: kernels(stage.device, backend, types))


def kernels(device: torch.device, name: str, types: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """Output and gradient of every shape and type that the kernel takes, against float64. Raises Needs where it takes none."""
    backend, found = getattr(SDPBackend, name), {}
    for shape, (batch, heads, queries, keys, masked) in SHAPES.items():
        for dtype in types:
            generator = torch.Generator().manual_seed(0)
            size = ((batch, heads, n, DIM) for n in (queries, keys, keys, queries))
            q, k, v, slope = (torch.randn(s, generator=generator).to(dtype) for s in size)
            mask = None
            if masked:
                mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
                mask[0, ..., :2] = False
            reference = _attend([x.double() for x in (q, k, v)], slope.double(), mask)
            there = mask if mask is None else mask.to(device)
            try:
                with sdpa_kernel(backend), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it says at length why a kernel can't be taken
                    made = _attend([x.to(device) for x in (q, k, v)], slope.to(device), there)
            except RuntimeError as error:
                # cuDNN refuses what it doesn't take by errors of its own.
                if any(text in str(error) for text in REFUSALS) or backend is SDPBackend.CUDNN_ATTENTION:
                    continue
                raise
            word = f"{str(dtype).removeprefix('torch.')}, {shape}"
            found[word] = max(distance(a, b) for a, b in zip(made, reference, strict=True))
            # Two products, a softmax between them, and the way back: some ten roundings.
            within(found[word], SAFETY * (10**0.5 * UNITS[dtype] + FLOAT32 * keys), **found)
    if not found:
        raise Needs("another device: no shape has this kernel here")
    return found


def _attend(parts: list[Tensor], slope: Tensor, mask: Tensor | None) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in parts)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return [out, *torch.autograd.grad((out * slope).sum(), (q, k, v))]
