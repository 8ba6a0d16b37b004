"""Precisions, and the error that each may make.

A rounding to p bits errs by at most u = 2^-p of the value, in either direction, so that n of them in a row err like a random walk,
by about u sqrt(n). A layer rounds three things (input, weights, output) and sums K products in float32, about 2^-24 sqrt(K) more.
With n layers on the way the error is u sqrt(3 n) + 2^-24 sqrt(n K); a gradient has the way twice. A factor of 4 is left for the
shape of the network: a wrong kernel errs by the value itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FLOAT32 = 2.0**-24
SAFETY = 4.0
MAX_TIMESTEP = 64  # of what is compared: cos(t f) errs by t 2^-24, which would hide the rest at 1000


@dataclass(frozen=True)
class Precision:
    """flag: that of `--precision`. unit: u; TF32 cuts where it should round, which costs one bit."""

    name: str
    flag: str
    unit: float
    tf32: bool = False

    def tolerance(self, network: nn.Module, *, backward: bool = False) -> float:
        """The relative error that is allowed in the output of `network`, or in its gradient."""
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding))]
        longest = max(m.weight[0].numel() for m in layers)
        way = len(layers) * (2 if backward else 1)
        steps = self.unit * math.sqrt(3 * way) + FLOAT32 * (math.sqrt(way * longest) + MAX_TIMESTEP)
        return SAFETY * steps

    @contextlib.contextmanager
    def active(self, network: nn.Module) -> Iterator[None]:
        """Inside, `network` and all its parts compute in this precision."""
        parts = [part for part in network.modules() if hasattr(part, "precision")]
        before = [part.precision for part in parts]
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        allowed = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = self.tf32
        for part in parts:
            part.precision = self.flag
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = allowed
            for part, own in zip(parts, before, strict=True):
                part.precision = own


FP32 = Precision("fp32", "fp32", FLOAT32)
TF32 = Precision("TF32", "fp32", 2.0**-10, tf32=True)
BF16 = Precision("bf16", "bf16", 2.0**-8)
FP16 = Precision("fp16", "fp16", 2.0**-11)
PRECISIONS_OF_FLAGS = {precision.flag: precision for precision in (FP32, BF16, FP16)}  # TF32 has no flag of its own


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Inside, float32 is float32 also in convolutions, which torch otherwise computes in TF32 on a GPU."""
    with FP32.active(nn.Module()):
        yield


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Those that the device computes in."""
    return (FP32, TF32, BF16, FP16) if device.type == "cuda" else (FP32, BF16)


def distance(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference|, on the host in float64."""
    reference = reference.detach().cpu().double()
    difference = found.detach().cpu().double() - reference
    return float(difference.norm() / reference.norm().clamp(min=1e-300))


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """All values in one vector, float64, on the host."""
    return torch.cat([x.detach().cpu().double().flatten() for x in tensors])


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Inside, new tensors are float64 where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def as_double(x: Tensor) -> Tensor:
    """Floating-point tensors in float64, the others as they are."""
    return x.double() if x.is_floating_point() else x
