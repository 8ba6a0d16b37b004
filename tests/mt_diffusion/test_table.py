"""The table of sub-commands, and `mt-diffusion` as a program."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from conftest import ROOT
from tiny import MODEL, PROCESS, words

from guided_mt.commands import train
from guided_mt.errors import EXTRAS
from mt_diffusion import console, first_page
from mt_diffusion.commands import COMMANDS, GROUPS
from mt_diffusion.flags import usage_of

LARGE = ("torch", "numpy", "pytorch_lightning", "omegaconf", "PIL")


def program(monkeypatch, *argv: str) -> int:
    """The exit code of the console command."""
    monkeypatch.setattr(sys, "argv", ["/bin/mt-diffusion", *argv])
    with pytest.raises(SystemExit) as stopped:
        console.main()
    assert sys.argv == ["/bin/mt-diffusion", *argv]
    return int(stopped.value.code or 0)


def test_every_script_is_a_sub_command():
    scripts = {f"scripts/{file.name}" for file in (ROOT / "scripts").glob("[!_]*.py")}
    scripts |= {
        f"evaluations/{file.name}" for file in (ROOT / "evaluations").glob("*.py") if "__main__" in file.read_text()
    }
    assert {command.script for command in COMMANDS.values() if command.script} == scripts
    for command in COMMANDS.values():
        if command.script.startswith("scripts/"):
            assert f"from {command.module} import console" in (ROOT / command.script).read_text()


def test_rows_are_whole():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, command in COMMANDS.items():
        assert command.group in GROUPS and 10 < len(command.summary) < 80, name
        assert command.extra in ("", *extras), name
    for package, extra in EXTRAS.items():
        own = "pytorch_lightning" if package == "lightning_fabric" else package  # which comes with it
        assert any(word.replace("-", "_").startswith(own) for word in extras[extra]), package


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_of_the_sub_command(name):
    """Its name, an example of it, and something to say of every flag."""
    usage = usage_of(name)
    assert usage.usage.startswith(f"usage: mt-diffusion {name} ")
    examples = [line.strip() for line in usage.description.splitlines() if "mt-diffusion " in line]
    assert any(f"mt-diffusion {name}" in line for line in examples), usage.description
    assert all(flag.help for flag in usage.flags())


def test_help_through_the_program(monkeypatch, capsys):
    assert program(monkeypatch, "score", "segmentation", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: mt-diffusion score segmentation [-h]")


def test_alone_it_says_where_to_begin(monkeypatch, capsys):
    assert program(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert printed.count("mt-diffusion ") >= 8 and "5. " in printed and "docs/" in printed
    assert program(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and command.summary in printed for name, command in COMMANDS.items())


def test_the_first_steps_run_as_printed(tmp_path, monkeypatch, capsys):
    """Their flags are valid and the folders that they name are those that the steps before write."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/demo")
    own = {**MODEL, **PROCESS, "mt_task": "masked", "data_dir": "builtin:digits", "device": "cpu", "data_workers": 0}
    train.main(words(**own, total_steps=1, global_batch_size=4, log_dir=run))
    for _, line in first_page.STEPS:
        name, *rest = shlex.split(line)[1:]
        if name != "demo":  # which has a test of its own
            assert program(monkeypatch, name, *rest, *([] if name == "show" else ["--dry_run", "True"])) == 0, line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown sub-command 'trian' (did you mean train?)"),
        (["image_sample"], "unknown sub-command 'image_sample' (did you mean sample?)"),
        (["scripts/image_train.py"], "unknown sub-command 'scripts/image_train.py' (did you mean train?)"),
        (["encode_latents.py"], "(did you mean encode?)"),
        (["export", "onnx"], "export onnx: unknown; there are adm, ldm"),
        (["score", "segmentatoin"], "(did you mean segmentation?)"),
        (["--lr", "1"], "the sub-command comes first, as in mt-diffusion train --lr"),
        (["presets", "camvid_mtt"], "unknown preset 'camvid_mtt' (did you mean camvid_mt?)"),
    ],
)
def test_bad_input(argv, said, monkeypatch, capsys):
    assert program(monkeypatch, *argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1


def test_two_words_alone(monkeypatch, capsys):
    assert program(monkeypatch, "export", "--help") == 0
    assert "mt-diffusion export adm" in capsys.readouterr().out
    assert program(monkeypatch, "export") == 2
    assert "mt-diffusion export ldm" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    for module in [name for name in sys.modules if name.startswith("latent_mt.training")]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("run", "trained_module"):
        monkeypatch.delitem(sys.modules, f"latent_mt.runs.{module}", raising=False)
    assert program(monkeypatch, "latent-train", "--config", "camvid_mt") == 2
    assert capsys.readouterr().err.startswith(
        "error: the package pytorch_lightning is missing: pip install -e '.[latent]'"
    )


def test_what_it_imports_before_a_sub_command_is_known():
    code = (
        "import sys, mt_diffusion.console as c; from mt_diffusion import first_page, completion, presets;"
        "first_page.first_steps(); first_page.all_commands(); completion.candidates('mt-diffusion train --pre');"
        f"presets.main([]); print([name for name in {LARGE} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
