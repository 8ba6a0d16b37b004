"""The command line as a sub-command sees it, and as it was typed."""

from __future__ import annotations

import sys

import pytest
from tiny_latent import write_config, write_pairs

from latent_mt.runs.program import as_typed, shown_as
from mt_diffusion import console


def test_shown_and_typed(monkeypatch):
    typed = ["/bin/mt-diffusion", "latent-train", "--limit", "3"]
    monkeypatch.setattr(sys, "argv", typed)
    with shown_as("mt-diffusion latent-train", ["--limit", "3"]):
        assert sys.argv == ["mt-diffusion latent-train", "--limit", "3"]
        with as_typed():
            assert sys.argv is typed
        with shown_as("inner", []), as_typed():
            assert sys.argv is typed
        assert sys.argv[0] == "mt-diffusion latent-train"
    assert sys.argv is typed
    with as_typed():
        assert sys.argv is typed


def test_lightning_starts_its_processes_by_what_was_typed(tmp_path, monkeypatch):
    """Its other processes are `python sys.argv...`, so that the words have to be whole while it fits."""
    lightning = pytest.importorskip("pytorch_lightning")
    seen = []
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args, **keywords: seen.append(list(sys.argv)))
    file = write_config(tmp_path / "tiny.yaml", write_pairs(tmp_path / "pairs"), tmp_path / "run")
    typed = ["/bin/mt-diffusion", "latent-train", "--config", str(file)]
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(SystemExit) as stopped:
        console.main()
    assert stopped.value.code == 0 and seen == [typed]
