"""The main job on real images without a download: train on scikit-learn's digits, restore held-out ones, draw new ones.

    python scripts/demo.py [--run runs/demo] [--steps 1600] [--processes 2]

One small model of images, masked images and labels learns every conditional at once. It restores digits that it has never seen,
names them, draws the digit of a label, and shows in one picture what it makes of every subset of what it can be given. It runs the
same commands as any training does. Interrupted or run again, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from guided_mt.commands import classify, restore, sample
from guided_mt.commands.console import run
from guided_mt.data.images import save_npz
from guided_mt.errors import UserError
from guided_mt.runs.config import load_preset, option, parse

from .. import subsets
from . import numbers
from .training import draw_curve, train

PRESET = "demo-digits"
HELD_OUT = "builtin:digits-test"
CALLS = 20  # network calls per sample: as good as 250 (docs/sampling.md)
RESTORED, NAMED, FROM_NOTHING, PER_LABEL, COLUMNS = 120, 360, 64, 12, 10


@dataclass
class DemoConfig:
    """The demo"""

    run: str = option("runs/demo", "run folder")
    steps: int = option(
        load_preset(PRESET)["total_steps"], "training steps; more than before trains on from there", least=1
    )
    processes: int = option(2, "training processes, started by mpiexec where there is one", least=1)


@dataclass(frozen=True)
class Files:
    """What the demo writes into its run."""

    run: Path
    steps: int

    @property
    def weights(self) -> Path:
        return self.run / "checkpoints" / f"step_{self.steps:08d}"

    def named(self, name: str) -> Path:
        return self.run / "samples" / f"{name}_{self.steps}"

    @property
    def curve(self) -> Path:
        return self.run / "training_curve.png"

    @property
    def log(self) -> Path:
        return self.run / "demo_log.txt"


def main(argv: Sequence[str]) -> None:
    config = parse(argv, (DemoConfig,), description=__doc__)
    if find_spec("matplotlib") is None:  # said before minutes of training
        raise UserError("the training curve needs matplotlib: pip install -e '.[plots]'")
    files, started = Files(Path(config.run), config.steps), time.monotonic()
    print(
        "MT-Diffusion on scikit-learn's handwritten digits: about five minutes on two idle CPU cores, nothing to download."
    )
    print(f"Ctrl-C stops it; the same command goes on from there. Everything is in {files.run}.")
    try:
        stages(files, config.processes)
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and the same command goes on from there", file=sys.stderr, flush=True)
        sys.exit(130)
    print(f"\nDone in {time.monotonic() - started:.0f} s. {next_steps(files)}")


def stages(files: Files, processes: int) -> None:
    """All that the demo does, each part only where its files are missing. Raises UserError."""
    say(f"1/4  Training: {files.steps} steps of one network for images, masked images and labels.")
    if not files.weights.is_dir():
        train(PRESET, files.run, files.steps, processes, files.log)
        files.curve.unlink(missing_ok=True)
        if not files.weights.is_dir():
            raise UserError("the training was stopped before its last step; the same command goes on from there")
    if not files.curve.exists():
        draw_curve(files.run / "progress.csv", files.curve)

    say(f"2/4  Restoring {RESTORED} digits that it has never seen, with ten patches masked.")
    restored = files.named("restored")
    options = ["--data_dir", HELD_OUT, "--mask", "patches:10", "--num_samples", RESTORED]
    make(files, "restore", restore.main, restored, *options, "--steps", CALLS, "--batch_size", 60)
    print(numbers.restoration(restored.with_suffix(".npz")))

    say("3/4  Labels: naming held-out digits, and drawing the digit of a given label.")
    named, drawn = files.named("named"), files.named("of_labels")
    options = ["--data_dir", HELD_OUT, "--num_samples", NAMED, "--draws", 1]
    make(files, "classify", classify.main, named, *options, picture=False)
    labels = files.run / "samples" / "labels.npz"
    save_npz(labels, {"labels": np.tile(np.arange(10), PER_LABEL)})
    options = ["--given", f"label={labels}", "--num_samples", 10 * PER_LABEL, "--steps", CALLS, "--batch_size", 60]
    make(files, "sample", sample.main, drawn, *options)
    print(numbers.labels(named.with_suffix(".npz"), drawn.with_suffix(".npz"), restored.with_suffix(".npz")))

    say(f"4/4  Drawing {FROM_NOTHING} digits from nothing, and {COLUMNS} from every subset of what can be given.")
    options = ["--num_samples", FROM_NOTHING, "--steps", CALLS, "--batch_size", 64]
    make(files, "sample", sample.main, files.named("samples"), *options)
    options = ["--data_dir", HELD_OUT, "--num_samples", COLUMNS, "--each_class", True, "--steps", CALLS]
    make(files, "subsets", subsets.main, files.named("subsets"), *options, array=False)


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def make(
    files: Files,
    name: str,
    command: Callable[[Sequence[str]], object],
    out: Path,
    *options: object,
    array: bool = True,
    picture: bool = True,
) -> None:
    """Run a command that writes OUT.npz (with `array`) and OUT.png (with `picture`), unless they are there.

    What it prints goes to the log; its progress and its warnings to the terminal.
    """
    wanted = [out.with_suffix(suffix) for suffix, made in ((".npz", array), (".png", picture)) if made]
    words = ["--model_path", files.weights, "--out", wanted[0], *options]
    argv = [str(word) for word in words]
    print("$ mt-diffusion", name, *argv, flush=True)
    if all(file.exists() for file in wanted):
        return
    with open(files.log, "a") as log, contextlib.redirect_stdout(log):
        command(argv)


def next_steps(files: Files) -> str:
    """What to open and what to type."""
    pictures = {
        files.named("subsets"): "ten held-out digits, drawn from nothing, the label, the masked image, both",
        files.named("restored"): "held-out digits: original, masked, restored",
        files.named("of_labels"): "a column per given label, 0 to 9",
        files.named("samples"): "digits drawn from nothing",
        files.curve: "the losses",
    }
    width = max(len(str(file.with_suffix(".png"))) for file in pictures)
    opened = [f"  {file.with_suffix('.png')!s:{width}s}  {what}" for file, what in pictures.items()]
    typed = [
        f"  mt-diffusion sample --model_path {files.run} --given label=3 --num_samples 16   # sixteen threes",
        f"  mt-diffusion restore --model_path {files.run} --data_dir {HELD_OUT} --mask half     # the right half is missing",
        f"  make demo STEPS={2 * files.steps}                                                   # train on, for better digits",
        f"  mt-diffusion train --preset {PRESET} --data_dir FOLDER --log_dir runs/mine      # your own images, CLASS/NAME.png",
    ]
    activate = Path(sys.executable).parent / "activate"
    first = [f"  source {activate}"] if activate.exists() else []
    return "\n".join(["Open:", *opened, "Type next:", *first, *typed])


def console() -> None:
    run(main)
