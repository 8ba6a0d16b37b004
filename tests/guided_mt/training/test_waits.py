"""No training step and no sampling step asks the device for a value: on a GPU the host would wait for it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import tiny
import tiny_encoder
import torch

from benchmarks.device.waits import Waits, search, watched_calls
from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.generation.build import build_modalities, check_tasks, complete, open_images, run_sections
from guided_mt.generation.drawing import visited
from guided_mt.generation.generate import Generator
from guided_mt.modalities.registry import TASKS
from guided_mt.runs.config import SampleConfig, parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.optim import Optimizer
from guided_mt.training.train_loop import TrainLoop

tiny_encoder.register()
CALLS = 4
FORMS = ["U", "any"]  # X has no frame, and gives what any gives
SETTINGS = {
    "single": {"mt_task": "none", "grad_clip": 1, "random_flip": True},
    "class-conditional": {"mt_task": "none", "class_cond": True, "num_classes": 10},
    "second moments": {"mt_task": "masked", "schedule_sampler": "loss-second-moment"},
    "weights that are learned": {
        "mt_task": "masked,label",
        "num_classes": 10,
        "timestep_weights": "learned",
        "mt_timestep_weights": "masked=min-snr,label=learned",
        "mt_task_weighting": "uncertainty",
        "schedule_sampler": "stratified",
    },
    "routed": {"mt_task": "label", "num_classes": 10, "mt_routing": "dtr"},
    "aligned": {"mt_task": "masked", "align": "irepa", "align_encoder": "tiny"},
    "a table of encodings": {"mt_task": "label", "num_classes": 10, "mt_encoder_refresh": 100},
    "conditions left out": {"mt_task": "masked,label", "mt_variant": "any", "num_classes": 10, "mt_drop_prob": 0.2},
    "parts, dropout": {"mt_task": "masked", "mt_variant": "X", "microbatch": 6, "dropout": 0.1},
    "head E": {
        "mt_task": "label",
        "mt_label_head": "E",
        "num_classes": 10,
        "classifier_width": 64,
        "classifier_depth": 1,
    },
}


def make_loop(folder, **values) -> TrainLoop:
    """A tiny run whose batch has more images than there are classes, as where a GPU encodes each class once."""
    words = tiny.flags(global_batch_size=10, **values)
    config = parse(words, run_sections(), description="")
    check_tasks(config)
    complete(config)
    return TrainLoop(config, Processes(), open_images(config), folder / "run")


def assert_never_waits(loop: TrainLoop) -> None:
    """The second step and the third: the first fills tables, once in a run."""
    with loop.stream() as stream:
        for _, batch in zip(range(3), stream, strict=False):
            if loop.step == 0:
                loop.run_step(batch.to(loop.device))
                continue
            with search([batch.indices]):
                loop.run_step(batch.to(loop.device))


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("row", TASKS)
def test_a_training_step_of_every_row(row, variant, tmp_path):
    assert_never_waits(make_loop(tmp_path, mt_task=row, mt_variant=variant, **tiny.task_flags(row, tmp_path)))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_step_with(name, tmp_path):
    assert_never_waits(make_loop(tmp_path, **SETTINGS[name]))


def test_the_loss_scale():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([weight], fp16=True, grad_clip=1.0)
    for value in (1.0, float("inf")):
        with search():
            weight.grad = torch.full_like(weight, value)
            optimizer.step(0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loop = make_loop(tmp_path_factory.mktemp("model"), mt_task="masked,label", num_classes=10, mt_drop_prob=0.1)
    loop.model.eval().requires_grad_(False)
    return loop


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampling_step(sampler, given, model):
    options = SampleConfig(steps=CALLS, sampler=sampler, guidance_scale=2.0 if given else 1.0)
    known = {"label": torch.tensor([1, 2])} if given else {}
    generator = Generator(model.config, model.model, build_modalities(model.config, model.model), None)
    process = visited(generator.process, options, "", ["masked", "label"])
    generator.draw([0, 1], options, known, process=process)  # fills the process's tables
    calls = watched_calls(model.model, CALLS, functools.partial(search))
    generator = dataclasses.replace(generator, network=calls)
    try:
        generator.draw([0, 1], options, known, process=process)
    finally:
        calls.close()
    assert calls.seen() == CALLS


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x * torch.tensor(2.0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    ],
)
def test_the_search_finds(wait):
    x = torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(Waits), search():
        wait(x)


def test_the_search_lets_pass():
    x, where = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([2, 0])
    with search([where]):
        where.numpy()
        torch.where(x > 0, x, -x)[where].masked_fill(x[where] > 1, 0).sum()
        torch.nn.functional.one_hot(where, 3)
