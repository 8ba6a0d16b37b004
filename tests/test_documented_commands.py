"""Every command that README and the pages of docs/ print is run at tiny scale, in a folder that holds what it names, or is listed
here with the reason why not. A command that is in neither fails."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from documented import PAGES, Command, Workplace, commands, split
from PIL import Image
from small_inception import use_small_backend
from tiny import ROOT
from tiny_latent import CLASSES

from latent_mt.commands import encode_latents
from latent_mt.commands.arguments import read_arguments
from latent_mt.commands.training import read_command
from latent_mt.first_stage.first_stages import ConvolutionalAutoencoder
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from mt_diffusion.commands import COMMANDS
from mt_diffusion.completion import flags_of
from reproduce import compare, table4

# Words that make a command tiny, by sub-command: behind those that are printed, so that they count.
DRY = ["--dry_run", "True", "--log_dir", "trained"]
DRAW = ["--num_samples", "2", "--steps", "2", "--device", "cpu"]
TINY: dict[str, list[str]] = {
    "train": DRY,
    "classifier-train": DRY,
    "sample": DRAW,
    "classifier-sample": DRAW,
    "restore": DRAW,
    "latent-sample": DRAW,
    "latent-restore": DRAW,
    "subsets": DRAW,
    "classify": ["--num_samples", "4", "--draws", "1", "--device", "cpu"],
    "latent-classify": ["--num_samples", "2", "--draws", "1", "--device", "cpu"],
    "nll": ["--num_samples", "2", "--timestep_respacing", "2", "--device", "cpu"],
    "prepare": ["--limit", "16", "--size", "8"],
    "figure6": ["--dry_run", "True"],
    "compare": [],
    "export adm": [],
    "export ldm": [],
    "export diffusers": [],
    "evaluate": ["--no_cache"],
    "reference": [],
    "score restoration": [],
    "score segmentation": [],
    "score classification": [],
    "presets": [],
    "show": [],
    "completion": [],
}
# Of these only the words are read, by the command's own parser: what they train and encode is proved by the tests of each.
READ: dict[str, Callable[[list[str]], object]] = {
    "autoencoder-train": lambda argv: read_command(read_arguments(argv, ""), ConvolutionalAutoencoder),
    "latent-train": lambda argv: read_command(read_arguments(argv, ""), LatentMTDiffusion),
    "encode": encode_latents._parse,
    "table4": table4.read_arguments,
}
SMALLER = {
    "label=207": "label=7",
    "FILE": "latent_mt/configs/camvid_mt.yaml",
}  # printed words that stand for others here
# Commands that are not run here, as regular expressions, and why.
NOT_RUN = {
    r"mt-diffusion demo.*": "trains for minutes; test_demo.py runs all of its stages for two steps",
    r"python (midpoint|narrow_bridge|edm|soft_min_snr|uvit|idx|coverage|latents)\.py .*": "run by test_architecture.py",
    r"mt-diffusion transfer .*": "trains for hours; test_transfer.py runs all of its stages for two steps",
    r"mt-diffusion joint-clip .*": "trains for an hour; test_joint_clip.py runs all of its stages for a step",
    r"mt-diffusion (latent-)?classify .*--texts .*": "needs a model of representations; test_zero_shot.py",
    r"mt-diffusion show downloads/.*": "a file from elsewhere; the tests of show make some",
    r"mt-diffusion (train --mt_task caption|caption |sample .*caption=).*": "needs captions; test_caption_modality.py",
    r".*--(?:model_path|classifier_path) \S+\.(?:pt|ckpt)\b.*": "needs weights of the parents, which have to be downloaded",
    r".*--config models/.*": "needs a file of latent-diffusion's repository; test_configuration.py reads all of them",
    r"python benchmarks/.*": "measures for minutes",
    r".*python mean_colour\.py .*|python latent_colour\.py .*": "run by test_docs.py",
    r".* score restoration .*--table.*": "needs AlexNet's weights, which have to be downloaded",
}
RUNS = ("--model_path", "--classifier_path", "--joint", "--resume_checkpoint")
IMAGES = ("--data_dir", "--val_data_dir", "--paired_dir")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def tools(workplace, monkeypatch):
    """Inception and the hours of a comparison are replaced; the working folder is the workplace."""
    monkeypatch.chdir(workplace.folder)
    use_small_backend(monkeypatch, workplace.folder / "cache")
    monkeypatch.setattr(compare.Comparison, "main", lambda self: None)


def reason(command: Command) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command.text)), None)


@pytest.mark.parametrize("command", [one for one in commands() if reason(one) is None], ids=str)
def test_a_command_of_the_pages_runs(command, workplace, tools):
    program, *rest = command.text.split()
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
        return
    if program == "pip":
        installed = re.search(r"\.\[(.*?)\]", command.text)
        listed = (
            (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        )
        extras = re.findall(r"^(\w+) = ", listed, re.MULTILINE)
        assert set(installed[1].split(",")) <= set(extras) if installed else rest[:1] == ["install"]
        return
    name, argv = split(command.text)
    argv = [SMALLER.get(word, word) for word in argv]
    if name in READ:
        READ[name](argv)
        return
    assert name in TINY, f"{command}: no test runs this; make it run here, or list it in NOT_RUN with the reason"
    prepare(name, argv, workplace)
    COMMANDS[name].load().main([*argv, *tiny(name, argv)])


def prepare(name: str, argv: list[str], workplace: Workplace) -> None:
    """What the words name is put into the workplace."""
    for flag, value in itertools.pairwise(argv):
        if flag in RUNS and not value.startswith("-"):
            workplace.run(value, name, argv)
        elif flag in IMAGES:
            for part in value.split(","):
                workplace.images(part)
        elif flag == "--given" and value.startswith(("masked=", "representation=")):
            file = value.partition("=")[2]
            workplace.picture(file) if file.endswith((".png", ".jpg")) else workplace.images(file)
        elif flag == "image":  # of --mask
            workplace.picture(value)
    for word in {"evaluate": argv[:2], "reference": argv[:1], "prepare": argv[:1], "show": argv[:1]}.get(name, ()):
        is_run = word.startswith("runs/") and not Path(word).suffix
        workplace.run(word, "sample") if is_run else workplace.images(word)
    if name.startswith("score"):
        write_scored(name, argv, workplace.folder)


def write_scored(name: str, argv: list[str], folder: Path) -> None:
    """The files that a score reads."""
    rng = np.random.default_rng(0)
    files = argv[: next((k for k, word in enumerate(argv) if word[:2] == "--"), None)]
    for file in (folder / word.rpartition("=")[2] for word in files):
        file.parent.mkdir(parents=True, exist_ok=True)
        if name == "score classification":
            for step in (1, 2) if "*" in file.name else (0,):
                p = rng.dirichlet(np.ones(10), 20)
                np.savez(str(file).replace("*", f"s_step_{step}"), probabilities=p, labels=np.arange(20) % 10)
        elif name == "score segmentation":
            (folder / "classes.txt").write_text(CLASSES)
            colours = np.array([[128, 64, 128], [70, 70, 70], [0, 0, 142]], np.uint8)  # of Cityscapes
            if "--classes" in argv:
                colours = np.array([[128, 128, 128], [128, 64, 128], [64, 0, 128]], np.uint8)
            if "--label_ids" in argv:
                colours = np.array([7, 11, 26], np.uint8)
            maps = colours[rng.integers(0, 3, (4, 8, 8))]
            if file.suffix:
                np.savez(file, arr_0=maps)
            else:
                file.mkdir(exist_ok=True)
                for k, one in enumerate(maps):
                    Image.fromarray(one).save(file / f"{k}.png")
        else:
            images = rng.integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)
            mask = np.zeros((4, 16, 16), dtype=np.uint8)
            mask[:, 4:8, 4:8] = 255
            np.savez(file, arr_0=images[0], original=images[1], masked=images[2], mask=mask)


def tiny(name: str, argv: list[str]) -> list[str]:
    """The words of TINY, without those that the printed ones rule out."""
    more = list(TINY[name])
    if "--seeds" in argv and "--num_samples" in more:
        more[more.index("--num_samples") : more.index("--num_samples") + 2] = ["--num_samples", "2", "--seeds", "0-1"]
    if "--timestep_respacing" in argv and "--steps" in more:
        del more[more.index("--steps") : more.index("--steps") + 2]
    return more


def test_every_reason_has_its_command():
    printed = [command.text for command in commands()]
    assert not [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, text) for text in printed)]


def test_commands_that_are_not_run_have_flags_that_exist():
    for command in commands():
        name, argv = split(command.text)
        if reason(command) and name in COMMANDS:
            assert {word.partition("=")[0] for word in argv if word.startswith("--")} <= set(flags_of(name)), command


def test_what_is_named_within_a_sentence_is_a_command():
    known = {name.split()[0] for name in COMMANDS} | {"NAME", "SUB-COMMAND"}
    for page in PAGES:
        named = set(re.findall(r"mt-diffusion ([a-zA-Z][\w-]*)", (ROOT / page).read_text()))
        assert named <= known, (page, named - known)


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000
