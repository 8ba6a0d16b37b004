"""Times of the parents' code and ours, taken in turn on one thread: a ratio within one run, since machines are noisy."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from guided_mt.training.optim import Ema, Optimizer

from .table import Row

BATCH = 8
README: dict[str, Any] = {
    "image_size": 32, "num_channels": 64, "num_res_blocks": 2, "channel_mult": "1,2,2", "attention_resolutions": "16,8",
    "num_head_channels": 32, "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": True,
}  # fmt: skip


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """(how many times as fast ours is, ours in ms, theirs in ms): medians of the rounds, the first left out."""
    taken = []
    for _ in range(rounds + 1):
        row = []
        for step in (ours, theirs):
            started = time.perf_counter()
            step()
            row.append(time.perf_counter() - started)
        taken.append(row)
    own, other = ([row[i] for row in taken[1:]] for i in (0, 1))
    median = statistics.median(b / a for a, b in zip(own, other, strict=True))
    return median, 1000 * statistics.median(own), 1000 * statistics.median(other)


def row(what: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Row:
    times, own, other = ratio(ours, theirs, rounds)
    return Row(what, f"{own:.0f} ms, {other:.0f} ms", f"{times:.2f} times as fast")


def adm(rounds: int) -> list[Row]:
    """Speed of a training step and of a network call."""
    from guided_diffusion.fp16_util import MixedPrecisionTrainer
    from guided_diffusion.nn import update_ema
    from guided_diffusion.script_util import create_model as create

    from guided_mt.diffusion.respacing import create_gaussian_diffusion
    from guided_mt.networks.create import create_model

    from .adm import process
    from .inputs import PROCESS, fill

    network = fill(create(**README)).train()
    own = create_model(**README)
    own.load_state_dict(copy.deepcopy(network.state_dict()))
    own = own.to_fast_layout().train()
    x, t = torch.rand(BATCH, 3, 32, 32) * 2 - 1, torch.randint(1000, (BATCH,))
    noise = torch.randn_like(x)
    trainer = MixedPrecisionTrainer(model=network)
    adamw, averages = (
        torch.optim.AdamW(trainer.master_params, lr=1e-4, weight_decay=0.0),
        copy.deepcopy(trainer.master_params),
    )
    optimizer, ema = Optimizer(own.parameters()), Ema(own, ["0.9999"])
    theirs, ours = process(), create_gaussian_diffusion(**PROCESS)

    def their_step() -> None:
        trainer.zero_grad()
        trainer.backward(theirs.training_losses(network, x, t, noise=noise)["loss"].mean())
        trainer.optimize(adamw)
        update_ema(averages, trainer.master_params, rate=0.9999)

    def our_step() -> None:
        ours.training_losses(own, x, t, noise=noise)["loss"].mean().backward()
        optimizer.step(1e-4)
        ema.update()

    parameters = sum(p.numel() for p in own.parameters()) / 1e6
    size = f"{README['image_size']} px, {parameters:.1f} M parameters, batch {BATCH}"
    return [
        row(f"training step, {size}: ours, theirs", our_step, their_step, rounds),
        row("network call when sampling: ours, theirs", called(own, x, t), called(network, x, t), rounds),
    ]


def ldm(rounds: int) -> list[Row]:
    """Speed of a network call in latents."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel as Theirs

    from latent_mt import UNetModel

    from .inputs import fill

    options = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "attention_resolutions": [2, 4],
        "num_res_blocks": 2, "channel_mult": [1, 2, 2], "num_head_channels": 32,
    }  # fmt: skip
    theirs = fill(Theirs(**options))
    ours = UNetModel(**options)
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(BATCH, 4, 32, 32), torch.randint(1000, (BATCH,))
    return [row("U-Net call: ours, theirs", called(ours.to_fast_layout(), x, t), called(theirs, x, t), rounds)]


def called(network: nn.Module, x: torch.Tensor, t: torch.Tensor) -> Callable[[], Any]:
    network = copy.deepcopy(network).eval().requires_grad_(False)

    def call() -> None:
        with torch.no_grad():
            network(x, t)

    return call
