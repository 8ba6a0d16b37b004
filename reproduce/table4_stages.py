"""The stages of table4: training what is not finished, sampling, and scoring; each is skipped where its result exists."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from evaluations.files.files import write_json
from evaluations.tables.seeds import Measured, rows_of
from guided_mt.data import load_images
from guided_mt.data.images import from_uint8, save_npz, to_nhwc
from guided_mt.errors import UserError
from guided_mt.runs import checkpoint, distributed
from guided_mt.runs.config import Config, parse
from guided_mt.runs.processes.claim import Claim
from guided_mt.runs.resume import newest_checkpoint
from latent_mt.commands import encode_latents, latent_sample, latent_train
from latent_mt.model.generate import LatentSampleConfig
from latent_mt.runs.configuration import load_config
from latent_mt.runs.ldm_checkpoint import FIRST_STAGE
from latent_mt.runs.run import flatten, refuse_other_settings

from . import table4_scores as scores
from .table4_presets import Preset

ROWS = {"single": "single-task, generated", "mt": "MT, generated", "read": "MT, read off its head"}  # ours
CEILING = "first stage alone"
PICTURES = 16  # of the other direction
AUTOENCODER = "model.params.first_stage_config.params.ckpt_path"
SAME = ("run.images_per_step", "data.params.image_size")  # what rows must share, beside the steps and the first stage


@dataclass(frozen=True)
class Run:
    """One training: single or mt, and its seed."""

    kind: str
    seed: int
    folder: Path

    @property
    def newest(self) -> Path | None:
        return newest_checkpoint(self.folder)

    @property
    def step(self) -> int:
        """The newest checkpoint's; 0 without one."""
        return checkpoint.checkpoint_step(self.newest) if self.newest else 0

    @property
    def saved(self) -> dict[str, Any]:
        """Its configuration as {dotted key: value}."""
        return flatten(checkpoint.read_config(self.newest / "model.safetensors") or {})

    @cached_property
    def budget(self) -> dict[str, Any]:
        """What all runs of a table must have in common, once this one is finished."""
        digest = hashlib.sha256()
        with safe_open(self.newest / "model.safetensors", framework="np") as file:
            for key in sorted(name for name in file.keys() if name.startswith(FIRST_STAGE)):  # noqa: SIM118 - no mapping
                digest.update(file.get_tensor(key).tobytes())
        saved = self.saved
        return {"steps": self.step, **{key: saved.get(key) for key in SAME}, "first stage": digest.hexdigest()[:12]}

    def files(self, what: str) -> Path:
        return self.folder / "table4" / what


class Table4:
    """All stages; each is skipped where its result exists."""

    def __init__(self, preset: Preset, arguments: argparse.Namespace, command: str):
        """arguments: as table4.read_arguments returns them. Raises UserError."""
        self.name, self.command, self.sampling = arguments.preset, command, arguments.sampling
        self.preset, self.run, self.seeds = preset, arguments.run, arguments.seeds
        self.inception, self.latents = arguments.inception, arguments.latents
        self.no_train, self.dry_run = arguments.no_train, arguments.dry_run
        self.overrides = list(arguments.overrides)
        if arguments.autoencoder:
            self.overrides.append(f"{AUTOENCODER}={arguments.autoencoder}")
        self.configs = {kind: self.read(kind) for kind in ("single", "mt")}
        self.runs = [
            Run(kind, seed, self.run / f"{self.name}_{kind}-{seed}") for seed in self.seeds for kind in self.configs
        ]

    def file(self, kind: str) -> str:
        """Its configuration, by the name that --config takes."""
        return f"{self.name}_{kind}"

    def read(self, kind: str) -> dict[str, Any]:
        return flatten(load_config(self.file(kind), self.overrides))

    def main(self) -> None:
        for one in self.runs:
            self.check(one)
        unfinished = [one for one in self.runs if not self.finished(one)]
        if unfinished:
            self.prepare(unfinished)
        if self.dry_run:
            return
        with Claim(self.run, setting="--run"):
            for one in unfinished:
                self.train(one)
            self.check_budget()
            for one in self.runs:
                self.draw(one)
            self.report()

    # ------------------------------------------------------------ training

    def given(self, key: str) -> bool:
        """Whether the command line sets a key, or something above it."""
        words = [word.partition("=")[0] for word in self.overrides]
        return any(key == word or key.startswith(f"{word}.") for word in words)

    def total(self, one: Run) -> int:
        """The steps that a run is to have: by the command line, or as it was started with, or by the YAML file."""
        key = "run.total_steps"
        saved = one.saved if one.newest and not self.given(key) else {}
        return int(saved.get(key, self.configs[one.kind].get(key, 0)))

    def finished(self, one: Run) -> bool:
        return one.newest is not None and one.step == self.total(one)

    def check(self, one: Run) -> None:
        """UserError where a run that is there contradicts the command line."""
        if one.newest is None:
            return
        wanted = {k: v for k, v in self.configs[one.kind].items() if self.given(k) and k.startswith("model.params.")}
        refuse_other_settings(one.newest, wanted)
        if one.step > self.total(one):
            raise UserError(f"{one.folder}: is at step {one.step}, past run.total_steps={self.total(one)}")

    def prepare(self, unfinished: Sequence[Run]) -> None:
        """Say what is left to train, and see to first stage and latents. Raises UserError for what training lacks."""
        for one in unfinished:
            print(f"# {one.folder}: {f'step {one.step}' if one.newest else 'nothing yet'} of {self.total(one)}")
        if self.no_train and not self.dry_run:
            raise UserError(f"{unfinished[0].folder}: is not finished, and --no_train is given")
        devices = self.configs["mt"].get("lightning.trainer.devices", "auto")
        if devices not in (1, "1") and (not isinstance(devices, list) or len(devices) > 1):
            raise UserError(
                f"lightning.trainer.devices {devices}: table4 trains in one process; train with several by latent-train "
                f"--config {self.file('mt')} run.log_dir={self.run / f'{self.name}_mt-0'} run.seed=0 and so on, then run this again"
            )
        self.find_autoencoder()
        for one in unfinished:
            print(f"$ mt-diffusion latent-train {shlex.join(self.words(one))}", flush=True)
        config = self.configs["mt"]
        splits = [config.get("data.params.split", "train"), config.get("data.params.val_split")]
        lacking = [split for split in splits if split and not (Path(self.latents) / split).exists()]
        if self.latents and lacking and not self.dry_run:
            encode_latents.main(["--config", self.file("mt"), "--out", self.latents, *self.overrides])

    def find_autoencoder(self) -> None:
        """Set the first stage to the run of its usual name where nothing else names one. Raises UserError where there is none."""
        named = self.configs["mt"].get(AUTOENCODER)
        usual = Path("runs") / f"autoencoder_kl_{self.name}"
        if named is None or Path(named).exists():
            return
        if not self.given(AUTOENCODER) and usual.exists():
            self.overrides.append(f"{AUTOENCODER}={usual}")
            return
        path = self.configs["mt"]["data.params.path"]
        released = " (it is latent-diffusion's kl-f8)" if self.preset.autoencoder.endswith("f8") else ""
        made_by = f"--config {self.preset.autoencoder} data.params.path={path} run.log_dir={usual}"
        raise UserError(
            f"{named}: no such first stage{released}; make it by mt-diffusion autoencoder-train {made_by}, or name one by "
            "--autoencoder"
        )

    def words(self, one: Run) -> list[str]:
        """Of latent-train."""
        latents = [f"data.params.latents={self.latents}"] if self.latents else []
        own = [f"run.log_dir={one.folder}", f"run.seed={one.seed}", f"run.total_steps={self.total(one)}"]
        return ["--config", self.file(one.kind), *self.overrides, *latents, *own]

    def train(self, one: Run) -> None:
        latent_train.main(self.words(one))
        if not self.finished(one):
            raise UserError(f"{one.folder}: stopped at step {one.step}; the same command goes on")

    def check_budget(self) -> None:
        """UserError where two runs differ in what the comparison holds equal."""
        first = self.runs[0]
        for one in self.runs[1:]:
            for key, value in one.budget.items():
                if value != first.budget[key]:
                    raise UserError(
                        f"{one.folder}: {key} {value}, but {first.folder} has {first.budget[key]}: the rows are compared at equal "
                        "budget; train both alike, or take another --run"
                    )

    # ------------------------------------------------------------ sampling

    def sample_words(self, one: Run) -> list[str]:
        """Which model, and where noise begins: a seed's own, the same for both kinds."""
        first = one.seed * 10**6
        path = self.configs["mt"]["data.params.path"]
        data = ["--data_dir", str(path)] if self.given("data.params.path") and "--data_dir" not in self.sampling else []
        return ["--model_path", str(one.newest), "--seeds", f"{first}-{first + 10**6 - 1}", *data, *self.sampling]

    def sample_config(self, one: Run, *more: str) -> Config:
        sections = (LatentSampleConfig, latent_sample.TranslateConfig)
        return parse([*self.sample_words(one), *more], sections, description="")

    def draw(self, one: Run) -> None:
        """Translate the validation split; a multi-task model also the other way round, a few for the eye."""
        preset = self.preset
        self.translate(one, one.files("made"), "--given", preset.given)
        if one.kind == "mt" and 0 < one.saved["model.params.mt_swap_prob"] < 1:
            asked = self.sample_config(one).num_samples
            shown = str(min(PICTURES, asked if asked > 0 else PICTURES))
            words = ("--given", preset.made, "--route", "generate", "--num_samples", shown)
            self.translate(one, one.files("other_way"), *words)

    def translate(self, one: Run, out: Path, *words: str) -> None:
        """latent-sample into the folder `out`, unless it is there with the same weights and settings."""
        done, words = out / "done.json", (*self.sample_words(one), *words, "--out", str(out))
        weights = checkpoint.find_weights(one.newest, self.sample_config(one).ema)
        record = {"words": list(words), "written": weights.stat().st_mtime}
        if done.exists() and json.loads(done.read_text()) == record:
            return
        done.unlink(missing_ok=True)
        latent_sample.main(words)
        done.write_text(json.dumps(record))

    def model(self, one: Run) -> Any:
        config = self.sample_config(one)
        weights = checkpoint.find_weights(one.newest, config.ema)
        saved = latent_sample.read_saved(weights, "")
        return latent_sample.load_model(saved, weights, distributed.choose_device(config.device))

    @staticmethod
    def sides(one: Run) -> dict[str, int]:
        return {name: k for k, name in enumerate(one.saved["model.params.mt_sides"])}

    def first_stage_alone(self) -> Path:
        """A folder with the true images as the first stage gives them back; all runs have the same."""
        one, made = self.runs[0], self.preset.made
        config = self.sample_config(one, "--given", made)
        weights = checkpoint.find_weights(one.newest, config.ema)
        pairs, size = latent_sample.open_split(config, latent_sample.read_saved(weights, ""))
        loaded = load_images(pairs, size, limit=config.num_samples if config.num_samples > 0 else None)
        truth, model = loaded.images.chunk(2, dim=1)[self.sides(one)[made]], self.model(one)
        parts = []
        for batch in truth.split(config.batch_size):
            images = from_uint8(batch.to(model.scale_factor.device))
            parts.append(to_nhwc(model.decode(model.encode(images))))
        out, images = self.run / f"{self.name}_first_stage", np.concatenate(parts)
        save_npz(out / f"{made}.npz", {"arr_0": images})
        latent_sample.write_folder(out / made, latent_sample.unique_stems(loaded.names, pairs.path), images)
        return out / made

    # ------------------------------------------------------------ numbers

    def report(self) -> None:
        preset, pair = self.preset, f"{self.preset.made}_of_{self.preset.given}"
        results, images = [], 0
        for one in self.runs:
            folder = one.files("made")
            for what, row in ((pair, one.kind), (f"{pair}_read", "read")):
                if (folder / f"{what}.npz").exists():
                    results.append(Measured(ROWS[row], one.seed, self.score(folder / what, folder)))
            with np.load(folder / f"{preset.made}_truth.npz") as truth:
                images = len(truth["arr_0"])
        results.sort(key=lambda result: list(ROWS.values()).index(result.row))
        truth = self.runs[0].files("made")
        results.append(Measured(CEILING, None, self.score(self.first_stage_alone(), truth)))
        content = self.content(results, images)
        write_json(self.run / "table4.json", content)
        text = self.text(results, content)
        (self.run / "table4.md").write_text(text, encoding="utf-8")
        print(f"\n{text}\n{self.run / 'table4.md'} and table4.json")

    def score(self, made: Path, truth: Path) -> dict[str, float]:
        """The numbers of the images in the folder `made`, beside which lies made.npz; truth: the folder of the true ones."""
        name = self.preset.made
        if self.preset.half == "maps":
            return scores.score_maps(made, truth / f"{name}_truth", truth / "classes.txt")
        files = made.with_suffix(".npz"), truth / f"{name}_truth.npz"
        more = {} if self.not_run else scores.score_features(*files, self.inception)
        return scores.score_images(*files) | more

    @cached_property
    def not_run(self) -> list[str]:
        """The columns that can't be filled."""
        possible = self.preset.half == "maps" or scores.has_inception(self.inception)
        return [] if possible else list(scores.INCEPTION)

    def content(self, results: Sequence[Measured], images: int) -> dict[str, Any]:
        """All that table4.json holds."""
        sampling = self.sample_config(self.runs[0])[LatentSampleConfig]
        return {
            "preset": self.name,
            "command": self.command,
            "commit": commit(),
            "seeds": self.seeds,
            "training_steps": self.runs[0].step,
            "images_per_step": self.runs[0].saved["run.images_per_step"],
            "image_size": self.runs[0].saved["data.params.image_size"],
            "images": images,
            "sampling": {"sampler": sampling.rule, "steps": sampling.steps, "eta": sampling.eta},
            "quoted": [{"row": row.row, **row.values} for row in scores.HALVES[self.preset.half].quoted],
            "rows": [scores.summary(results, row) for row in rows_of(results)],
            "not_run": self.not_run,
        }

    def text(self, results: Sequence[Measured], content: Mapping[str, Any]) -> str:
        """Markdown: the quoted rows as they were printed, then ours."""
        how, preset = content["sampling"], self.preset
        notes = [
            f"`{self.command}`",
            f"{self.name}, {preset.made} of {preset.given}: {content['images']} images of {content['image_size']} pixels; "
            f"{content['training_steps']} training steps of {content['images_per_step']} pairs each; seeds "
            f"{', '.join(map(str, self.seeds))}, mean +- sample standard deviation; {how['sampler']}, {how['steps']} steps; commit "
            f"{content['commit']}.",
            f"{CEILING}: the true images, encoded and decoded.",
        ]
        if self.not_run:
            notes.append("FID, Inception Score: not run: needs the Inception weights (--inception FILE).")
        pictures = [one.files("other_way") / f"{preset.given}_of_{preset.made}.png" for one in self.runs]
        notes += [f"{preset.given} of {preset.made}: {picture}" for picture in pictures if picture.exists()]
        return "\n".join(
            [scores.layout(scores.HALVES[preset.half], results, self.not_run), *(f"{note}\n" for note in notes)]
        )


def commit() -> str:
    """Of the checkout that this file is in; with + where files differ from it."""
    words = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
