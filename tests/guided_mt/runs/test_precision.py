"""bf16 where the CPU has no instructions for it: who falls back to fp32, who is warned, and who goes on as it began."""

from __future__ import annotations

import pytest
import torch
from tiny import flags, step_folder, words

from guided_mt.commands import classify, sample, train
from guided_mt.runs import precision
from guided_mt.runs.checkpoint import read_config
from guided_mt.runs.precision import choose, features_of, has_instructions

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FELL = "precision fp32 and not bf16, for which this CPU has no instructions"
SLOW = "warning: bf16 on this CPU, which has no instructions for it, is many times slower than fp32"
KEPT = "precision bf16, as the run began"


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)


@pytest.mark.parametrize(
    ("cpuinfo", "there"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\nflags : fpu\n", True),
        ("processor : 0\nFeatures\t: fp asimd bf16 i8mm\n", True),  # ARM
        ("processor : 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_what_linux_lists(cpuinfo, there):
    assert has_instructions(features_of(cpuinfo)) is there


def test_this_cpu_is_asked_once_and_in_every_torch(monkeypatch):
    precision.cpu_has_bf16.cache_clear()
    with_torch = precision.cpu_has_bf16()
    precision.cpu_has_bf16.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.cpu_has_bf16() is with_torch
    precision.cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "device", "typed", "own", "expected"),
    [
        ("bf16", CPU, False, "", ("fp32", [FELL])),
        ("bf16", CPU, True, "", ("bf16", [SLOW])),
        ("bf16", GPU, False, "", ("bf16", [])),
        ("fp32", CPU, False, "", ("fp32", [])),
        ("fp16", CPU, False, "", ("fp16", [])),
        ("fp32", CPU, False, "bf16", ("bf16", [KEPT, SLOW])),  # begun elsewhere: it goes on as it is
        ("bf16", GPU, False, "fp32", ("fp32", ["precision fp32, as the run began"])),
        ("bf16", CPU, False, "fp32", ("fp32", ["precision fp32, as the run began"])),
        ("fp32", CPU, True, "bf16", ("fp32", [])),
        ("bf16", CPU, False, "bf16", ("bf16", [SLOW])),
    ],
)
def test_the_choice(wanted, device, typed, own, expected, without):
    assert choose(wanted, device, typed=typed, own=own) == expected


def test_with_instructions_nothing_changes(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert choose("bf16", CPU, typed=False) == ("bf16", [])


def announced(capsys) -> list[str]:
    return [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("# ") and "fp32" in line]


def test_training_sampling_and_classifying(without, tmp_path, capsys):
    """A file of settings falls back, and its run is fp32's from then on; a run begun in bf16 is drawn from in fp32."""
    (tmp_path / "settings.yaml").write_text("precision: bf16\n")
    label = {"mt_task": "label", "mt_variant": "U", "num_classes": 10, "total_steps": 1, "data_workers": 0}
    command = flags(log_dir=tmp_path / "run", **label)
    train.main([*command, "--config", str(tmp_path / "settings.yaml")])
    assert announced(capsys) == [FELL]
    saved = step_folder(tmp_path / "run", 1)
    assert read_config(saved / "model.safetensors")["precision"] == "fp32"
    train.main([*command, "--dry_run", "True", "--precision", "bf16"])
    assert announced(capsys) == [SLOW]
    settings = saved / "config.yaml"
    settings.write_text(settings.read_text().replace("precision: fp32", "precision: bf16"))
    train.main([*command, "--dry_run", "True"])
    assert announced(capsys) == [SLOW]
    drawing = words(model_path=tmp_path / "run", device="cpu", dry_run=True)
    sample.main(drawing)
    classify.main(drawing)
    assert announced(capsys) == [FELL, FELL]
