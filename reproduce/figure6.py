"""Figure 6 of the paper: a noisy classifier fine-tuned from a jointly trained model (head E), against one trained from scratch.

    mt-diffusion figure6 --joint RUN --data_dir TRAIN --val_data_dir HELD_OUT --out DIR --iterations 2000

Both are trained by classifier-train with the same seed, images, batches and noise, into OUT/finetuned/seed_S and
OUT/scratch/seed_S; flags that are not listed here go to it. At step 0 and every --eval_interval steps they classify the same
held-out images with the same noise, at timesteps drawn uniformly. Run again, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluations.classification import score_file, write_csv
from evaluations.errors import EvaluationError
from evaluations.tables.curves import common_curve, describe, first_at_least, plot_curves
from guided_mt.commands import classifier_train
from guided_mt.commands.console import run, split_flags
from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8, save_npz
from guided_mt.data.subset import spread
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError, how_to_install, nearest
from guided_mt.generation.classification import noised_probabilities
from guided_mt.generation.noisy_classifier import build_classifier, build_process, find_classifier, load_classifier
from guided_mt.runs.checkpoint import checkpoint_step, checkpoints, differing_keys, read_classes, read_config
from guided_mt.runs.config import Config, option, parse
from guided_mt.runs.distributed import choose_device
from guided_mt.runs.processes.claim import Claim
from guided_mt.training.classifier_loop import VALIDATION, classifier_run_sections

from .children import run_child
from .commands import command, shown
from .seeds import training_seeds

SERIES = {"finetuned": "fine-tuned from the joint model", "scratch": "from scratch"}
SET_HERE = ("log_dir", "resume_checkpoint", "seed", "save_interval", "keep_checkpoints", "total_steps")
MAY_CHANGE = ("total_steps", "global_batch_size", "device", "data_workers", "log_interval", "dry_run")  # of a run
BATCH = 64  # held-out images per forward pass


@dataclass
class Figure6Config:
    """Figure 6. Other flags are those of classifier-train, and are the same for both"""

    joint: str = option("", "the jointly trained model: a run with --mt_task label --mt_label_head E")
    data_dir: str = option("", "images with classes to train on")
    val_data_dir: str = option("", "held-out images with the same classes")
    out: str = option("runs/figure6", "folder of all runs, figure6.csv and figure6.png")
    iterations: int = option(2000, "training steps of each classifier", least=1)
    eval_interval: int = option(100, "steps between points of the curves; a checkpoint is kept for each", least=1)
    seeds: str = option("0,1,2", "seeds of the training runs; the figure shows their mean and range")
    val_images: int = option(1000, "held-out images per point, spread evenly over the data", least=1)
    val_draws: int = option(4, "timesteps and noises per held-out image", least=1)
    device: str = option("", "cpu, cuda, cuda:1 ...; empty: a GPU if there is one")
    dry_run: bool = option(False, "print the commands, then stop")


class HeldOut(NamedTuple):
    """Images uint8 [N, 3, H, W], the name of each one's class, and their numbers in the data [N]."""

    images: torch.Tensor
    classes: list[str]
    numbers: torch.Tensor


def main(argv: Sequence[str]) -> None:
    """Train, classify and draw as `argv` says. Raises UserError, also where matplotlib is missing."""
    if find_spec("matplotlib") is None:  # said before hours of training, without the seconds of importing it
        raise UserError(f"the figure needs matplotlib: {how_to_install('matplotlib')}")
    made = train_and_classify(argv)
    try:
        if made is not None:
            draw(*made)
    except EvaluationError as error:  # such as the NaN of a diverged classifier
        raise UserError(str(error)) from None


def console() -> None:
    """The script's door."""
    run(main)


def train_and_classify(argv: Sequence[str]) -> tuple[Path, dict[str, list[list[Path]]]] | None:
    """Train by classifier-train; write probabilities and labels to OUT/SERIES/seed_S/held_out/step_N.npz.

    Returns OUT and {series: for each seed its files by step}; None with --dry_run. Raises UserError.
    """
    config, passed_on = read_flags(argv)
    weights, network = find_classifier(config.joint, "none", flag="--joint")
    flags = {
        (name, seed): training_flags(config, network, name, seed, passed_on)
        for seed in training_seeds(config.seeds)
        for name in SERIES
    }
    for (name, seed), words in flags.items():  # all is checked before the first is run
        refuse_other_settings(folder(config, name, seed), classifier_train.resolve(words)[0])
    held_out = load_held_out(config, read_classes(weights.parent), network.image_size)
    written: dict[str, list[list[Path]]] = {name: [] for name in SERIES}
    with contextlib.nullcontext() if config.dry_run else Claim(Path(config.out), setting="--out"):
        for (name, seed), words in flags.items():
            train(command("classifier-train", *words), config.dry_run)
            if not config.dry_run:
                written[name].append(classify_held_out(config, network, held_out, name, seed))
    return None if config.dry_run else (Path(config.out), written)


# ---------------------------------------------------------------- flags and files


def read_flags(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Our own flags, and the words to pass on. Raises UserError for missing ones, and those that are set here."""
    typed, passed_on = split_flags(argv, [field.name for field in fields(Figure6Config)])
    config = parse([*typed, *(w for w in passed_on if w in ("-h", "--help"))], (Figure6Config,), description=__doc__)
    for flag in ("joint", "data_dir", "val_data_dir"):
        if not getattr(config, flag):
            raise UserError(f"--{flag} is missing: {Figure6Config.__dataclass_fields__[flag].metadata['help']}")
    if clash := split_flags(passed_on, SET_HERE)[0]:
        raise UserError(f"{clash[0].partition('=')[0]} is set by figure6, from its --out, --seeds and --iterations")
    theirs = [field.name for section in classifier_run_sections() for field in fields(section)]
    unknown = [word for word in split_flags(passed_on, theirs)[1] if word.startswith("--")]
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [*theirs, *(field.name for field in fields(Figure6Config))]
        raise UserError(f"unknown flag {name}{nearest(name[2:], known)}; --help and classifier-train --help list all")
    return config, passed_on


def load_held_out(config: Config, classes: Sequence[str] | None, image_size: int) -> HeldOut:
    """The validation images, evenly spaced and cropped at the centre. Raises UserError where they have no classes."""
    source = open_source(config.val_data_dir, class_names=classes)
    if source.labels is None:
        raise UserError(
            f"--val_data_dir {config.val_data_dir}: has no classes (sub-folders, names like CLASS_0001.png, or arr_1 in an "
            f".npz): {source.without_class()} has none"
        )
    chosen = spread(source, config.val_images)
    loaded = load_images(chosen, image_size)
    names = [source.class_names[label] for label in loaded.labels]
    return HeldOut(loaded.images, names, torch.from_numpy(chosen.numbers)[loaded.indices])


# ---------------------------------------------------------------- training


def folder(config: Config, name: str, seed: int) -> Path:
    """The run folder of a curve's seed."""
    return Path(config.out) / name / f"seed_{seed}"


def training_flags(config: Config, network: Config, name: str, seed: int, passed_on: Sequence[str]) -> list[str]:
    """The flags of classifier-train. The network is that of the joint model in both series."""
    settings = {key: value for key, value in network.as_dict().items() if key != "timestep_respacing"}
    settings["grad_clip"] = 1.0  # another one may be passed on
    last = {"data_dir": config.data_dir, "total_steps": config.iterations, "save_interval": config.eval_interval}
    last |= {"seed": seed, "log_dir": folder(config, name, seed), "device": config.device, "keep_checkpoints": 0}
    if name == "finetuned":
        last["resume_checkpoint"] = config.joint
    return [*as_words(settings), *passed_on, *as_words(last)]


def as_words(settings: Mapping[str, object]) -> list[str]:
    """Settings by name as words of a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def refuse_other_settings(run_folder: Path, config: Config) -> None:
    """Raises UserError where the folder holds a run with other flags: a finished run is not trained again."""
    free = {"lr_anneal_steps", *MAY_CHANGE[1:]} if config.anneal_lr else set(MAY_CHANGE)
    wanted = {key: value for key, value in config.as_dict().items() if key not in free}
    different = differing_keys(read_config(run_folder / "config.yaml") or {}, wanted)
    if different and checkpoints(run_folder):
        raise UserError(f"{run_folder}: was trained with other settings: {', '.join(different)}; take another --out")


def train(line: Sequence[str], dry_run: bool) -> None:
    """Run the command, which resumes; ends this program with its exit code where it fails."""
    print("$", shown(line), flush=True)
    code = 0 if dry_run else run_child(line)
    if code:
        sys.exit(code)


# ---------------------------------------------------------------- held-out images


def classify_held_out(config: Config, network: Config, held_out: HeldOut, name: str, seed: int) -> list[Path]:
    """One file for step 0, and one for every checkpoint of a run."""
    device, where_to = choose_device(config.device), folder(config, name, seed)
    reached = [c for c in checkpoints(where_to) if checkpoint_step(c) <= config.iterations]
    classes, diffusion, files = read_classes(reached[0]), build_process(network), []
    for step, where in [(0, None), *((checkpoint_step(c), c) for c in reached)]:
        if where is None and name == "scratch":
            torch.manual_seed(seed)  # as the run began
            classifier = build_classifier(network).to(device).eval()
        else:
            classifier = load_classifier(str(where or config.joint), ema="none", device=device).model
        found = noised(classifier, diffusion, held_out, classes, config.val_draws, device)
        files.append(where_to / "held_out" / f"step_{step:08d}.npz")
        save_npz(files[-1], {**found, "step": np.array(step)})
    return files


def noised(
    classifier: Callable,
    diffusion: GaussianDiffusion,
    held_out: HeldOut,
    classes: Sequence[str],
    draws: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """probabilities [N * draws, K] and labels of the held-out images, noised `draws` times, the same for every classifier."""
    absent = set(held_out.classes) - set(classes)
    if absent:
        raise UserError(f"--val_data_dir: has the class '{min(absent)}', which --data_dir lacks; leave it out")
    ids = np.array([classes.index(name) for name in held_out.classes])
    probabilities, labels = [], []
    for rows in np.split(np.arange(len(ids)), range(BATCH, len(ids), BATCH)):
        streams = SampleStreams(VALIDATION, held_out.numbers[rows], device=device)
        x_start = from_uint8(held_out.images[rows].to(device))
        for _ in range(draws):
            probabilities.append(noised_probabilities(classifier, diffusion, x_start, streams).cpu().numpy())
            labels.append(ids[rows])
    return {"probabilities": np.concatenate(probabilities), "labels": np.concatenate(labels)}


# ---------------------------------------------------------------- table and figure


def draw(out: Path, files: Mapping[str, Sequence[Sequence[Path]]]) -> None:
    """The table, the figure and what they say; files: per series and seed, one by step."""
    results, curves = [], {}
    for name, runs in files.items():
        scored = [[score_file(str(path.parents[1].relative_to(out)), path) for path in seed] for seed in runs]
        results += [result for seed in scored for result in seed]
        curves[SERIES[name]] = common_curve([{r.step: r.scores.top1 for r in seed} for seed in scored])
    write_csv(results, out / "figure6.csv")
    plot_curves(curves, out / "figure6.png", "top-1 accuracy, noised held-out images")
    for name, curve in curves.items():
        print(describe(name, curve))
    tuned, scratch = curves.values()
    step = first_at_least(tuned, scratch.mean[-1])
    reached = "does not reach it" if step is None else f"reaches it at step {step}"
    print(f"the last accuracy from scratch is {scratch.mean[-1]:.4f}; fine-tuning {reached}")
    print(f"{out / 'figure6.csv'}, {out / 'figure6.png'}: of noised held-out images")
