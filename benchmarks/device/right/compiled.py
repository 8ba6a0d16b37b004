"""`--compile True`: the same losses as without, and nothing is compiled again once it runs."""

from __future__ import annotations

from typing import Any

import torch

from ..compiling import backend, breaks, graphs
from ..forms import FORMS, TINY, batches, make_loop
from ..runner import Stage, Wrong, within
from .arithmetic import no_tf32
from .resume import ROUNDING

WARM_UP, STEPS = 2, 4
SMALLER_LAST = ("--microbatch", "6")  # 16 = 6 + 6 + 4
INDUCTOR = ("X", "any", "label")  # of which kernels are made too, which takes longer


def run(stage: Stage) -> None:
    for form in FORMS:
        for name, more in ((form, ()), (f"{form}, a smaller last part", SMALLER_LAST)):
            if more and form not in ("single", "any"):
                continue
            function = lambda form=form, more=more: compare(stage, form, "aot_eager", *more)  # noqa: E731
            stage.check(f"compiled graphs: {name}", function, 6.0)
    for form in INDUCTOR:
        if stage.device.type == "cuda":
            stage.check(f"compiled kernels: {form}", lambda form=form: compare(stage, form, "inductor"), 20.0)
        else:
            stage.leave_out(f"compiled kernels: {form}", "needs cuda")


def compare(stage: Stage, form: str, compiler: str, *more: str) -> dict[str, Any]:
    """The largest relative difference of a loss, and the graphs made. Raises Wrong where some are made after the warm-up."""
    folder = stage.folder / "compiled"
    losses = {}
    with backend(compiler), no_tf32():
        for compiled in (False, True):
            loop = make_loop(form, TINY, stage.device, folder, "--compile", str(compiled), *more)
            rows = []
            for step, batch in enumerate(batches(loop, STEPS)):
                loop.run_step(batch.to(stage.device))
                rows.append(loop.report_row())
                if step + 1 == WARM_UP:
                    warm = graphs()
            losses[compiled] = torch.tensor([[row["loss"], row["grad_norm"]] for row in rows], dtype=torch.float64)
        made = {"graphs": warm, "graphs later": graphs() - warm, "breaks": breaks()}
    if made["graphs later"] or not made["graphs"]:
        raise Wrong("graphs were compiled after the warm-up" if made["graphs"] else "nothing was compiled", **made)
    error = ((losses[True] - losses[False]) / losses[False]).abs().max()
    return within(float(error), ROUNDING, **made)
