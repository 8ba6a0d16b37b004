"""The main job on real images without a download: train on scikit-learn's digits, restore held-out ones, draw new ones.

    mt-diffusion demo
    mt-diffusion demo --run runs/longer --steps 4000

A first training learns to fill masked images. From its weights a second one learns labels beside them: it names digits, draws
the digit of a label, and shows in one picture what it makes of every subset of what it can be given. Both are of form any. The
demo runs the same commands as any training does. Interrupted or run again, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from guided_mt.commands import classify, restore, sample
from guided_mt.commands.console import run
from guided_mt.data.images import make_grid, save_npz, save_png
from guided_mt.errors import UserError, how_to_install
from guided_mt.runs.checkpoint import checkpoint_step, checkpoints
from guided_mt.runs.config import load_preset, option, parse

from .. import subsets
from . import numbers
from .training import LOG, draw_curve, train

PRESET, SECOND = "demo-digits", "demo-digits-label"
HELD_OUT = "builtin:digits-test"
CALLS = 20  # network calls per sample: as good as 250 (docs/sampling.md)
STEPS_PER_MINUTE = 400  # of training, on two idle cores
RESTORED, FROM_NOTHING, NAMED, PER_LABEL, COLUMNS = 120, 64, 360, 12, 10


@dataclass
class DemoConfig:
    """The demo"""

    run: str = option("runs/demo", "run folder")
    steps: int = option(
        load_preset(PRESET)["total_steps"],
        "steps of the first training, to which those of the second are in proportion; more than before trains on from there",
        least=1,
    )
    processes: int = option(
        1, "training processes, started by mpiexec where there is one; one uses all cores too", least=1
    )


@dataclass(frozen=True)
class Training:
    """One of the two trainings, and what is drawn from it."""

    preset: str
    run: Path
    steps: int

    @property
    def weights(self) -> Path:
        """The checkpoint folder of its last step."""
        return self.run / "checkpoints" / f"step_{self.steps:08d}"

    @property
    def curve(self) -> Path:
        """The picture of its losses."""
        return self.run / "training_curve.png"

    def named(self, name: str, suffix: str = ".npz") -> Path:
        """The file of what was drawn with its last weights."""
        return self.run / "samples" / f"{name}_{self.steps}{suffix}"


def main(argv: Sequence[str]) -> None:
    """Train on digits, restore and name held-out ones, draw new ones, and say how good they are. Raises UserError."""
    config = parse(argv, (DemoConfig,), description=__doc__)
    if find_spec("matplotlib") is None:  # said before minutes of training
        raise UserError(f"the training curve needs matplotlib: {how_to_install('matplotlib')}")
    started, (first, second) = time.monotonic(), trainings(Path(config.run), config.steps)
    minutes = 1 + round((first.steps + second.steps) / STEPS_PER_MINUTE)
    print(f"MT-Diffusion on scikit-learn's handwritten digits: about {minutes} minutes on two idle CPU cores.")
    print(f"Ctrl-C stops it, and the same command goes on from there. Everything is in {first.run}.")
    try:
        restore_digits(first, config.processes)
        add_labels(first, second, config.processes)
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        sys.exit(130)
    print(f"\nDone in {time.monotonic() - started:.0f} s. {next_steps(first, second)}")


def trainings(run: Path, steps: int) -> tuple[Training, Training]:
    """Masked images alone, and with labels beside them."""
    share = load_preset(SECOND)["total_steps"] / load_preset(PRESET)["total_steps"]
    return Training(PRESET, run, steps), Training(SECOND, run / "label", max(1, round(share * steps)))


def restore_digits(first: Training, processes: int) -> None:
    """The first half: masked images. Raises UserError."""
    say(
        f"1/4  Training on images and masked images, {first.steps} steps: form any, which is nearly always given the masked image."
    )
    train_once(first, processes)
    say(f"2/4  Restoring {RESTORED} digits that it has never seen, with ten patches masked.")
    data = ["--data_dir", HELD_OUT, "--mask", "patches:10", "--num_samples", RESTORED]
    run_once(first, "restore", restore.main, "restored", *data, "--steps", CALLS, "--batch_size", 60)
    print(numbers.restoration(first.named("restored")))


def add_labels(first: Training, second: Training, processes: int) -> None:
    """The second half: a label beside the mask, from the weights of the first. Raises UserError."""
    say(f"3/4  Training with labels too, {second.steps} steps from these weights: given any subset of mask and label.")
    train_once(second, processes, "--resume_checkpoint", str(first.weights))
    say("4/4  Naming held-out digits, drawing new ones: from nothing, of a label, and from every subset.")
    data = ["--data_dir", HELD_OUT, "--num_samples", NAMED, "--draws", 1]
    run_once(second, "classify", classify.main, "named", *data, pictures=[])
    labels = second.run / "samples" / "labels.npz"
    save_npz(labels, {"labels": np.tile(np.arange(10), PER_LABEL)})
    given = ["--given", f"label={labels}", "--num_samples", 10 * PER_LABEL, "--steps", CALLS, "--batch_size", 60]
    if run_once(second, "sample", sample.main, "of_labels", *given):
        with np.load(second.named("of_labels"), allow_pickle=False) as arrays:
            save_png(make_grid(arrays["arr_0"], columns=10), second.named("of_labels", ".png"))
    count = ["--num_samples", FROM_NOTHING, "--steps", CALLS, "--batch_size", 64]
    run_once(second, "sample", sample.main, "samples", *count)
    items = ["--data_dir", HELD_OUT, "--num_samples", COLUMNS, "--each_class", True, "--steps", CALLS]
    run_once(second, "subsets", subsets.main, "subsets", *items, arrays=[])
    print(numbers.labels(second.named("named"), second.named("of_labels"), first.named("restored")))


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}", flush=True)


def train_once(training: Training, processes: int, *more: str) -> None:
    """Train to the last step, unless that is done, and draw the curve. Raises UserError."""
    if not training.weights.is_dir():
        reached = max(map(checkpoint_step, checkpoints(training.run)), default=0)
        if reached > training.steps:
            raise UserError(
                f"{training.run}: was trained for {reached} steps, more than {training.steps}; raise --steps, or take another --run"
            )
        train(training.preset, training.run, training.steps, processes, *more)
        training.curve.unlink(missing_ok=True)
        if not training.weights.is_dir():
            raise UserError("the training was stopped before its last step; the same command goes on from there")
    if not training.curve.exists():
        draw_curve(training.run / "progress.csv", training.curve)


def run_once(
    training: Training,
    name: str,
    command: Callable[[Sequence[str]], object],
    out: str,
    *options: object,
    arrays: Sequence[str] = (".npz",),
    pictures: Sequence[str] = (".png",),
) -> bool:
    """Run a command on the trained weights that writes `out` with these suffixes, unless all is there; returns whether it ran.

    What it prints goes to the log; its progress and its warnings to the terminal.
    """
    wanted = [training.named(out, suffix) for suffix in (*arrays, *pictures)]
    argv = [str(word) for word in ("--model_path", training.weights, "--out", wanted[0], *options)]
    print("$ mt-diffusion", name, *argv, flush=True)
    if all(file.exists() for file in wanted):
        return False
    with open(training.run / LOG, "a") as log, contextlib.redirect_stdout(log):
        command(argv)
    return True


def next_steps(first: Training, second: Training) -> str:
    """What to open and what to type."""
    pictures = {
        first.named("restored", ".png"): "held-out digits: original, masked, restored",
        second.named("subsets", ".png"): "held-out digits: drawn from nothing, masked image, label, both",
        second.named("of_labels", ".png"): "a column per given label, 0 to 9",
        second.named("samples", ".png"): "digits drawn from nothing, and the mean of what their masked images may be",
        first.curve: "the losses of the first training",
    }
    typed = {
        f"mt-diffusion sample --model_path {second.run} --given label=3 --num_samples 16": "sixteen threes",
        f"mt-diffusion restore --model_path {first.run} --data_dir {HELD_OUT} --mask half": "the right half is missing",
        f"mt-diffusion train --preset {PRESET} --data_dir FOLDER --log_dir runs/mine": "your own images",
        f"make demo STEPS={2 * first.steps}": "train on from here, for better digits",
    }
    activate = Path(sys.executable).parent / "activate"
    start = [f"  source {shown_path(activate)}"] if activate.exists() else []
    opened, commands = columns(pictures, ""), columns(typed, "# ")
    return "\n".join(["Open:", *opened, "Type next:", *start, *commands])


def columns(lines: Mapping[object, str], before: str) -> list[str]:
    """Each key and, from one column on, what it is."""
    width = max(len(str(key)) for key in lines)
    return [f"  {key!s:{width}s}  {before}{text}" for key, text in lines.items()]


def shown_path(path: Path) -> Path:
    """Relative to the working directory where it lies inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def console() -> None:
    """The script's door."""
    run(main)
