"""Does a second task help or hurt? Twins at equal steps, seeds and images seen, one table and one figure.

    mt-diffusion compare [--run runs/compare] [--steps 500] [--seeds 0,1,2] [--rows label-m,none] [--conditioning]

Every row is trained with every seed by `train`, drawn from by `sample`, and measured on held-out images; what
is done already is not done again. One classifier, trained by `classifier-train`, reads the images of all rows: the Frechet
distance is taken between the inputs of its last layer (the mean over positions of its last features), at timestep 0.
Writes RUN/compare.csv, RUN/compare.md and RUN/compare.png, and beside each run its samples as PNG. `--data cifar10` takes the
CIFAR-10 presets, meant for a GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

import numpy as np
import torch

from evaluations.errors import EvaluationError
from evaluations.features.moments import statistics
from evaluations.scores.metrics import frechet_distance
from evaluations.tables.seeds import Column, Measured, markdown_table, plot_seeds, write_seeds_csv
from guided_mt.commands.console import run
from guided_mt.commands.restore import region_errors
from guided_mt.data import load_images, open_source
from guided_mt.data.images import save_npz
from guided_mt.errors import UserError
from guided_mt.generation.feature_classifier import ClassifiedImages, FeatureClassifier
from guided_mt.generation.noisy_classifier import load_classifier
from guided_mt.runs.processes.claim import Claim

from .children import passing_on_sigterm, run_child
from .commands import command, shown
from .seeds import training_seeds

RESTORED = 120  # held-out images with ten patches masked, as in the demo
GIVEN = "own head, scale 1"  # how a given label is drawn by default
CONDITIONINGS = {
    "own head, scale 0.5": ("--mt_condition", "own-head", "--mt_condition_scale", "0.5"),
    GIVEN: (),
    "own head, scale 2": ("--mt_condition", "own-head", "--mt_condition_scale", "2"),
    "own head, scale 4": ("--mt_condition", "own-head", "--mt_condition_scale", "4"),
    "algorithm1": ("--mt_condition", "algorithm1"),
}
CONDITIONED_ROW = "label-m"
COLUMNS = (
    Column("frechet", "Frechet distance", 2),
    Column("frechet_given", "Frechet distance, label given", 2),
    Column("class_frequencies", "class frequencies: total variation from held-out"),
    Column("accuracy", "accuracy on held-out images"),
    Column("joint_agreement", "drawn label is the drawn image's"),
    Column("given_agreement", "given label is the drawn image's"),
    Column("restoration", "restoration: mse, masked region"),
    Column("seconds_per_step", "seconds per step"),
)


@dataclass(frozen=True)
class Row:
    """A preset, with {} in the place of the data's name, and flags over it; `tasks` are what its model has beside the image."""

    preset: str
    tasks: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


ROWS = {
    "none": Row("label-{}-m", flags=("--mt_task", "none")),
    "label-m": Row("label-{}-m", ("label",)),
    "label-m-rms": Row("label-{}-m", ("label",), ("--mt_encoding_norm", "rms")),
    "label-e": Row("label-{}-e", ("label",)),
    "random-label": Row("label-{}-m", ("random-label",), ("--mt_task", "random-label")),
    # E(y) stands nowhere: what is left of the second task is its loss on the shared network
    "label-m-noframe": Row("label-{}-m", ("label",), ("--mt_weights", "none")),
    "random-label-noframe": Row("label-{}-m", ("random-label",), ("--mt_task", "random-label", "--mt_weights", "none")),
    "masked": Row("masked-{}", ("masked",)),  # form X, as the preset
    "masked-label": Row("masked-label-{}", ("masked", "label")),  # form any
    # not in the default run
    "random-label-rms": Row(
        "label-{}-m", ("random-label",), ("--mt_task", "random-label", "--mt_encoding_norm", "rms")
    ),
    "masked-u": Row("masked-{}", ("masked",), ("--mt_variant", "U")),
    "masked-any": Row("masked-{}", ("masked",), ("--mt_variant", "any")),
}
DEFAULT_ROWS = tuple(name for name in ROWS if name not in ("random-label-rms", "masked-u", "masked-any"))


@dataclass(frozen=True)
class Data:
    """Where the images are, the flags that all rows share, and how the classifier that reads them is trained."""

    train: str
    held_out: str
    steps: int
    flags: tuple[str, ...]
    classifier: tuple[str, ...]


# The digits are scans of 8 x 8 pixels: at that size a step costs a quarter of what it does at the presets' 16.
SMALL = "--image_size 8 --channel_mult 1,2 --attention_resolutions 4 --classifier_attention_resolutions 4"
CLASSIFIER = "--num_classes 10 --noise_schedule cosine --classifier_pool adaptive --grad_clip 1 --data_workers 0 --log_interval 100"
DATA = {
    "digits": Data(
        "builtin:digits",
        "builtin:digits-test",
        500,
        tuple(f"{SMALL} --data_workers 0 --sample_interval 0 --log_interval 100 --save_interval 200".split()),
        tuple(
            f"{CLASSIFIER} --image_size 8 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4 "
            "--random_flip False --random_crop False --global_batch_size 64 --lr 1e-3 --anneal_lr True --iterations 800".split()
        ),
    ),
    "cifar10": Data(
        "",
        "",
        100_000,
        ("--sample_interval", "0", "--keep_checkpoints", "1"),
        tuple(
            f"{CLASSIFIER} --image_size 32 --classifier_width 64 --classifier_depth 2 --classifier_attention_resolutions 16,8 "
            "--global_batch_size 128 --anneal_lr True --iterations 30000".split()
        ),
    ),
}


def main(argv: Sequence[str]) -> None:
    """Train and compare the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/compare"), help="folder of all that is written")
    parser.add_argument("--data", choices=DATA, default="digits", help="whose presets")
    parser.add_argument("--train_data", default="", help="training images, where the data's name doesn't say")
    parser.add_argument("--test_data", default="", help="held-out images, likewise")
    parser.add_argument("--steps", type=int, default=0, help="training steps of every row; more than before trains on")
    parser.add_argument("--seeds", default="0,1,2", help="training seeds, as in 0,1,2")
    parser.add_argument("--rows", type=_rows, default=list(DEFAULT_ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--samples", type=int, default=360, help="images drawn from every model")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each; 1 on a GPU")
    parser.add_argument(
        "--conditioning",
        action="store_true",
        help=f"row {CONDITIONED_ROW}: also draw given labels in other ways, into RUN/conditioning.md",
    )
    parser.add_argument("--classifier_steps", type=int, default=0, help="training steps of the classifier")
    try:
        Comparison(parser.parse_args(argv)).main()
    except EvaluationError as error:  # such as a package that the figure needs
        raise UserError(str(error)) from None


def _rows(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"no row '{name}'; there are {', '.join(ROWS)}")
    return names


class Comparison:
    """All stages of one comparison; each is skipped where its file exists."""

    def __init__(self, arguments: argparse.Namespace):
        self.run, self.rows, self.seeds = arguments.run, arguments.rows, training_seeds(arguments.seeds)
        self.samples, self.jobs, self.conditioning = arguments.samples, arguments.jobs, arguments.conditioning
        self.name, self.data = arguments.data, DATA[arguments.data]
        self.train_data = arguments.train_data or self.data.train
        self.test_data = arguments.test_data or self.data.held_out
        for flag, least in (("steps", 0), ("classifier_steps", 0), ("samples", 1), ("jobs", 1)):  # 0: the default
            if getattr(arguments, flag) < least:
                raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least {least}")
        if not self.train_data or not self.test_data:
            raise UserError(f"--data {self.name} needs --train_data and --test_data")
        self.steps = arguments.steps or self.data.steps
        more = ("--iterations", str(arguments.classifier_steps)) if arguments.classifier_steps else ()
        self.classifier_flags = (*self.data.classifier, *more)
        self.failed, self.printing = Event(), Lock()

    def main(self) -> None:
        """Train, draw and measure whatever isn't there yet, then write the table."""
        with Claim(self.run, setting="--run"):
            self.all_stages()

    def all_stages(self) -> None:
        """Train, draw and measure what is not there yet, and write the report."""
        started = time.monotonic()
        self.run.mkdir(parents=True, exist_ok=True)
        given = np.arange(self.samples) % len(open_source(self.train_data).class_names)
        save_npz(self.labels, {"labels": given})
        work = [self.train_classifier]
        work += [lambda row=row, seed=seed: self.one(row, seed) for seed in self.seeds for row in self.rows]
        with passing_on_sigterm(), ThreadPoolExecutor(self.jobs) as pool:
            for done in [pool.submit(self.unless_failed, job) for job in work]:
                done.result()
        self.report(time.monotonic() - started)

    # ------------------------------------------------------------ files

    @property
    def labels(self) -> Path:
        """The file of the labels that are given while drawing."""
        return self.run / f"labels_{self.samples}.npz"  # every class as often

    @property
    def classifier(self) -> Path:
        """The run folder of the classifier that reads every model's images."""
        return self.run / "classifier"

    def folder(self, row: str, seed: int) -> Path:
        """The run folder of a row at a seed."""
        return self.run / row / f"seed_{seed}"

    def weights(self, row: str, seed: int) -> Path:
        """The checkpoint that a row at a seed is measured at."""
        return self.folder(row, seed) / "checkpoints" / f"step_{self.steps:08d}"

    def file(self, row: str, seed: int, what: str) -> Path:
        """The file of what was drawn: "joint", "given", "classified" or "restored"."""
        return self.folder(row, seed) / "samples" / f"{what}_{self.steps}_{self.samples}.npz"

    # ------------------------------------------------------------ stages

    def unless_failed(self, job) -> None:
        """Do a job of the queue, unless another one has failed before."""
        if self.failed.is_set():
            return
        try:
            job()
        except BaseException:
            self.failed.set()
            raise

    def call(self, name: str, *options: object, folder: Path, out: Path) -> None:
        """Run one of the commands on one thread, unless its result `out` is there; what it prints goes to FOLDER/log.txt."""
        if out.exists() or self.failed.is_set():
            return
        folder.mkdir(parents=True, exist_ok=True)
        words = command(name, *options)
        started = time.monotonic()
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"$ {shown(words)}\n")
            log.flush()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            code = run_child(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if code:
            last = (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
            raise UserError(f"{name} failed, see {folder / 'log.txt'}: {last}")
        with self.printing:
            print(f"{time.monotonic() - started:5.0f} s  {name} -> {out}", flush=True)

    def train_classifier(self) -> None:
        """Train the classifier whose features and classes all rows are compared by."""
        flags = ["--data_dir", self.train_data, "--log_dir", self.classifier, *self.classifier_flags]
        steps = int(flags[len(flags) - 1 - flags[::-1].index("--iterations") + 1])
        done = self.classifier / "checkpoints" / f"step_{steps:08d}"
        self.call("classifier-train", *flags, folder=self.classifier, out=done)

    def one(self, row: str, seed: int) -> None:
        """Train one row with one seed and draw all that is measured."""
        spec, folder, weights = ROWS[row], self.folder(row, seed), self.weights(row, seed)
        flags = ["--preset", spec.preset.format(self.name), *self.data.flags, *spec.flags]
        flags += ["--data_dir", self.train_data, "--log_dir", folder, "--seed", seed, "--total_steps", self.steps]
        self.call("train", *flags, folder=folder, out=weights)
        draw = ["--model_path", weights, "--num_samples", self.samples, "--batch_size", 60]
        draw += ["--seeds", f"{seed * 10**6}-{seed * 10**6 + self.samples - 1}"]  # the same for every row
        self.draw(row, seed, "joint", *draw)
        if "label" in spec.tasks:
            given = [*draw, "--given", f"label={self.labels}"]
            self.draw(row, seed, "given", *given)
            held_out = ["--model_path", weights, "--data_dir", self.test_data]
            self.draw(row, seed, "classified", *held_out, by="classify")
            for name, how in CONDITIONINGS.items() if self.conditioning and row == CONDITIONED_ROW else ():
                self.draw(row, seed, _slug(name), *given, *how)
        if "masked" in spec.tasks:
            options = ["--data_dir", self.test_data, "--mask", "patches:10", "--num_samples", RESTORED]
            more = ["--model_path", weights, "--batch_size", 60, *options]
            self.draw(row, seed, "restored", *more, by="restore")

    def draw(self, row: str, seed: int, what: str, *options: object, by: str = "sample") -> None:
        """Start a script of a row at a seed that writes one file of images or predictions."""
        out = self.file(row, seed, what)
        self.call(by, *options, "--out", out, folder=self.folder(row, seed), out=out)

    # ------------------------------------------------------------ numbers

    def report(self, seconds: float) -> None:
        """Measure everything and write the table, the figure and the CSV."""
        classifier = FeatureClassifier(load_classifier(str(self.classifier)))
        held_out = load_images(open_source(self.test_data, class_names=classifier.classes), classifier.size)
        trained_on = load_images(open_source(self.train_data, class_names=classifier.classes), classifier.size)
        held_out_images, training_images = (to_arrays(loaded.images) for loaded in (held_out, trained_on))
        real = classifier.classify(held_out_images)
        accuracy = float((real.classes == held_out.labels.numpy()).mean())
        results = [self.measure(row, seed, classifier, real) for row in self.rows for seed in self.seeds]
        results.append(self.measure_training_images(training_images, classifier, real))
        seeds = ", ".join(map(str, self.seeds))
        table = markdown_table(results, COLUMNS)
        text = (
            f"Twins on {self.name}: {self.steps} training steps, seeds {seeds}; mean +- sample standard deviation.\n"
            f"{self.samples} images drawn from each model. The classifier that reads them is right on {accuracy:.1%} of the "
            f"{len(held_out_images)} held-out images.\n\n{table}"
        )
        (self.run / "compare.md").write_text(text, encoding="utf-8")
        write_seeds_csv(results, COLUMNS, self.run / "compare.csv")
        plot_seeds(results, COLUMNS, self.run / "compare.png")
        print(f"\n{text}\n{self.run / 'compare.csv'}, compare.md and compare.png; {seconds / 60:.1f} minutes")
        if self.conditioning and CONDITIONED_ROW in self.rows:
            self.report_conditioning(classifier, real)

    def measure_training_images(
        self, images: np.ndarray, classifier: FeatureClassifier, real: ClassifiedImages
    ) -> Measured:
        """What the numbers are without a model: as many training images, and their mean in the place of what is masked."""
        spread = np.linspace(0, len(images) - 1, min(self.samples, len(images))).astype(int)
        values = likeness(classifier.classify(images[spread]), real)
        restored = [self.file(row, self.seeds[0], "restored") for row in self.rows if "masked" in ROWS[row].tasks]
        if restored:
            mean = images.mean(axis=0).round().astype(np.uint8)
            with np.load(restored[0]) as file:
                filled = {**file, "restored": np.broadcast_to(mean, file["original"].shape)}
            values["restoration"] = region_errors(filled)["masked_mse"]
        return Measured("training images, their mean", None, values)

    def measure(self, row: str, seed: int, classifier: FeatureClassifier, real: ClassifiedImages) -> Measured:
        """What the table says of a row at a seed, {column: value}."""
        tasks, values = ROWS[row].tasks, {}
        with np.load(self.file(row, seed, "joint")) as file:
            drawn = classifier.classify(file["arr_0"])
            values |= likeness(drawn, real)
            if "label" in tasks:
                values["joint_agreement"] = float((drawn.classes == file["arr_1"]).mean())
        if "label" in tasks:
            values["frechet_given"], values["given_agreement"] = self.measure_given(
                row, seed, "given", classifier, real
            )
            with np.load(self.file(row, seed, "classified")) as file:
                values["accuracy"] = float((file["probabilities"].argmax(axis=1) == file["labels"]).mean())
        if "masked" in tasks:
            with np.load(self.file(row, seed, "restored")) as file:
                values["restoration"] = region_errors(dict(file))["masked_mse"]
        values["seconds_per_step"] = seconds_per_step(self.folder(row, seed) / "progress.csv")
        return Measured(row, seed, values)

    def measure_given(
        self, row: str, seed: int, what: str, classifier: FeatureClassifier, real: ClassifiedImages
    ) -> tuple[float, float]:
        """(Frechet distance, agreement of the given label with the class found) of a file drawn with given labels."""
        with np.load(self.file(row, seed, what)) as file:
            drawn = classifier.classify(file["arr_0"])
            return distance(drawn, real), float((drawn.classes == file["arr_1"]).mean())

    def report_conditioning(self, classifier: FeatureClassifier, real: ClassifiedImages) -> None:
        """How a known label is used: RUN/conditioning.md and .csv."""
        columns = [column for column in COLUMNS if column.key in ("given_agreement", "frechet_given")]
        found = []
        for name in CONDITIONINGS:
            for seed in self.seeds:
                away, agreement = self.measure_given(CONDITIONED_ROW, seed, _slug(name), classifier, real)
                found.append(Measured(name, seed, {"frechet_given": away, "given_agreement": agreement}))
        text = markdown_table(found, columns)
        (self.run / "conditioning.md").write_text(text, encoding="utf-8")
        write_seeds_csv(found, columns, self.run / "conditioning.csv")
        print(f"\n{text}")


def to_arrays(images: torch.Tensor) -> np.ndarray:
    """uint8 [N, 3, H, W] -> [N, H, W, 3]."""
    return images.permute(0, 2, 3, 1).numpy()


def distance(a: ClassifiedImages, b: ClassifiedImages) -> float:
    """The Frechet distance of their features."""
    return frechet_distance(*statistics(a.features), *statistics(b.features))


def likeness(drawn: ClassifiedImages, real: ClassifiedImages) -> dict[str, float]:
    """How far drawn images are from real ones: features, and how often each class occurs (half the sum of differences)."""
    count = 1 + max(drawn.classes.max(), real.classes.max())
    shares = [np.bincount(read.classes, minlength=count) / len(read.classes) for read in (drawn, real)]
    return {"frechet": distance(drawn, real), "class_frequencies": float(np.abs(shares[0] - shares[1]).sum() / 2)}


def seconds_per_step(progress: Path) -> float:
    """The median over the log intervals; the first, with its warm-up, is left out where there are others."""
    with open(progress, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["images_per_second"]) for row in rows]
    batch = int(rows[0]["samples"]) / int(rows[0]["step"])
    return batch / float(np.median(rates[1:] or rates))


def _slug(name: str) -> str:
    """The file's name for one of CONDITIONINGS."""
    return "given" if name == GIVEN else "".join(letter if letter.isalnum() else "-" for letter in name)


def console() -> None:
    """The script's door."""
    run(main)
