"""Completion: what is offered, and that bash takes it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.runs import presets
from latent_mt import configs
from mt_diffusion.commands import COMMANDS
from mt_diffusion.completion import SCRIPTS, candidates

PROGRAM = f'mt-diffusion() {{ PYTHONPATH="{ROOT}" "{sys.executable}" -m mt_diffusion "$@"; }}'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mt-diffusion sc", ["score"]),
        ("mt-diffusion score ", ["restoration", "segmentation", "classification"]),
        ("mt-diffusion export l", ["ldm"]),
        ("mt-diffusion latent-train --con", ["--config"]),
        ("mt-diffusion sample --sampler uni", ["unipc", "unipc3"]),
        ("mt-diffusion sample --sampler=uni", ["--sampler=unipc", "--sampler=unipc3"]),
        ("mt-diffusion sample --sampler ", list(SAMPLERS)),
        ("mt-diffusion train --dry_run T", ["True"]),
        ("mt-diffusion train --preset masked-dig", ["masked-digits"]),
        ("mt-diffusion train --preset ", presets.names()),
        ("mt-diffusion transfer --judge_s", ["--judge_steps"]),
        ("mt-diffusion transfer --preset five-e", ["five-emoji32"]),  # a flag that it passes on to train
        ("mt-diffusion figure6 --classifier_po", ["--classifier_pool"]),
        ("mt-diffusion latent-train --config camvid_m", ["camvid_mt"]),
        ("mt-diffusion latent-train --config camvid_mt run.total", ["run.total_steps="]),
        ("mt-diffusion latent-train --config camvid_mt model.params.mt_v", ["model.params.mt_variant="]),
        ("mt-diffusion table4 --preset day", ["daynight"]),
        ("mt-diffusion presets cityscapes_s", ["cityscapes_single"]),
        ("mt-diffusion completion f", ["fish"]),
        ("mt-diffusion train --data_dir ", []),  # files, which the shell knows
        ("mt-diffusion train --lr ", []),
        ("mt-diffusion nothing --x", []),
        ("mt-diffusion show ", []),
    ],
)
def test_candidates(line, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert candidates(line) == expected


def test_sub_commands_are_offered_first():
    assert candidates("mt-diffusion ") == list(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS))


def test_files_beside_names(tmp_path, monkeypatch):
    (tmp_path / "camvid_own.yaml").touch()
    (tmp_path / "camvid_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    found = candidates("mt-diffusion latent-train --config camvid_")
    assert found == [
        *(name for name in configs.names() if name.startswith("camvid_")),
        "camvid_folder/",
        "camvid_own.yaml",
    ]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_in_bash(tmp_path):
    """As a user presses the key: the function is called with the line, and COMPREPLY is what is offered."""
    script = SCRIPTS["bash"] + (
        f"{PROGRAM}\n"
        'ask() { COMP_LINE=$1; COMP_POINT=${#1}; _mt_diffusion; echo "${COMPREPLY[*]}"; }\n'
        'compopt() { echo "nospace"; }\n'
        "complete -p mt-diffusion\n"
        "ask 'mt-diffusion sample --sampler=uni'\nask 'mt-diffusion latent-train run.total'\nask 'mt-diffusion show x'\n"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "complete -o bashdefault -o default -F _mt_diffusion mt-diffusion",
        "unipc unipc3",  # after = bash replaces what follows it alone
        "nospace",
        "run.total_steps=",
        "",
    ], done.stdout + done.stderr


ZSH = """
compdef() { :; }
compadd() { echo "compadd $*"; }
_files() { echo files; }
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_in_zsh(tmp_path):
    """The function with the words of a line, and zsh's own functions written down."""
    lines = [["sample", "--sampler", "uni"], ["latent-train", "run.total"], ["show", ""]]
    asked = [f"words=(mt-diffusion {shlex.join(line)}); CURRENT={len(line) + 1}; _mt_diffusion" for line in lines]
    script = "\n".join([ZSH, SCRIPTS["zsh"], PROGRAM, *asked])
    done = subprocess.run(["zsh", "-f", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    expected = ["compadd -- unipc unipc3", "compadd -S  -- run.total_steps=", "files"]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_in_fish(tmp_path):
    program = f'function mt-diffusion; PYTHONPATH="{ROOT}" "{sys.executable}" -m mt_diffusion $argv; end'
    asked = [f'complete -C "mt-diffusion {line}"' for line in ("sample --sampler uni", "latent-train run.total", "sc")]
    script = "\n".join([program, SCRIPTS["fish"], *asked])
    done = subprocess.run(
        ["fish", "--no-config", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["unipc", "unipc3", "run.total_steps=", "score"], done.stdout + done.stderr
