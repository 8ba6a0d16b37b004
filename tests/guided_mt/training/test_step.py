"""A training step as one module: compiled it is one graph, never compiled anew, and the same numbers to rounding."""

from __future__ import annotations

import pytest
import tiny_encoder
import torch
from tiny import flags
from torch import distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from guided_mt.data import open_source
from guided_mt.diffusion import random
from guided_mt.diffusion.random import stream_words
from guided_mt.diffusion.resample import create_named_schedule_sampler
from guided_mt.errors import UserError
from guided_mt.generation.build import bind, build_modalities, build_model, run_sections, trained_process
from guided_mt.modalities.weighting.settings import Weighting
from guided_mt.runs.compiling import CUDA_GRAPHS
from guided_mt.runs.config import parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.step import Part, Step
from guided_mt.training.terms.alignment import Alignment
from guided_mt.training.train_loop import TrainLoop

SIZE, CLASSES = 8, 5
tiny_encoder.register()
TINY_RUN = flags(mt_task="none")
TINY = {
    "image_size": SIZE,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "8",
    "num_classes": CLASSES,
    "diffusion_steps": 40,
    "noise_schedule": "cosine",
}
LEARNED = {"learn_sigma": True, "schedule_sampler": "loss-second-moment"}
ROWS = {
    "single, learned variances, classes": {"mt_task": "none", "class_cond": True, **LEARNED},
    "U": {"mt_task": "masked", "mt_variant": "U"},
    "X, at times without": {"mt_task": "masked", "mt_variant": "X", "mt_drop_prob": 0.2},
    "any, two modalities": {"mt_task": "masked,label", "mt_variant": "any", "mt_drop_prob": 0.2, "mt_absent": "label"},
    "U, label M, dropout": {"mt_task": "label", "mt_variant": "U", "dropout": 0.1},
    "U, label E": {"mt_task": "label", "mt_variant": "U", "mt_label_head": "E", "classifier_width": 64},
    "weights that are learned": {
        "mt_task": "label",
        "mt_variant": "U",
        "timestep_weights": "learned",
        "mt_timestep_weights": "min-snr",
        "mt_task_weighting": "uncertainty",
        "schedule_sampler": "stratified",
    },
    "routed": {"mt_task": "label", "mt_variant": "U", "mt_routing": "dtr"},
    "aligned": {"mt_task": "none", "align": "irepa", "align_encoder": "tiny"},
    "any, captions": {"mt_task": "caption", "mt_variant": "any", "mt_drop_prob": 0.2, "mt_absent": "caption"},
    "roles": {"mt_task": "paired", "mt_variant": "any", "mt_swap_prob": 0.5},
}


def make_step(**values) -> Step:
    words = [word for key, value in {**TINY, **values}.items() for word in (f"--{key}", str(value))]
    config = parse(words, run_sections(), description="")
    torch.manual_seed(0)
    modalities = build_modalities(config)
    model = build_model(config, modalities)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    bind(modalities, config, model)
    for name in filter(None, values.get("mt_absent", "").split(",")):
        modalities[name].partly = True
    diffusion = trained_process(config)
    diffusion.prepare(torch.device("cpu"))
    step = Step(
        model,
        config,
        diffusion,
        modalities,
        create_named_schedule_sampler(config.schedule_sampler, diffusion.num_timesteps),
        terms=["mse", *modalities],
        sizes=[f"rms_{name}" for name in modalities if model.variant != "X"],
        side_names=("image", "paired") if "paired" in values["mt_task"] else (),
        weighting=Weighting(config, diffusion),
        alignment=Alignment.of(config, model),
    )
    return step.train()


def part(step: Step, number: int, count: int) -> Part:
    """The samples of one step: other images, classes and positions in each."""
    rng = torch.Generator().manual_seed(number)
    shape = (count, 3 * max(1, len(step.side_names)), SIZE, SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    partly = any(modality.partly for modality in step.modalities.values())
    labels = torch.randint(-1 if partly else 0, CLASSES, (count,), generator=rng)
    captions = {"caption": torch.randint(-1, 9, (count, 16), generator=rng)} if "caption" in step.modalities else {}
    return Part(images, torch.arange(count) + 100 * number, labels, captions, {})


@torch._dynamo.allow_in_graph
def words_at_once(*arguments):
    """A draw's 170 operations as one of the graph. Tracing each would take the time; `one_kernel` is where they are compiled."""
    return stream_words(*arguments)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(random, "stream_words", words_at_once)


@pytest.mark.parametrize("row", ROWS)
def test_a_step_is_one_graph_and_is_compiled_once_for_each_size_of_batch(row, short):
    step = make_step(**ROWS[row])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled_step = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    sizes = (4, 3) if row == "U" else (4,)  # the first step meets both sizes, as its last part may be smaller
    for size in sizes:
        compiled_step(part(step, 0, size))
    assert counter.frame_count == len(sizes)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, size in ((number, size) for number in (1, 2) for size in sizes):
            here = part(step, number, size)
            step.schedule_sampler.update(torch.arange(size), torch.ones(size))
            torch.manual_seed(number)
            expected = step(here)
            torch.manual_seed(number)
            found = compiled_step(here)
            torch.testing.assert_close(found, expected)


def test_several_processes_average_the_gradients_of_the_compiled_step(tmp_path, monkeypatch, short):
    """DistributedDataParallel around the compiled module; Dynamo cuts its graph at the buckets, here of 100 kB."""
    step = make_step(**ROWS["U, label M, dropout"]).eval()
    for number in (0, 1):
        step(part(step, number, 4)).loss.backward()
    expected = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 100_000)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        inside = torch.compile(step, backend=graphs, fullgraph=True, dynamic=False)
        network = DistributedDataParallel(
            inside, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=0.1
        )
        with network.no_sync():
            network(part(step, 0, 4)).loss.backward()
        network(part(step, 1, 4)).loss.backward()
    finally:
        dist.destroy_process_group()
    assert graphs.frame_count > 1  # the pieces between buckets
    torch.testing.assert_close({name: p.grad for name, p in step.named_parameters() if name in expected}, expected)


def test_cuda_graphs_want_whole_batches(tmp_path):
    words = [*TINY_RUN, "--compile", CUDA_GRAPHS, "--microbatch", "3"]
    config = parse(words, run_sections(), description="")
    with pytest.raises(UserError, match="leave out --microbatch"):
        TrainLoop(config, Processes(device=torch.device("cpu")), open_source("builtin:digits"), tmp_path)


def test_the_backward_pass_is_one_graph_with_the_same_gradients():
    """Labels in form U: the encoder's pass through the network, without gradient, is in the same graph."""
    step = make_step(**ROWS["U, label M, dropout"], learn_sigma=True).eval()
    graphs = {"forward": 0, "backward": 0}

    def count(name: str):
        def compiler(graph, inputs):
            graphs[name] += 1
            return graph

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
    compiled_step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    eager: dict[str, torch.Tensor] = {}
    for name, call in (("eager", step), ("compiled", compiled_step)):
        step.zero_grad()
        for number in (0, 1):
            call(part(step, number, 4)).loss.backward()
        gradients = {key: p.grad.clone() for key, p in step.named_parameters() if p.grad is not None}
        eager = eager or gradients
        assert name == "eager" or graphs == {"forward": 1, "backward": 1}
    torch.testing.assert_close(gradients, eager)
