"""The stage `waiting`: no training step and no sampling step makes the host wait for the device.

On a GPU CUDA itself watches; on a CPU `waits.search` looks for the operations that would wait.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from guided_mt.generation.drawing import visited
from guided_mt.runs.config import SampleConfig

from .forms import FORMS, TINY, TINY_DIT, Size, batches, make_generator, make_loop
from .runner import Stage, Wrong
from .waits import Waits, watch, watched_calls

OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{form: (form, ()) for form in FORMS},
    "second-moment timesteps": ("U", ("--schedule_sampler", "loss-second-moment")),
    "fp16": ("U", ("--precision", "fp16")),
    "bf16": ("any", ("--precision", "bf16")),
    "dropout, clipping, mirrored images": ("X", ("--dropout", "0.1", "--grad_clip", "1", "--random_flip", "True")),
    "several parts": ("any", ("--microbatch", "12")),
    "label head E": ("label", ("--mt_label_head", "E", "--classifier_width", "64", "--classifier_depth", "1")),
}
TRANSFORMER = {"transformer, any": "any", "transformer, label": "label"}
ON_CPU = ("single", "U", "any", "second-moment timesteps")  # the tests search the others too
SAMPLERS = ("dpm++", "ddpm", "unipc")
CALLS = 4


def run(stage: Stage) -> None:
    for name, (form, more) in OPTIONS.items():
        if stage.tiny and name not in ON_CPU:
            continue
        function = lambda form=form, more=more: training_step(form, more, stage)  # noqa: E731
        stage.check(f"training step: {name}", function)
    for name, form in TRANSFORMER.items():
        function = lambda form=form: training_step(form, (), stage, TINY_DIT)  # noqa: E731
        stage.check(f"training step: {name}", function)
    for sampler in SAMPLERS[:1] if stage.tiny else SAMPLERS:
        for given in ("nothing", "a label"):
            function = lambda sampler=sampler, given=given: sampling_step(sampler, given == "a label", stage)  # noqa: E731
            stage.check(f"sampling step: {sampler}, {given} given", function)


def training_step(form: str, more: tuple[str, ...], stage: Stage, size: Size = TINY) -> dict[str, Any]:
    """Steps after the first, which fills tables on the device. Raises Wrong for one that waits."""
    loop = make_loop(form, size, stage.device, stage.folder, *more)
    first, *others = batches(loop, 4)
    loop.run_step(first.to(stage.device))
    try:
        for batch in others:
            with watch(stage.device, [batch.indices]):
                loop.run_step(batch.to(stage.device))
    except (Waits, RuntimeError) as error:
        raise Wrong(f"waits: {error}".splitlines()[0]) from error
    return {"steps": len(others)}


def sampling_step(sampler: str, labelled: bool, stage: Stage) -> dict[str, Any]:
    """All between the first and the last call of the network, in a form-U model with labels, by own head where one is given."""
    loop = make_loop("label", TINY, stage.device, stage.folder)
    options = SampleConfig(steps=CALLS, sampler=sampler)
    known = {"label": torch.arange(4, device=stage.device)} if labelled else {}
    generator = make_generator(loop)
    process = visited(generator.process, options, "", ["label"])
    generator.draw(range(4), options, known, process=process)  # fills the process's tables
    generator.network = watched_calls(loop.model, CALLS, functools.partial(watch, stage.device))
    try:
        generator.draw(range(4), options, known, process=process)
    except (Waits, RuntimeError) as error:
        raise Wrong(f"waits: {error}".splitlines()[0]) from error
    finally:
        generator.network.close()
    return {"calls": CALLS}
