"""Commands as words: which process they start, and how they are shown."""

from __future__ import annotations

import sys
from pathlib import Path

from reproduce import commands


def test_one_process():
    words = commands.command("export adm", "--out", Path("a b.pt"))
    assert words == [sys.executable, "-m", "mt_diffusion", "export", "adm", "--out", "a b.pt"]
    assert commands.shown(words) == "mt-diffusion export adm --out 'a b.pt'"


def test_several_processes(monkeypatch):
    monkeypatch.setattr(commands, "launcher", lambda: "/opt/mpiexec")
    words = commands.command("train", "--lr", 0.1, processes=2)
    assert words[:3] == ["/opt/mpiexec", "-n", "2"] and words[-4:] == ["mt_diffusion", "train", "--lr", "0.1"]
    assert commands.shown(words).startswith("mpiexec -n 2 ") and commands.shown(words).endswith(
        " mt-diffusion train --lr 0.1"
    )
    monkeypatch.setattr(commands, "launcher", lambda: None)
    assert commands.command("train", processes=2) == commands.command("train")
