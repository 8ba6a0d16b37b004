"""`--compile True` in training and sampling: the same numbers as without, and nothing is compiled again once it runs."""

from __future__ import annotations

from typing import Any

import torch

from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.runs.config import SampleConfig

from ..compiling import backend, breaks, graphs
from ..forms import FORMS, TINY, batches, make_generator, make_loop
from ..runner import Stage, Wrong, within
from .arithmetic import distance, no_tf32
from .resume import ROUNDING

WARM_UP, STEPS, CALLS, BATCH = 2, 4, 6, 4
SMALLER_LAST = ("--microbatch", "6")  # 16 = 6 + 6 + 4
LEARNED = ("--schedule_sampler", "loss-second-moment")
TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    **{form: (form, ()) for form in FORMS},
    **{f"{form}, a smaller last part": (form, SMALLER_LAST) for form in ("single", "any")},
    "class_cond, fixed variances, importance sampler": ("class_cond", ("--learn_sigma", "False", *LEARNED)),
}
DRAWN: dict[str, tuple[str, tuple[str, ...], bool, float]] = {  # form, flags, whether a masked image is given, guidance
    "U": ("U", (), False, 1.0),
    "U, own head": ("U", (), True, 1.0),
    "X, guidance": ("X", ("--mt_drop_prob", "0.1"), True, 2.0),
    "label": ("label", (), False, 1.0),
}
# The tests do the others.
ON_CPU = ("single, a smaller last part", "class_cond, fixed variances, importance sampler")
# Of these kernels are made too, which takes longer.
KERNELS = ("X", "any", "label")
DRAWN_KERNELS = ("U, own head", "X, guidance")


def run(stage: Stage) -> None:
    on_gpu = stage.device.type == "cuda"
    for compiler, what, takes in (("inductor", "kernels", 20.0), ("aot_eager", "graphs", 6.0)):
        for name in TRAINED:
            chosen = (
                (name in KERNELS) == (compiler == "inductor") if on_gpu else compiler == "aot_eager" and name in ON_CPU
            )
            if chosen:
                function = lambda name=name, compiler=compiler: training(stage, name, compiler)  # noqa: E731
                stage.check(f"compiled {what}: {name}", function, takes)
        for name in DRAWN:
            chosen = (name in DRAWN_KERNELS) == (compiler == "inductor") if on_gpu else compiler == "aot_eager"
            if chosen:
                function = lambda name=name, compiler=compiler: sampling(stage, name, compiler)  # noqa: E731
                stage.check(f"compiled {what}, every sampler: {name}", function, takes)
    if not on_gpu:
        stage.leave_out("compiled kernels", "needs cuda")


def _refuse_later_graphs(made: dict[str, int]) -> None:
    if made["graphs later"] or not made["graphs"]:
        raise Wrong("graphs were compiled after the warm-up" if made["graphs"] else "nothing was compiled", **made)


def training(stage: Stage, name: str, compiler: str) -> dict[str, Any]:
    """The largest relative difference of a loss, and the graphs made. Raises Wrong where some are made after the warm-up."""
    form, more = TRAINED[name]
    losses = {}
    with backend(compiler), no_tf32():
        for compiled in (False, True):
            loop = make_loop(form, TINY, stage.device, stage.folder / "compiled", "--compile", str(compiled), *more)
            rows = []
            for step, batch in enumerate(batches(loop, STEPS)):
                loop.run_step(batch.to(stage.device))
                rows.append(loop.report_row())
                if step + 1 == WARM_UP:
                    warm = graphs()
            losses[compiled] = torch.tensor([[row["loss"], row["grad_norm"]] for row in rows], dtype=torch.float64)
        made = {"graphs": warm, "graphs later": graphs() - warm, "breaks": breaks()}
    _refuse_later_graphs(made)
    error = ((losses[True] - losses[False]) / losses[False]).abs().max()
    return within(float(error), ROUNDING, **made)


def sampling(stage: Stage, name: str, compiler: str) -> dict[str, Any]:
    """The largest relative difference of what a sampler draws, over all samplers. Raises Wrong where one needs graphs in its second
    batch that it did not need in its first."""
    form, more, given, guidance = DRAWN[name]
    error, later = 0.0, 0
    with backend(compiler), no_tf32():
        loop = make_loop(form, TINY, stage.device, stage.folder / "compiled", *more)
        plain, quick = make_generator(loop), make_generator(loop, "True")
        image = torch.linspace(-1, 1, BATCH * 3 * TINY.image_size**2, device=stage.device)
        known = {"masked": image.view(BATCH, 3, TINY.image_size, TINY.image_size)} if given else {}
        for sampler in SAMPLERS:
            options = SampleConfig(steps=CALLS, sampler=sampler, guidance_scale=guidance)
            wanted, found = (generator.draw(range(BATCH), options, known) for generator in (plain, quick))
            error, warm = max(error, distance(found.x_start, wanted.x_start)), graphs()
            quick.draw(range(BATCH, 2 * BATCH), options, known)
            later += graphs() - warm
        made = {"graphs": graphs() - later, "graphs later": later, "breaks": breaks()}
    _refuse_later_graphs(made)
    return within(error, ROUNDING, samplers=len(SAMPLERS), **made)
