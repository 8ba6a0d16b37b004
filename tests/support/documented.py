"""The commands that README and the pages of docs/ print, and a folder that holds what they name, at tiny scale."""

from __future__ import annotations

import re
import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tiny import PROCESS, ROOT, TRAINING, network_flags, words
from tiny_clip import ARCH
from tiny_latent import DIT, MAPS, write_labelled_pairs, write_run
from tiny_text import tiny_config

from guided_mt.commands import classifier_train, train

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "mt-",
    "python ",
    "make ",
    "pip ",
    "mpiexec ",
    "torchrun ",
    "srun ",
    "mkdocs ",
    "docker ",
    "sbatch ",
    "kubectl ",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITHIN = re.compile(r"`((?:mt-diffusion|python (?:scripts|evaluations|benchmarks)/)[^`\n]* --[^`\n]*)`")
SHELL = ("sh", "bash", "console", "shell")


@dataclass(frozen=True)
class Command:
    """A line of a page, without the variables before it and the comment behind it."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"[:120]


@cache
def commands() -> tuple[Command, ...]:
    """Every command of every page, once each: in a block, fenced or indented, or with its flags within a sentence."""
    found: dict[Command, None] = {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        blocks = [block for language, block in FENCE.findall(text) if language in SHELL]
        rest = FENCE.sub("", text)
        blocks += [
            "\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^ {4}.*\n)+", rest, re.M)
        ]
        for block in blocks:
            for line in _lines(block):
                found[Command(page, line)] = None
        within = [line for line in WITHIN.findall(rest) if "..." not in line and "SUB-COMMAND" not in line]
        found |= dict.fromkeys(Command(page, line) for line in within)
    return tuple(found)


def _lines(block: str) -> list[str]:
    """The command lines of a block: continued lines joined, variables put in; prompts, comments, [optional words] and the
    file that the output goes to left out."""
    variables, lines = {}, []
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        line = re.sub(r"\s+#\s.*$|\s{3,}\S.*$", "", line.strip().removeprefix("$ "))
        line = re.sub(r"\s+\[[^\]]*\](?= |$)|\s+> \S+$", "", line)
        if match := re.fullmatch(r"(?:export )?(\w+)=(\"[^\"]*\"|\S*)", line):
            variables[match[1]] = match[2].strip('"')
            continue
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b|\${{{name}}}", lambda _, value=value: value, line)
        line = re.sub(r"^(?:[A-Z][A-Z_0-9]*=\S+ )+", "", line)
        if line.startswith(PROGRAMS):
            lines.append(line)
    return lines


# ---------------------------------------------------------------- what the commands name

SMALL = {**PROCESS, **TRAINING, "ema_rate": "0.5", "total_steps": 1}
CLASSIFIER = {"image_size": 8, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "4"}
PIXEL_RUNS = {  # flags of each kind of run
    "masked": {"mt_task": "masked", "mt_variant": "X", "mt_drop_prob": 0.1},
    "u": {"mt_task": "masked", "mt_variant": "U"},
    "label": {"mt_task": "label", "mt_variant": "any", "num_classes": 10, "mt_drop_prob": 0.1},
    "head-e": {"mt_task": "label", "mt_variant": "U", "mt_label_head": "E", "num_classes": 10, **CLASSIFIER},
    "both": {"mt_task": "masked,label", "mt_variant": "any", "num_classes": 10},
    "flow": {
        **{"mt_task": "masked,label", "mt_variant": "any", "num_classes": 10, "learn_sigma": False},
        **{"noise_schedule": "straight", "prediction": "velocity"},
    },
}
PIXEL_RUNS["transformer"] = {**PIXEL_RUNS["both"], "mt_backbone": "dit"}
CLIP = {"representation_source": "clip-image", "clip_weights": "untrained"}
LATENT_RUNS = {
    "pairs": MAPS,
    "text": {**tiny_config("v2-inference-v")["model"]["params"], "mt_sides": []},
    "clip": {
        **tiny_config("v2-inference-v")["model"]["params"],
        "mt_sides": [],
        "mt_variant": "any",
        "mt_tasks": {
            "representation": {**CLIP, "clip_arch": ARCH | {"embed_dim": 32}, "representation_token": "vector"}
        },
    },
    "dit": {**MAPS, "unet_config": {"target": "models.DiT", "params": DIT}},
    "joint": {
        "mt_sides": ["photo", "map", "edges"],
        "mt_swap_prob": {"map": 0.3, "edges": 0.3},
        "mt_variant": "any",
        "mt_tasks": {"label": {"num_classes": 10, "mt_label_head": "M"}, "masked": {"mask_max_patches": 2}},
    },
}
# The kind of run behind a name of the pages; behind any other name is one that its command can use.
NAMED = {
    "runs/u": "u",
    "runs/m": "label",
    "runs/e": "head-e",
    "runs/both": "both",
    "runs/dit": "transformer",
    "runs/flow": "flow",
    "runs/camvid_joint": "joint",
    "runs/cityscapes_dit_mt": "dit",
    "runs/cifar10_masked_label": "joint",
    "runs/labels": "label",
    "runs/my_text_model": "text",
    "runs/stable_diffusion_2_clip_small": "clip",
    "stable-diffusion-2": "text",
    "SD": "text",
    "CLASSIFIER": "classifier",
    "runs/classifier": "classifier",
}
USES = {
    "classify": "label",
    "classifier-sample": "masked",
    "figure6": "head-e",
    "classifier-train": "head-e",
    "export ldm": "pairs",
    "latent-sample": "pairs",
    "latent-restore": "joint",
    "latent-classify": "joint",
    "subsets": "pairs",
}


class Workplace:
    """A folder in which the commands run. Runs and data are made when a command first names them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        (folder / "latent_mt").symlink_to(ROOT / "latent_mt")
        (folder / "prompts.txt").write_text("a red fox in the snow\ntwo red cars\n")
        (folder / "evaluations").symlink_to(ROOT / "evaluations")

    def run(self, name: str, command: str, argv: Sequence[str] = ()) -> None:
        """Let there be a run, of the kind that `command` can use with these words, under this name."""
        kind = NAMED.get(name) or USES.get(command, "masked")
        if kind == "pairs" and any("label=" in word or "masked=" in word for word in argv):
            kind = "joint"
        place, home = self.folder / name, self.folder / "kinds" / kind
        if not home.exists():
            self._make(kind, home)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink():  # of another command
            place.unlink()
        elif place.exists():  # files that another command names
            shutil.rmtree(place)
        place.symlink_to(home)

    def picture(self, name: str) -> None:
        """Let there be a picture under this name."""
        Image.fromarray(self.pixels[0]).save(self.folder / name, format="PNG")

    def _make(self, kind: str, home: Path) -> None:
        if kind == "classifier":
            flags = {**CLASSIFIER, **PROCESS, **TRAINING, "num_classes": 10, "iterations": 1}
            classifier_train.main(words(**{key: flags[key] for key in flags if key != "learn_sigma"}, log_dir=home))
        elif kind in PIXEL_RUNS:
            chosen = PIXEL_RUNS[kind]
            train.main(words(**{**network_flags(chosen), **SMALL, **chosen, "log_dir": home}))
        else:
            data = (
                {"sides": ["photo", "map"], "computed": {"edges": "edges"}, "labels": "prefix"}
                if kind == "joint"
                else None
            )
            write_run(home, self.pairs(), data=data, **LATENT_RUNS[kind])

    def pairs(self) -> Path:
        """Photos and label maps in CamVid's layout; their names begin with two drives."""
        folder = self.folder / "pairs"
        return folder if folder.exists() else write_labelled_pairs(folder, drives=("a", "b"))

    def images(self, name: str) -> None:
        """Let there be images under this name: a folder with two classes, or an archive or array of such images."""
        place = self.folder / name
        if place.exists() or name.startswith("builtin:"):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".npz":
            np.savez(place, arr_0=self.pixels, arr_1=np.arange(16) % 10)
            return
        folder = place if not place.suffix else self.folder / "images" / place.stem
        for k, image in enumerate(self.pixels):
            (folder / str(k % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / str(k % 2) / f"{k}.png")
        if place.suffix == ".zip":
            with zipfile.ZipFile(place, "w") as archive:
                for file in sorted(folder.rglob("*.png")):
                    archive.write(file, file.relative_to(folder))
        elif place.suffix == ".tar":
            with tarfile.open(place, "w") as archive:
                archive.add(folder, ".")


def split(text: str) -> tuple[str, list[str]]:
    """(the sub-command of mt-diffusion that a line starts, its words), without launcher; ("", words) for other programs."""
    from mt_diffusion.commands import COMMANDS

    argv = shlex.split(text)
    if argv[0] in ("mpiexec", "torchrun", "srun"):
        start = next(k for k, word in enumerate(argv) if word in ("python", "mt-diffusion") or word.endswith(".py"))
        argv = argv[start:] if not argv[start].endswith(".py") else ["python", *argv[start:]]
    if argv[0] == "mt-diffusion":
        two = " ".join(argv[1:3])
        return (two, argv[3:]) if two in COMMANDS else (" ".join(argv[1:2]), argv[2:])
    if argv[0] == "python":
        return next((name for name, row in COMMANDS.items() if row.script == argv[1]), ""), argv[2:]
    short = {"mt-train": "train", "mt-sample": "sample", "mt-restore": "restore", "mt-evaluate": "evaluate"}
    return short.get(argv[0], ""), argv[1:]
