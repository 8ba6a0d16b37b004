"""One step of the optimiser on given gradients, against AdamW in float64: clipping, the fp16 scale, skipped steps, averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from guided_mt.training.ema import Ema
from guided_mt.training.optim import Optimizer

from ..runner import Stage, Wrong, within
from .arithmetic import FLOAT32, distance, joined

STEPS, LR, DECAY, CLIP, RATE = 3, 1e-3, 0.01, 1.0, "0.9"
BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults, which are ADM's


def run(stage: Stage) -> None:
    for fp16 in (False, True):
        name = "fp16 with its loss scale" if fp16 else "fp32"
        stage.check(f"optimiser: three steps, {name}", lambda fp16=fp16: steps(stage.device, fp16))
    stage.check("optimiser: a gradient that is not finite changes nothing", lambda: skips(stage.device))


def _network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(16, 5))
    return layers.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)


def _gradients(network: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in network.parameters()]


def steps(device: torch.device, fp16: bool) -> dict[str, Any]:
    """Weights and averages after some steps."""
    network = _network(device)
    optimizer = Optimizer(network.parameters(), weight_decay=DECAY, grad_clip=CLIP, fp16=fp16)
    ema, weights = Ema(network, [RATE]), [p.detach().cpu().double() for p in network.parameters()]
    average = [w.clone() for w in weights]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    norms = 0.0
    for step in range(1, STEPS + 1):
        gradients = _gradients(network, step)
        scale = float(torch.exp2(optimizer.log2_scale))
        for p, gradient in zip(network.parameters(), gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(gradient * scale)
        norm = optimizer.step(LR)
        ema.update()
        true = float(joined(gradients).norm())
        norms = max(norms, abs(float(norm) - true) / true)
        for k, gradient in enumerate(gradients):  # Loshchilov and Hutter 2019, algorithm 2
            g = gradient.double() / max(1.0, true / CLIP)
            first[k] = BETAS[0] * first[k] + (1 - BETAS[0]) * g
            second[k] = BETAS[1] * second[k] + (1 - BETAS[1]) * g**2
            m, v = first[k] / (1 - BETAS[0] ** step), second[k] / (1 - BETAS[1] ** step)
            weights[k] = weights[k] * (1 - LR * DECAY) - LR * m / (v.sqrt() + EPS)
            average[k] = float(RATE) * average[k] + (1 - float(RATE)) * weights[k]
    found = {"norm": norms, "averages": distance(joined(ema.averages[RATE]), joined(average))}
    # Each step moves a weight by about the rate, which is known to a few roundings; the weight itself is rounded too.
    error = distance(joined(network.parameters()), joined(weights))
    return within(max(error, *found.values()), 32 * FLOAT32, weights=error, **found)


def skips(device: torch.device) -> dict[str, Any]:
    """Weights, moments and the loss scale after a gradient with an infinity in it."""
    network = _network(device)
    optimizer = Optimizer(network.parameters(), fp16=True)
    before = joined(network.parameters())
    for p, gradient in zip(network.parameters(), _gradients(network, 1), strict=True):
        p.grad = torch.empty_like(p).copy_(gradient)
    next(network.parameters()).grad[(0,) * next(network.parameters()).ndim] = float("inf")
    scale = float(optimizer.log2_scale)
    optimizer.step(LR)
    fell = scale - float(optimizer.log2_scale)
    if not torch.equal(before, joined(network.parameters())) or fell != 1 or float(optimizer.skipped.total) != 1:
        raise Wrong("the step was not skipped, or the loss scale did not halve", halvings=fell)
    return {"halvings": fell}
