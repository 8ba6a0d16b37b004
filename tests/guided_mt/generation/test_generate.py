"""What a Generator makes of a request, on untrained models."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import MODEL, PROCESS, words

from guided_mt.errors import UserError
from guided_mt.generation import generate
from guided_mt.generation.build import build_modalities, build_model, run_sections
from guided_mt.generation.generate import Generator
from guided_mt.modalities.classes import choose_classes
from guided_mt.runs.config import SampleConfig, parse


def untrained(**values: Any) -> Generator:
    config = parse(words(**MODEL, **PROCESS, **values), run_sections(), description="")
    return Generator(config, build_model(config), build_modalities(config), None)


def test_the_patches_of_masks_are_those_of_training_or_what_is_asked_for():
    assert untrained(mt_task="masked", mask_patch=3).mask_patch == 3 and untrained(mt_task="masked").mask_patch == 2
    assert untrained(mt_task="none").mask_patch == 2 and untrained(mt_task="none", mask_patch=5).mask_patch == 5


def test_a_default_of_form_x_is_independent_of_the_samples_class(monkeypatch):
    """Where both are drawn from one stream, the label at random is the class."""
    seeds, given = range(200), {}
    generator = untrained(class_cond=True, num_classes=10, mt_task="random-label", mt_variant="X")
    monkeypatch.setattr(generate, "draw", lambda *args, known, **options: given.update(known))
    classes = choose_classes([str(k) for k in range(10)], "", seeds)
    generator.draw(seeds, SampleConfig(), labels=classes)
    assert 5 <= int((given["random-label"] == classes).sum()) <= 40  # 20 expected, with deviation 4.2


@pytest.mark.parametrize(
    ("trained", "saw"),
    [
        ({"mt_task": "none"}, True),
        ({"mt_task": "masked", "mt_variant": "X"}, True),
        ({"mt_task": "masked", "mt_variant": "X", "mask_full_prob": 0}, False),
        ({"mt_task": "masked", "mt_variant": "X", "mask_full_prob": 0, "mt_drop_prob": 0.1}, True),
        ({"mt_task": "random-label", "mt_variant": "X", "num_classes": 10}, False),
        ({"mt_task": "masked,random-label", "mt_variant": "X", "num_classes": 10}, False),
        ({"mt_task": "masked", "mt_variant": "U"}, False),
        ({"mt_task": "masked", "mt_variant": "U", "mt_weights": "none"}, True),
        ({"mt_task": "masked", "mt_variant": "any"}, False),
    ],
)
def test_sdedit_repaint_and_classifiers_need_a_model_that_saw_plain_noise(trained, saw):
    generator = untrained(**trained)
    if saw:
        generator.unconditional()
        return
    with pytest.raises(UserError, match="never saw plain noisy images"):
        generator.unconditional()
