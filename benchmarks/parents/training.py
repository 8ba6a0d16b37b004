"""guided-diffusion's training loop beside ours: the same images, timesteps and noise in every step."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.networks.create import create_model
from guided_mt.training.classifier_loop import ClassifierLoop
from guided_mt.training.ema import Ema
from guided_mt.training.optim import Optimizer, learning_rate
from guided_mt.training.train_loop import TrainLoop as OurLoop

from .adm import process
from .inputs import PROCESS
from .standins import given_normals
from .table import Row, by_choice, number, same

STEPS, LR, RATE = 40, 1e-3, "0.99"
NETWORK: dict[str, Any] = {
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
    "learn_sigma": True,
}  # fmt: skip


def draws() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(images, timesteps, noise) of every step."""
    g = torch.Generator().manual_seed(5)
    shape = (4, 3, 8, 8)
    return [
        (
            torch.rand(shape, generator=g) * 2 - 1,
            torch.randint(1000, (4,), generator=g),
            torch.randn(shape, generator=g),
        )
        for _ in range(STEPS)
    ]


def trained_by_adm(network: nn.Module, anneal_steps: int = 0) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """(weights, averages, learning rate of every step) after STEPS of guided-diffusion's TrainLoop."""
    from guided_diffusion import logger
    from guided_diffusion.train_util import TrainLoop

    class Given:
        def sample(self, count: int, device: Any) -> tuple[Tensor, Tensor]:
            return steps[len(rates)][1], torch.ones(count)

    steps, rates = draws(), []
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        logger.configure(dir=folder, format_strs=[])
        loop = TrainLoop(
            model=network, diffusion=process(), data=itertools.cycle((x, {}) for x, _, _ in steps), batch_size=4,
            microbatch=-1, lr=LR, ema_rate=RATE, log_interval=10**9, save_interval=10**9, resume_checkpoint="",
            schedule_sampler=Given(), lr_anneal_steps=anneal_steps,
        )  # fmt: skip
        step = loop.opt.step

        def noted() -> None:
            rates.append(loop.opt.param_groups[0]["lr"])
            step()

        loop.opt.step = noted
        for x, _, noise in steps:
            with given_normals(noise):
                loop.run_step(x, {})
            loop.step += 1
        logger.reset()
    return [p.detach() for p in network.parameters()], loop.ema_params[0], rates


def trained_by_us(
    network: nn.Module, anneal_steps: int = 0, grad_clip: float = 0.0, lag: int = OurLoop.annealing_lag
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    diffusion, averages = create_gaussian_diffusion(**PROCESS), Ema(network, [RATE])
    optimizer, rates = Optimizer(network.parameters(), grad_clip=grad_clip), []
    for step, (x, t, noise) in enumerate(draws()):
        diffusion.training_losses(network, x, t, noise=noise)["loss"].mean().backward()
        rates.append(learning_rate(step, LR, 0, anneal_steps, lag=lag))
        optimizer.step(rates[-1])
        averages.update()
    return [p.detach() for p in network.parameters()], averages.averages[RATE], rates


def script(name: str) -> Any:
    """A module of guided-diffusion's scripts folder."""
    import guided_diffusion

    file = Path(guided_diffusion.__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def share(ours: list[Tensor], theirs: list[Tensor], start: list[Tensor]) -> float:
    """|ours - theirs| as a share of the way that theirs went."""
    flat = [torch.cat([x.flatten() for x in values]) for values in (ours, theirs, start)]
    return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())


def training() -> list[Row]:
    """Training steps, averages and annealing of image_train.py."""
    from guided_diffusion.script_util import create_model as create

    def both() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        theirs = create(**NETWORK)
        ours = create_model(**NETWORK)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        return theirs, ours.train()

    theirs, ours = both()
    start = [p.detach().clone() for p in theirs.parameters()]
    weights, averages, _ = trained_by_adm(theirs)
    own_weights, own_averages, _ = trained_by_us(ours)
    rows = []
    for what, found, expected in (("weights", own_weights, weights), ("averages", own_averages, averages)):
        part = share(found, expected, start)
        right = part < 0.01  # Adam divides by the gradients' size: rounding of the smallest ones grows
        rows.append(
            Row(
                f"{STEPS} training steps: {what}, share of the way",
                number(part),
                "same" if right else "DIFFERS",
                not right,
            )
        )
    clipped, _, _ = trained_by_us(both()[1], grad_clip=1.0)
    rows.append(
        by_choice(
            "the same with `--grad_clip 1`, as our presets have it",
            share(clipped, weights, start),
            "a choice of the presets",
        )
    )
    theirs, ours = both()
    weights, _, rates = trained_by_adm(theirs, STEPS)
    own_weights, _, own_rates = trained_by_us(ours, STEPS)
    rows.append(
        same(f"`--lr_anneal_steps {STEPS}`: the learning rate of every step", own_rates, rates, tolerance=1e-12)
    )
    part = share(own_weights, weights, start)
    rows.append(
        Row("... and the weights, share of the way", number(part), "same" if part < 0.01 else "DIFFERS", part >= 0.01)
    )
    optimizer, theirs_classifier = torch.optim.SGD([torch.zeros(1)], lr=LR), []
    for step in range(STEPS):
        script("classifier_train").set_annealed_lr(optimizer, LR, step / STEPS)
        theirs_classifier.append(optimizer.param_groups[0]["lr"])
    own = [learning_rate(step, LR, 0, STEPS, lag=ClassifierLoop.annealing_lag) for step in range(STEPS)]
    rows.append(
        same("`classifier_train.py --anneal_lr True`: the learning rate", own, theirs_classifier, tolerance=1e-12)
    )
    return rows
