"""reproduce/compare.py: its twins, the classifier that reads their images, and one tiny comparison from end to end."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from tiny import words
from torch import nn

from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError
from guided_mt.generation.feature_classifier import FeatureClassifier
from guided_mt.generation.noisy_classifier import NoisyClassifier, build_classifier, classifier_sections
from guided_mt.runs.config import load_preset, parse
from reproduce import compare

OWN = ("mt_", "classifier_")  # flags that say what a model is; all others are the training's


def untrained(pool: str) -> NoisyClassifier:
    """A tiny classifier with no zero-initialised layers."""
    settings = {"image_size": 8, "num_classes": 10, "classifier_width": 32, "classifier_depth": 1}
    settings |= {"classifier_attention_resolutions": "4", "classifier_pool": pool}
    config = parse(words(**settings), classifier_sections(), description="")
    torch.manual_seed(0)
    model = build_classifier(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return NoisyClassifier(model, None, config)


def test_feature_classifier_gives_the_input_of_the_last_layer():
    classifier = untrained("adaptive")
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)  # more than one pass
    read = FeatureClassifier(classifier).classify(images)
    last = classifier.model.out[-2]
    logits = read.features @ last.weight[:, :, 0, 0].detach().numpy().T + last.bias.detach().numpy()
    expected = classifier.model(from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.zeros(300))
    torch.testing.assert_close(torch.from_numpy(logits), expected.detach(), atol=1e-5, rtol=1e-4)
    assert read.features.shape == (300, 64) and (read.classes == expected.argmax(dim=1).numpy()).all()


def test_feature_classifier_refuses_another_pool():
    with pytest.raises(UserError, match="--classifier_pool adaptive, not attention"):
        FeatureClassifier(untrained("attention"))


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_rows_are_twins(data):
    """The presets of one data set differ in what the model is, and in nothing that training is."""
    names = (
        "label-{}-m",
        "label-{}-e",
        "masked-{}",
        "masked-label-{}",
        *(["random-label-{}"] if data == "digits" else []),
    )
    shared = []
    for name in names:
        preset = load_preset(name.format(data))
        shared.append({k: v for k, v in preset.items() if not k.startswith(OWN) and k != "num_classes"})
    assert all(flags == shared[0] for flags in shared)


def test_random_label_is_label_m_with_another_task():
    m, random = load_preset("label-digits-m"), load_preset("random-label-digits")
    assert random == {**m, "mt_task": "random-label"}


@pytest.fixture
def compare_rows(monkeypatch, capsys) -> Callable[..., str]:
    """A comparison of two rows, trained for two steps; what it prints."""
    monkeypatch.setattr(compare, "run_child", warm.run_child)

    def run(folder: Path, *more: str) -> str:
        few = {"steps": 2, "seeds": 0, "rows": "label-m,masked", "samples": 8, "classifier_steps": 2}
        compare.main([*words(run=folder, **few), *more])
        return capsys.readouterr().out

    return run


def test_compare(compare_rows, tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    compare_rows(run)
    rows = {row["row"]: row for row in csv.DictReader((run / "compare.csv").open())}
    assert list(rows) == ["label-m", "masked", "training images, their mean"]
    numbers = {name: {key for key, value in row.items() if value} - {"row", "seed"} for name, row in rows.items()}
    both = {"frechet", "class_frequencies", "seconds_per_step"}
    assert numbers["label-m"] == both | {"frechet_given", "accuracy", "joint_agreement", "given_agreement"}
    assert numbers["masked"] == both | {"restoration"}
    assert numbers["training images, their mean"] == {"frechet", "class_frequencies", "restoration"}
    assert 0 < float(rows["training images, their mean"]["restoration"]) < 0.5
    table = (run / "compare.md").read_text()
    assert "| masked |" in table and "2 training steps, seeds 0" in table
    assert (run / "compare.png").exists()
    # again: nothing is left to do but the report
    assert " train -> " not in (again := compare_rows(run)) and "compare.csv" in again


def test_numbers_that_are_none(compare_rows, tmp_path):
    for words_typed in ("--steps -3", "--samples 0", "--jobs 0"):
        with pytest.raises(UserError, match=rf"{words_typed}: must be at least"):
            compare_rows(tmp_path / "run", *words_typed.split())
    assert list(tmp_path.iterdir()) == []
