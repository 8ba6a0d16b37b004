"""What the configuration of a run in pixel space says, and what can be done with the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from guided_mt.modalities.row_config import split_names
from guided_mt.runs.recognise import run_family

from .facts import Facts, quoted

NOT_FLAGS = ("dry_run", "log_dir")  # of no interest in how a run was trained


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is of a noisy classifier."""
    return run_family(config) == "classifier"


def rows_of(config: Mapping[str, Any]) -> dict[str, str]:
    """{modality: row of TASKS}."""
    return split_names(str(config.get("mt_task", "none")))


def title(config: Mapping[str, Any]) -> str:
    """What the model of a configuration is, in a few words."""
    names = rows_of(config)
    size = f" of {config['image_size']} pixels" if "image_size" in config else ""
    if not names:
        conditional = "class-conditional " if config.get("class_cond") else ""
        return f"a single-task {conditional}model of images{size}"
    return f"a model of images{size} with {' and '.join(names)}, form {config.get('mt_variant', 'auto')}"


def settings(facts: Facts, config: Mapping[str, Any]) -> None:
    """Add the settings that say what the model is."""
    if not config:
        return
    if not is_classifier(config):
        names = rows_of(config)
        facts.add("task", [name if name == row else f"{name} ({row})" for name, row in names.items()] or "none")
        facts.add("form", config.get("mt_variant") if names else None)
    facts.add("image size", config.get("image_size"))
    facts.add("number of classes", config.get("num_classes") if _has_classes(config) else None)
    steps = config.get("diffusion_steps")
    facts.add("noise", f"{steps} steps, {config.get('noise_schedule')} schedule" if steps else None)
    facts.add("precision", config.get("precision"))
    facts.add("trained with", " ".join(differing(config)))


def _has_classes(config: Mapping[str, Any]) -> bool:
    return is_classifier(config) or bool(config.get("class_cond")) or "label" in rows_of(config).values()


def differing(config: Mapping[str, Any]) -> list[str]:
    """The flags whose values are not the defaults, as they would be typed."""
    words = []
    for section in sections(config):
        for field in dataclasses.fields(section):
            value = config.get(field.name, field.default)
            if str(value) != str(field.default) and field.name not in NOT_FLAGS:
                words.append(f"--{field.name} {quoted(value)}")
    return list(dict.fromkeys(words))


def sections(config: Mapping[str, Any]) -> Sequence[type]:
    """The dataclasses of options that the configuration was written with."""
    if is_classifier(config):
        from guided_mt.training.classifier_loop import classifier_run_sections

        return classifier_run_sections()
    from guided_mt.generation.build import run_sections

    return run_sections()


def commands(facts: Facts, config: Mapping[str, Any], path: str) -> None:
    """What takes a trained model of this configuration."""
    held_out = "builtin:digits-test" if config.get("data_dir") == "builtin:digits" else "IMAGES"
    if is_classifier(config):
        facts.command("classes of images", "classify", "--classifier_path", path, "--data_dir", held_out)
        facts.command("guide a model by it", "classifier-sample", "--model_path", "RUN", "--classifier_path", path)
        return
    model, names = ("--model_path", path), rows_of(config)
    facts.command("new images", "sample", *model, "--num_samples", 16)
    for name, row in names.items():
        if row == "masked":
            facts.command("masked images", "restore", *model, "--data_dir", held_out, "--mask", "patches:10")
        elif row == "label":
            facts.command("images of class 0", "sample", *model, "--num_samples", 16, "--given", f"{name}=0")
            if config.get("mt_variant") != "X":
                facts.command("classes of images", "classify", *model, "--data_dir", held_out)
        elif row in ("paired", "representation"):
            facts.command(f"images of given {name}", "sample", *model, "--num_samples", 16, "--given", f"{name}=FILE")
    if config.get("class_cond"):
        facts.command("images of class 0", "sample", *model, "--num_samples", 16, "--class", 0)
    facts.command("likelihood", "nll", *model, "--data_dir", held_out)
    facts.command("for guided-diffusion", "export", "adm", *model, "--out", "model.pt")
