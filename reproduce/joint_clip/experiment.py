"""The paper's joint model of image and CLIP representation (appendix E.4), small: against its twin that knows of images alone.

    mt-diffusion joint-clip --data_dir emoji-64.tar [--out runs/joint_clip] [--seeds 0,1,2] [--steps 2000]

The data are pictures with captions: train/, test/ and captions.csv, 64 pixels a side. First an autoencoder is trained, and
two small CLIPs on the training pictures. One is the model's text stage and the source of its representations. The other, of
another seed, is the judge: what it says of a picture nothing was trained towards. Then each seed trains both models of
stable_diffusion_2_clip_small for equally many steps, with and without the representation, and draws the held-out captions.
What is finished is left as it is, so that more seeds or steps go on from there. Writes OUT/table.md, OUT/seeds.csv and
OUT/samples.png.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations.tables.seeds import Column, Measured, markdown_table, write_seeds_csv
from guided_mt.commands.console import run
from guided_mt.data import load_images, open_source
from guided_mt.data.captions import open_captions
from guided_mt.data.images import make_grid, save_png
from guided_mt.errors import UserError
from guided_mt.runs.config import Config, option, parse

from ..children import run_child
from ..commands import command, environment, shown
from ..seeds import training_seeds
from ..settings import same_settings
from . import scores
from .tiny_clip import TinyCLIP, train_clip

SIZE = 64
CONFIG, FIRST_STAGE = "stable_diffusion_2_clip_small", "autoencoder_kl_emoji"
TEACHER, JUDGE = 0, 1  # seeds of the two CLIPs
CALLS = 25  # network calls of a sample
KINDS: dict[str, list[str]] = {
    "image alone": ["model.params.mt_tasks=null", "model.params.mt_variant=U"],
    "image and representation": [],
}
FIXED = ("data_dir", "first_steps", "clip_steps", "guidance_scale")  # settings that all of a folder is made with
COLUMNS = [
    Column("fd", "Frechet distance", 4),
    Column("kid", "KID x 1000", 2),
    Column("agreement", "cosine to caption", 3),
    Column("top5", "caption among 5 nearest of all", 3),
    Column("head", "cosine of head", 3),
]


@dataclass
class EmojiConfig:
    """The experiment"""

    data_dir: str = option("", "folder or archive with train/, test/ and captions.csv")
    out: str = option("runs/joint_clip", "folder of all that is written")
    seeds: str = option("0,1,2", "training seeds")
    steps: int = option(2000, "steps of each model", least=1)
    first_steps: int = option(1200, "steps of the first stage", least=1)
    clip_steps: int = option(300, "steps of each small CLIP", least=1)
    draws: int = option(2, "pictures drawn of each held-out caption", least=1)
    guidance_scale: float = option(2.0, "guidance when drawing; 1: none", least=0, free=True)


@dataclass(frozen=True)
class Split:
    """Pictures uint8 [N, 3, 64, 64] and a caption of each."""

    pictures: Tensor
    captions: list[str]

    @classmethod
    def of(cls, data_dir: str, name: str) -> Split:
        """Raises UserError where there are none."""
        path = f"{data_dir}/{name}"
        source = open_source(path)
        found = open_captions("captions.csv", path, source, "captions")
        pictures = load_images(source, SIZE).images
        return cls(pictures, [found[k][0] if found[k] else "" for k in range(len(found))])


def main(argv: Sequence[str]) -> None:
    """Train what isn't trained, draw, score and write the table. Raises UserError."""
    config = parse(argv, (EmojiConfig,), description=__doc__)
    if not config.data_dir:
        raise UserError("--data_dir is missing: pictures with captions, as train/, test/ and captions.csv")
    seeds = training_seeds(config.seeds)
    train, test = (Split.of(config.data_dir, name) for name in ("train", "test"))
    experiment = Experiment(config, train, test)
    experiment.prepare()
    results = [*experiment.references(), *(experiment.measure(kind, seed) for seed in seeds for kind in KINDS)]
    results.sort(key=lambda result: [*experiment.REFERENCES, *KINDS].index(result.row))
    table = markdown_table(results, COLUMNS)
    out = Path(config.out)
    write_seeds_csv(results, COLUMNS, out / "seeds.csv")
    (out / "table.md").write_text(table, encoding="utf-8")
    save_png(experiment.picture(seeds[0]), out / "samples.png")
    print(f"\n{table}\n{out / 'samples.png'}: true pictures, then what each model draws of their captions")


class Experiment:
    """All stages; each is skipped where its result exists."""

    REFERENCES = ("held-out pictures", "training pictures with captions of others")

    def __init__(self, config: Config, train: Split, test: Split):
        self.config, self.out, self.train, self.test = config, Path(config.out), train, test

    # ------------------------------------------------------------ stages

    def prepare(self) -> None:
        """First stage, CLIPs and stored latents. Raises UserError."""
        self.out.mkdir(parents=True, exist_ok=True)
        same_settings(self.out, {name: getattr(self.config, name) for name in FIXED})
        self.prompts.write_text("\n".join(self.test.captions) + "\n", encoding="utf-8")
        data = f"data.params.path={self.config.data_dir}/train"
        first, steps = self.out / "first_stage", self.config.first_steps
        if not (first / "checkpoints" / f"step_{steps:08d}").is_dir():
            words = ["--config", FIRST_STAGE, data, f"run.log_dir={first}", f"run.total_steps={steps}"]
            self._run("autoencoder-train", *words)
        for seed in (TEACHER, JUDGE):
            if not self.clip(seed).exists():
                print(f"# small CLIP of seed {seed}: {self.config.clip_steps} steps", flush=True)
                train_clip(self.train.pictures, self.train.captions, self.config.clip_steps, seed, self.clip(seed))
        if not (self.out / "latents" / "train" / "meta.json").exists():
            words = ["--config", CONFIG, "--out", self.out / "latents", "--representation", "clip-image"]
            self._run("encode", *words, data, *self._parts())
        self.teacher, self.judge = TinyCLIP(self.clip(TEACHER)), TinyCLIP(self.clip(JUDGE))

    def clip(self, seed: int) -> Path:
        """The weights of a small CLIP."""
        return self.out / "clip" / f"seed_{seed}.safetensors"

    @property
    def prompts(self) -> Path:
        """The held-out captions, one in each line."""
        return self.out / "captions.txt"

    def _parts(self) -> list[str]:
        """Overrides of CONFIG that name the trained parts."""
        return [
            f"model.params.first_stage_config.params.ckpt_path={self.out / 'first_stage'}",
            f"model.params.cond_stage_config.params.version={self.clip(TEACHER)}",
            f"model.params.mt_tasks.representation.clip_weights={self.clip(TEACHER)}",
        ]

    def folder(self, kind: str, seed: int) -> Path:
        """The run of a model."""
        return self.out / f"{kind.replace(' ', '_')}_{seed}"

    def drawn(self, kind: str, seed: int) -> Tensor:
        """uint8 [draws * held-out captions, 3, 64, 64] that the model draws. Raises UserError."""
        run, steps = self.folder(kind, seed), self.config.steps
        if not (run / "checkpoints" / f"step_{steps:08d}").is_dir():
            words = ["--config", CONFIG, f"data.params.path={self.config.data_dir}/train", *self._parts()]
            words += [f"data.params.latents={self.out / 'latents'}", f"run.log_dir={run}", f"run.seed={seed}"]
            self._run("latent-train", *words, f"run.total_steps={steps}", *KINDS[kind])
            if not (run / "checkpoints" / f"step_{steps:08d}").is_dir():
                raise UserError(
                    f"{run}: was trained for more than --steps {steps} already; take more, or another --out"
                )
        count = self.config.draws * len(self.test.captions)
        out = run / "samples" / f"captions_{steps}"
        file = out / f"samples_{count}.npz"
        if not file.exists():
            words = ["--model_path", run, "--out", out, "--prompt_file", self.prompts, "--num_samples", count]
            words += ["--steps", CALLS, "--guidance_scale", self.config.guidance_scale, "--batch_size", 64]
            self._run("latent-sample", *words)
        with np.load(file, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)

    def _run(self, name: str, *words: object) -> None:
        """Run a command; raises UserError where it fails."""
        typed = command(name, *words)
        print("$", shown(typed), flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            code = run_child(typed, stdout=log, stderr=subprocess.STDOUT, env=environment())
        if code:
            raise UserError(f"mt-diffusion {name} ended with exit code {code}; {self.out / 'log.txt'} says why")

    # ------------------------------------------------------------ numbers

    def measure(self, kind: str, seed: int) -> Measured:
        """A model's numbers."""
        pictures = self.drawn(kind, seed)
        values = self._scored(pictures, self.test.captions * self.config.draws)
        return Measured(kind, seed, values | scores.of_head(self.folder(kind, seed) / "progress.csv"))

    def references(self) -> list[Measured]:
        """What true pictures get: with their captions, and training pictures with captions of held-out ones."""
        shuffled = self.train.pictures[:: max(1, len(self.train.pictures) // len(self.test.captions))]
        shuffled = shuffled[: len(self.test.captions)]
        pictures = (self.test.pictures, shuffled)
        return [
            Measured(row, None, self._scored(images, self.test.captions[: len(images)]))
            for row, images in zip(self.REFERENCES, pictures, strict=True)
        ]

    def _scored(self, pictures: Tensor, captions: Sequence[str]) -> dict[str, float]:
        found, true = self.judge.images(pictures), self.judge.images(self.train.pictures)
        texts = self.judge.texts(captions)
        return scores.distances(true, found) | scores.agreement(found, texts, self.judge.texts(self.test.captions))

    def picture(self, seed: int, count: int = 12) -> np.ndarray:
        """uint8 [H, W, 3]: true held-out pictures, then a row of each model's of the same captions."""
        chosen = torch.linspace(0, len(self.test.captions) - 1, count).long()
        rows = [self.test.pictures, *(self.drawn(kind, seed) for kind in KINDS)]
        return make_grid(torch.cat([images[chosen] for images in rows]).permute(0, 2, 3, 1).numpy(), columns=count)


def console() -> None:
    """The script's door."""
    run(main)
