"""The stage `learns`: twins that differ in their form alone, trained on CIFAR-10, scored after the same seconds and the same steps.

A Frechet distance here is one on the features of other networks than Inception's, so it compares twins with each other and with
nothing published.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8, make_grid, save_png, to_nhwc, to_uint8
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.generation.build import build_modalities
from guided_mt.generation.classification import head_estimates, read_timesteps
from guided_mt.generation.generate import Generator
from guided_mt.generation.masks import make_mask
from guided_mt.generation.restoration import restore
from guided_mt.runs.config import SampleConfig, parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.classifier_loop import ClassifierLoop, classifier_run_sections
from guided_mt.training.train_loop import TrainLoop

from . import flops
from .distances import all_features, efficientnet, kernel_distance, of_classifier
from .fast import synchronize
from .forms import BF16, CLASSES, TINY, TINY_DIT, TWIN, TWIN_DIT, TWIN_FLAGS, Size, make_loop
from .report import ROOT
from .runner import Needs, Stage

# {name: its form, and whether it is a transformer}
TWINS = {form: (form, False) for form in ("single", "X", "any", "label", "class_cond")}
TWINS |= {f"{form}, transformer": (form, True) for form in ("single", "any")}
SECONDS = 70.0  # of training, at most
SCORING_SECONDS, COMPILE_SECONDS = 16.0, 20.0  # of a twin, until the first has told
CLASSIFIER_SECONDS = 15.0
CALLS, BATCH = 20, 500
TINY_STEPS = 5
EQUAL_STEPS = 0.85  # of those of the first twin, which as the single task has the most
RATE = TWIN_FLAGS[TWIN_FLAGS.index("--ema_rate") + 1]


@dataclass
class Contest:
    """What all twins share. features: {network: images uint8 [N, 3, H, W] -> [N, D]}; reference: {network: features}."""

    stage: Stage
    size: Size
    train: Path
    test: Tensor
    test_labels: Tensor
    samples: int
    classifier: nn.Module
    features: dict[str, Callable[[Tensor], Tensor]]
    reference: dict[str, Tensor]
    seconds: float = 0.0  # of training
    equal_steps: int = 0
    scoring: float = SCORING_SECONDS
    trained: list[str] = field(default_factory=list)


def find_cifar10(folder: Path | None) -> dict[str, Path]:
    """{"train", "test": zip, tar or folder} in `folder`, or where a clone keeps it; empty where there is none."""
    for place in (folder,) if folder else (ROOT / ".gpu", ROOT / "data", Path("data")):
        found = {}
        for part in ("train", "test"):
            paths = (place / f"cifar10-{part}{suffix}" for suffix in (".zip", ".tar", ""))
            found[part] = next((path for path in paths if path.exists()), None)
        if all(found.values()):
            return found
    return {}


def run(stage: Stage) -> None:
    if stage.run.warming and stage.run.warming.started:
        stage.measure("networks compiled meanwhile", lambda: stage.run.warming.wait(min(60.0, 0.3 * stage.left())))
    made: list[Contest] = []
    stage.measure("data, classifier and reference features", lambda: prepare(stage, made), 0.0 if stage.tiny else 40.0)
    if not made:
        return
    contest = made[0]
    for number, name in enumerate(TWINS):
        each = stage.left() / (len(TWINS) - number)
        if not contest.seconds:  # the same for all
            free = each - COMPILE_SECONDS - contest.scoring
            contest.seconds = 60.0 if stage.tiny else min(SECONDS, max(10.0, free))
        takes = 1.0 if stage.tiny else contest.seconds + contest.scoring
        stage.measure(f"twin: {name}", lambda name=name: twin(contest, name), takes)


def prepare(stage: Stage, made: list[Contest]) -> dict[str, Any]:
    """Everything that the twins share, appended to `made`. Raises Needs where there is no CIFAR-10."""
    files = stage.run.cifar10
    if not files and not stage.tiny:
        raise Needs("CIFAR-10: --cifar10 FOLDER with cifar10-train.zip and cifar10-test.zip")
    size = TINY if stage.tiny else TWIN
    paths = {"train": "builtin:digits", "test": "builtin:digits-test"} if stage.tiny else files
    train, test = (load_images(open_source(str(paths[part])), size.image_size) for part in ("train", "test"))
    array = stage.folder / "train.npz"  # decoded once for all twins
    np.savez(array, arr_0=train.images.permute(0, 2, 3, 1).numpy(), arr_1=train.labels.numpy())
    classifier, steps = train_classifier(stage, size, array)
    networks: dict[str, Callable[[Tensor], Tensor]] = {"own": of_classifier(classifier, stage.device)}
    with contextlib.suppress(ModuleNotFoundError):
        networks["EfficientNet"] = efficientnet(stage.device)
    if stage.tiny:
        networks.pop("EfficientNet", None)
    samples = 8 if stage.tiny else 10_000
    reference = {name: all_features(network, train.images[:samples]) for name, network in networks.items()}
    test_features = {name: all_features(network, test.images[:samples]) for name, network in networks.items()}
    made.append(Contest(stage, size, array, test.images, test.labels, samples, classifier, networks, reference))
    if stage.tiny:
        made[0].equal_steps = TINY_STEPS - 1
    found: dict[str, Any] = {
        "classifier steps": steps,
        "classifier accuracy": accuracy(made[0], test.images, test.labels),
    }
    if "EfficientNet" not in networks:
        found["EfficientNet"] = "not run: needs its packages" if not stage.tiny else "not run: tiny"
    for name, features in test_features.items():
        found[f"Frechet distance of the test images, {name}"] = frechet(reference[name], features)
    return found


def train_classifier(stage: Stage, size: Size, images: Path) -> tuple[nn.Module, int]:
    """The project's own classifier after some seconds, and its steps: its features know these images."""
    values: dict[str, Any] = {"data_dir": images, "image_size": size.image_size, "num_classes": CLASSES, "lr": 1e-3}
    values |= {"global_batch_size": 16 if stage.tiny else 256, "classifier_width": 64, "classifier_depth": 1}
    values |= {"classifier_attention_resolutions": size.attention, "classifier_pool": "attention", "random_flip": True}
    values |= {"random_crop": False, "noise_schedule": "cosine"}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    config = parse(words, classifier_run_sections(), description="")
    source = open_source(str(images))
    loop = ClassifierLoop(config, Processes(device=stage.device), source, stage.folder / "classifier")
    loop.model.train()
    end = time.monotonic() + CLASSIFIER_SECONDS
    with loop.stream() as stream:
        for batch in stream:
            loop.run_step(batch.to(stage.device))
            if loop.step == 2 if stage.tiny else time.monotonic() > end:
                break
    return loop.model.eval().requires_grad_(False), loop.step


def twin(contest: Contest, twin_name: str) -> dict[str, Any]:
    """Train one, and score it at both ends."""
    stage, (form, is_transformer) = contest.stage, TWINS[twin_name]
    size = contest.size if not is_transformer else TINY_DIT if stage.tiny else TWIN_DIT
    compiled = ("--precision", "fp32") if stage.tiny else BF16
    flags = (*TWIN_FLAGS, *compiled)
    folder = stage.folder / twin_name.replace(", ", "_")
    loop = make_loop(form, size, stage.device, folder, *flags, images=contest.train, trained=False)
    found, early = train_twin(contest, loop)
    found["images seen"] = loop.step * loop.global_batch
    found["PFLOP"] = flops.per_image(form, size) * found["images seen"] / 1e15
    start = time.monotonic()
    ends = {"equal time": loop.ema.averages[RATE]}
    if early is not None:
        ends["equal steps"] = early
        found["equal at step"] = contest.equal_steps
    for name, weights in ends.items():
        if name == "equal steps" and time.monotonic() + contest.scoring / 2 > stage.run.end:
            found["left out"] = "scores at equal steps"
            break
        loop.ema.averages[RATE] = weights
        with loop.ema.slowest_in(loop.model), torch.no_grad():
            found |= {
                f"{name}: {what}": value for what, value in score(contest, loop, form, f"{folder.name}_{name}").items()
            }
    contest.scoring = time.monotonic() - start
    torch._dynamo.reset()  # see fast.training_step
    contest.trained.append(twin_name)
    return found


def train_twin(contest: Contest, loop: TrainLoop) -> tuple[dict[str, Any], list[Tensor] | None]:
    """Train for the contest's seconds, of which the first steps, that compile, are none; the average after the equal steps."""
    device, early, start, first = contest.stage.device, None, time.monotonic(), time.monotonic()
    with loop.stream() as stream:
        for batch in stream:
            loop.run_step(batch.to(device))
            if loop.step <= 2:
                synchronize(device)
                first = time.monotonic()
                continue
            passed = time.monotonic() - first
            if not contest.equal_steps and passed > contest.seconds / 2:
                contest.equal_steps = max(loop.step + 1, int(2 * EQUAL_STEPS * loop.step))
            if loop.step == contest.equal_steps:
                early = [x.clone() for x in loop.ema.averages[RATE]]
            if passed > contest.seconds or (contest.stage.tiny and loop.step >= TINY_STEPS):
                break
    synchronize(device)
    row = loop.report_row()
    seconds = {"compile s": first - start, "train s": time.monotonic() - first, "steps": loop.step}
    return {**seconds, "loss": row["loss"], "skipped steps": int(loop.skipped.total)}, early


def score(contest: Contest, loop: TrainLoop, form: str, end: str) -> dict[str, Any]:
    """Distances of samples to the training images, accuracy and restoration where the form has them; a grid as PNG."""
    generator = Generator(loop.config, loop.model, build_modalities(loop.config, loop.model), None)
    calls = 2 if contest.stage.tiny else CALLS
    settings = SampleConfig(steps=calls)
    start, parts, device = time.monotonic(), [], contest.stage.device
    for seeds in _ranges(contest.samples):
        labels = torch.tensor([s % CLASSES for s in seeds], device=device) if form == "class_cond" else None
        parts.append(to_uint8(generator.draw(seeds, settings, labels=labels).x_start))
        if time.monotonic() > contest.stage.run.end - 10:
            break
    images = torch.cat(parts)
    found: dict[str, Any] = {
        "samples": len(images),
        "drawn per s and call": len(images) * calls / (time.monotonic() - start),
    }
    for name, network in contest.features.items():
        features = all_features(network, images)
        found[f"Frechet distance, {name}"] = frechet(contest.reference[name], features)
        found[f"KID, {name}"] = kernel_distance(contest.reference[name], features)
    if form == "class_cond":
        found["its classes recognised"] = accuracy(contest, images, torch.arange(len(images)) % CLASSES)
    if form in ("label", "any"):
        found["accuracy on test images"] = recognised(contest, generator)
    if form in ("X", "any"):
        found["squared error where masked"], restored = restoration(contest, generator)
        save_png(make_grid(to_nhwc(restored), columns=16), _grid(contest, end, "restored"))
    save_png(make_grid(images[:64].permute(0, 2, 3, 1).cpu().numpy(), columns=16), _grid(contest, end, "samples"))
    return found


def _grid(contest: Contest, end: str, what: str) -> Path:
    return contest.stage.run.out / f"{end.replace(' ', '_')}_{what}.png"


def _ranges(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH):
        yield range(start, min(start + BATCH, count))


def frechet(ours: Tensor, theirs: Tensor) -> float:
    """The Frechet distance of two sets of features [N, D]."""
    from evaluations.scores.metrics import frechet_distance

    fits = [(x.double().mean(dim=0), torch.cov(x.double().T)) for x in (ours, theirs)]
    return frechet_distance(*(x.cpu().numpy() for fit in fits for x in fit))


@torch.no_grad()
def accuracy(contest: Contest, images: Tensor, labels: Tensor) -> float:
    """The share of images uint8 in which the project's own classifier finds the label."""
    device, right = contest.stage.device, 0
    for part, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = contest.classifier(from_uint8(part.to(device)), torch.zeros(len(part), device=device))
        right += int((logits.argmax(dim=1) == wanted.to(device)).sum())
    return right / len(images)


def recognised(contest: Contest, generator: Generator) -> float:
    """The share of test images whose class the model's own label head finds."""
    process, count = generator.process, min(len(contest.test), 4 if contest.stage.tiny else 2000)
    timesteps, right = read_timesteps("", process.num_timesteps, process.aggregation), 0
    for seeds in _ranges(count):
        x = from_uint8(contest.test[seeds.start : seeds.stop].to(contest.stage.device))
        streams = SampleStreams(torch.tensor(seeds), index=Stream.INPUT, device=x.device)
        said = head_estimates(generator.model, process, generator.modalities, x, timesteps, 1, streams)
        right += int((said.argmax(dim=1).cpu() == contest.test_labels[seeds.start : seeds.stop]).sum())
    return right / count


def restoration(contest: Contest, generator: Generator) -> tuple[float, Tensor]:
    """The mean squared error, on [-1, 1], in the right half of test images that are given without it; and some of them, a row each:
    as they are, masked, restored."""
    count, settings = 4 if contest.stage.tiny else 500, SampleConfig(steps=2 if contest.stage.tiny else CALLS)
    x = from_uint8(contest.test[:count].to(contest.stage.device))
    keep = make_mask("half", contest.size.image_size, 1, SampleStreams(torch.arange(count), device=x.device))
    restored = restore("mt", generator, settings, x * keep, keep, range(count))
    error = ((restored - x) ** 2 * (1 - keep)).sum() / ((1 - keep).sum() * x.shape[1])
    if not math.isfinite(float(error)):
        raise ValueError("the restored images are not finite")
    return float(error), torch.cat([part[:16] for part in (x, x * keep, restored)])
