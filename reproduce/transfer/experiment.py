"""Which task helps or hurts which (the experiment that appendix E.5 promises): equal steps, equal samples, several seeds.

    mt-diffusion transfer --data_dir emoji-64.tar/train --val_data_dir emoji-64.tar/test --preset five-emoji32 --out runs/transfer

Trains the image alone, with each of --tasks, with each pair, with all of them, and all of them by other weightings, each with
every seed. Row unframed is the image alone with --mt_drop_prob of the batch: as many images without a frame as the models with
tasks see, so a fairer reference than alone for the loss without a frame. What is measured on held-out images: the denoising loss
without any frame, which all models share; each head's own loss; label accuracy and restoration error; and, of drawn images,
Frechet distance and KID on the features of a classifier of the project's own, which compare these models with each other and with
nothing published. What is finished is left as it is. Other flags go to train, and are the same for all. Writes OUT/table.md,
OUT/seeds.csv and OUT/transfer.png.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event, Lock

import numpy as np

from evaluations.tables.seeds import Measured, markdown_table, write_seeds_csv
from guided_mt.commands.console import run, split_flags, with_saved_config
from guided_mt.data import load_images, open_source
from guided_mt.data.images import make_grid, save_png, to_nhwc
from guided_mt.errors import UserError
from guided_mt.generation.build import open_images, run_sections
from guided_mt.generation.feature_classifier import FeatureClassifier
from guided_mt.generation.generate import Generator
from guided_mt.generation.noisy_classifier import load_classifier
from guided_mt.modalities.registry import TASKS
from guided_mt.runs.config import Config, SampleConfig, option, parse
from guided_mt.runs.distributed import choose_device
from guided_mt.runs.processes.claim import Claim
from guided_mt.training.loop import batch_sizes

from ..children import passing_on_sigterm, run_child
from ..commands import command, environment, shown
from ..seeds import training_seeds
from ..settings import same_settings
from . import held_out
from .heat_map import draw_heat_map
from .numbers import columns_of, conflicts, cosines_of, distances, every_column
from .rows import IMAGE, UNFRAMED, Row, rows_of, unframed_images

CALLS = 20  # network calls of a sample
BATCH = 100
SET_HERE = ("mt_task", "log_dir", "resume_checkpoint", "seed", "total_steps", "save_interval", "keep_checkpoints")
FREE = ("device", "data_workers", "log_interval", "dry_run", "compile", "num_classes", "sample_interval")
PICTURES = 12


@dataclass
class TransferConfig:
    """The experiment. Other flags are those of train, and are the same for all models"""

    data_dir: str = option("", "images to train on, with what the tasks need beside them")
    val_data_dir: str = option("", "held-out images of the same kind")
    tasks: str = option("masked,label,caption,random-caption", "the tasks beside the image")
    rows: str = option(
        "alone,each,all",
        "some of alone, unframed, each, pairs, all, and of all tasks uncertainty, pcgrad, nash, routing, min-snr, p2",
    )
    seeds: str = option("0,1,2", "training seeds")
    steps: int = option(2000, "training steps of each model", least=1)
    samples: int = option(500, "images drawn of each model; 0: none", least=0)
    judge_steps: int = option(600, "training steps of the classifier whose features compare drawn images", least=1)
    jobs: int = option(1, "models that are trained beside each other", least=1)
    out: str = option("runs/transfer", "folder of all that is written")
    device: str = option("", "cpu, cuda, cuda:1 ...; empty: a GPU if there is one")


@dataclass
class HeldOutConfig:
    """What a trained model is measured on"""

    data_dir: str = option("", "the held-out images")


def main(argv: Sequence[str]) -> None:
    """Train what isn't trained, measure, and write table and picture. Raises UserError."""
    experiment = experiment_of(argv)
    with Claim(experiment.out, setting="--out"):
        experiment.main()


def experiment_of(argv: Sequence[str]) -> Experiment:
    """The experiment that these words ask for; nothing is written yet. Raises UserError."""
    own, passed_on = split_flags(argv, [field.name for field in fields(TransferConfig)])
    config = parse([*own, *(w for w in passed_on if w in ("-h", "--help"))], (TransferConfig,), description=__doc__)
    for flag in ("data_dir", "val_data_dir"):
        if not getattr(config, flag):
            raise UserError(f"--{flag} is missing: {TransferConfig.__dataclass_fields__[flag].metadata['help']}")
    if clash := split_flags(passed_on, SET_HERE)[0]:
        raise UserError(
            f"{clash[0].partition('=')[0]} is set by transfer, from its --tasks, --out, --seeds and --steps"
        )
    tasks = [word.strip() for word in config.tasks.split(",") if word.strip()]
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {config.tasks}: '{task}' is none of {', '.join(TASKS)}")
    trained = parse(passed_on, run_sections(), description="", presets=True)
    unframed = unframed_images(batch_sizes(trained, 1)[0], trained.mt_drop_prob)
    rows = rows_of(tasks, config.rows, unframed)
    return Experiment(config, rows, training_seeds(config.seeds), passed_on, trained)


class Experiment:
    """All stages; each is skipped where its result exists."""

    def __init__(
        self, config: Config, rows: Sequence[Row], seeds: Sequence[int], passed_on: Sequence[str], trained: Config
    ):
        """passed_on: words of `train` for all models; trained: what they say."""
        self.config, self.rows, self.seeds, self.passed_on = config, rows, seeds, list(passed_on)
        self.trained = trained
        self.out, self.device = Path(config.out), choose_device(config.device)
        self.failed, self.measuring, self.printing = Event(), Lock(), Lock()
        self._judge: FeatureClassifier | None = None
        self._truth: np.ndarray | None = None

    def main(self) -> None:
        """Everything. Raises UserError."""
        same_settings(self.out, self.settings())
        source = open_source(self.config.val_data_dir)
        if source.labels is not None and self.config.samples:
            self.train_judge()
        work = [(row, seed) for seed in self.seeds for row in self.rows]
        with passing_on_sigterm(), ThreadPoolExecutor(self.config.jobs) as pool:
            jobs = [pool.submit(self.one, row, seed) for row, seed in work]
            results = [job.result() for job in jobs]
        self.report([result for result in results if result is not None])

    def report(self, results: list[Measured]) -> None:
        """Table and picture of these models."""
        order = [row.name for row in self.rows]
        results = sorted(results, key=lambda result: order.index(result.row))
        columns = columns_of(results)
        table = markdown_table(results, columns)
        if cosines := cosines_of(results):
            conflicting = [result for result in results if any(column.key in result.values for column in cosines)]
            table += (
                f"\nCosine of the tasks' gradients, mean over the training:\n\n{markdown_table(conflicting, cosines)}"
            )
        write_seeds_csv(results, every_column(results), self.out / "seeds.csv")
        (self.out / "table.md").write_text(table, encoding="utf-8")
        names = [result.row for result in results]
        fair = UNFRAMED if UNFRAMED in names else IMAGE
        draw_heat_map(results, columns, fair, self.out / "transfer.png")
        print(f"\n{table}\n{self.out / 'transfer.png'}: rows are models, columns what is measured")

    # ------------------------------------------------------------ stages

    def settings(self) -> dict[str, str]:
        """What all models are trained and measured with; where and how fast is free."""
        own = {name: getattr(self.config, name) for name in ("data_dir", "val_data_dir", "judge_steps")}
        trained = {key: value for key, value in self.trained.as_dict().items() if key not in (*SET_HERE, *FREE)}
        return {key: str(value) for key, value in {**trained, **own}.items()}

    def folder(self, row: Row, seed: int) -> Path:
        """The run of a model."""
        return self.out / row.folder / f"seed_{seed}"

    def file(self, folder: Path) -> Path:
        """Where a model's numbers are kept; without its weights they are enough."""
        return folder / f"transfer_{self.config.steps}_{self.config.samples}.json"

    def train_judge(self) -> None:
        """The classifier whose features compare drawn images. Raises UserError."""
        folder, steps = self.out / "judge", self.config.judge_steps
        if not (folder / "checkpoints" / f"step_{steps:08d}").is_dir():
            words = ["--data_dir", self.config.data_dir, "--log_dir", folder, "--iterations", steps]
            words += ["--image_size", self.trained.image_size]
            words += ["--classifier_pool", "adaptive", "--classifier_width", 64, "--classifier_depth", 1, "--lr", 1e-3]
            batch = min(64, len(open_source(self.config.data_dir)))
            words += ["--global_batch_size", batch, "--save_interval", steps, "--device", self.device]
            self._run("classifier-train", *words)
        self._judge = FeatureClassifier(load_classifier(str(folder)))
        self._judge.model.to(self.device)

    def one(self, row: Row, seed: int) -> Measured | None:
        """Train and measure a model; None where another one has failed. Raises UserError."""
        if self.failed.is_set():
            return None
        try:
            folder, steps = self.folder(row, seed), self.config.steps
            if not self.file(folder).exists() and not (folder / "checkpoints" / f"step_{steps:08d}").is_dir():
                words = [
                    "--data_dir",
                    self.config.data_dir,
                    *self.passed_on,
                    *row.words,
                    "--log_dir",
                    folder,
                    "--seed",
                    seed,
                ]
                words += [
                    "--total_steps",
                    steps,
                    "--save_interval",
                    steps,
                    "--keep_checkpoints",
                    1,
                    "--device",
                    self.device,
                ]
                self._run("train", *words)
            with self.measuring:
                return Measured(row.name, seed, self.measured(folder))
        except BaseException:
            self.failed.set()
            raise

    def measured(self, folder: Path) -> dict[str, float]:
        """A model's numbers, kept in its folder."""
        file = self.file(folder)
        if file.exists():
            return json.loads(file.read_text())
        words = ["--model_path", str(folder), "--device", str(self.device), "--data_dir", self.config.val_data_dir]
        generator = Generator.load(with_saved_config(words, (SampleConfig, HeldOutConfig), ""), self.device)
        source = open_images(generator.config, generator.known_classes)
        for modality in generator.modalities.values():
            modality.prepare(source)
        loaded = load_images(source, generator.config.image_size)
        found = held_out.losses(generator, loaded) | held_out.abilities(generator, loaded)
        if self._judge is not None:
            ours = self._judge.classify(self.drawn(generator, folder)).features
            found |= distances(self.truth(generator.config.image_size), ours)
        found |= conflicts(folder / "progress.csv")
        file.write_text(json.dumps(found, indent=1))
        return found

    def truth(self, size: int) -> np.ndarray:
        """The features [N, D] of the training images."""
        if self._truth is None:
            assert self._judge is not None
            images = load_images(open_source(self.config.data_dir), size).images
            self._truth = self._judge.classify(images.permute(0, 2, 3, 1).numpy()).features
        return self._truth

    def drawn(self, generator: Generator, folder: Path) -> np.ndarray:
        """uint8 [N, H, W, 3], of nothing given; the first ones as a picture."""
        options = SampleConfig(steps=CALLS, sampler="dpm++")
        parts = []
        for start in range(0, self.config.samples, BATCH):
            seeds = range(start, min(start + BATCH, self.config.samples))
            parts.append(to_nhwc(generator.draw(seeds, options, {}).x_start))
        images = np.concatenate(parts)
        save_png(make_grid(images[:PICTURES], columns=PICTURES), folder / "drawn.png")
        return images

    def _run(self, name: str, *words: object) -> None:
        """Run a command; raises UserError where it fails."""
        typed = command(name, *words)
        log = self.out / "log.txt"
        with self.printing:
            self.out.mkdir(parents=True, exist_ok=True)
            print("$", shown(typed), flush=True)
        with open(log, "a", encoding="utf-8") as file:
            code = run_child(typed, stdout=file, stderr=subprocess.STDOUT, env=environment())
        if code:
            raise UserError(f"mt-diffusion {name} ended with exit code {code}; {log} says why")


def console() -> None:
    """The script's door."""
    run(main)
