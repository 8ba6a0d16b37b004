"""What the configuration of a run in latent space says, and what can be done with the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .facts import Facts

AUTOENCODERS = ("AutoencoderKL", "VQModel", "VQModelInterface")


def params(config: Mapping[str, Any], part: str = "model") -> Mapping[str, Any]:
    section = config.get(part)
    found = section.get("params") if isinstance(section, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def class_name(config: Mapping[str, Any], part: str = "model") -> str:
    section = config.get(part)
    return str(section.get("target", "")).rpartition(".")[2] if isinstance(section, Mapping) else ""


def is_autoencoder(config: Mapping[str, Any]) -> bool:
    return class_name(config) in AUTOENCODERS


def modalities(config: Mapping[str, Any]) -> dict[str, str]:
    """{modality: row of TASKS} beside the first image: the other sides, and mt_tasks."""
    found = {str(side): "paired" for side in list(params(config).get("mt_sides") or [])[1:]}
    for name, entry in (params(config).get("mt_tasks") or {}).items():
        row = str((entry or {}).get("task", name))
        if row != "paired" or not found:
            found[str(name)] = row
    return found


def title(config: Mapping[str, Any]) -> str:
    if is_autoencoder(config):
        return f"a first stage ({class_name(config)})"
    sides = list(params(config).get("mt_sides") or [])[:1]
    words = [*map(str, sides), *modalities(config)]
    if not modalities(config):
        key = params(config).get("conditioning_key")
        return f"a single-task latent diffusion model{f', conditioned by {key}' if key else ''}"
    first = "" if sides else "images with "
    return f"a latent model of {first}{' and '.join(words)}, form {params(config).get('mt_variant', 'any')}"


def settings(facts: Facts, config: Mapping[str, Any]) -> None:
    model, data = params(config), params(config, "data")
    facts.add("class", config["model"].get("target"))
    facts.add("task", [name if name == row else f"{name} ({row})" for name, row in modalities(config).items()])
    if not is_autoencoder(config):
        facts.add("form", model.get("mt_variant", "any") if modalities(config) else None)
        facts.add(
            "latents", f"{model.get('channels', 3)} x {model.get('image_size', 256)} x {model.get('image_size', 256)}"
        )
        stage = model.get("first_stage_config") or {}
        facts.add(
            "first stage", str(stage.get("target", "")).rpartition(".")[2] if isinstance(stage, Mapping) else None
        )
        facts.add("noise", f"{model.get('timesteps', 1000)} steps, {model.get('beta_schedule', 'linear')} schedule")
    facts.add("image size", data.get("image_size"))
    facts.add("data", data.get("path"))
    trainer = (config.get("lightning") or {}).get("trainer") or {}
    facts.add("precision", trainer.get("precision", 32))
    facts.add("trained with", " ".join(differing(config)))


def differing(config: Mapping[str, Any]) -> list[str]:
    """key=value of the run section and of ours in the model that are not the defaults."""
    from latent_mt.model.tasks import TaskKeys
    from latent_mt.runs.run_config import RunConfig

    words = []
    for prefix, section, values in (
        ("run.", RunConfig, config.get("run") or {}),
        ("model.params.", TaskKeys, params(config)),
    ):
        for field in dataclasses.fields(section):
            value = values.get(field.name, field.default)
            if _plain(value) != _plain(field.default) and field.name not in ("log_dir", "mt_tasks", "mt_sides"):
                words.append(f"{prefix}{field.name}={value}")
    rates = [key for key in ("base_learning_rate", "learning_rate") if key in config["model"]]
    return [*(f"model.{key}={config['model'][key]}" for key in rates), *words]


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


def commands(facts: Facts, config: Mapping[str, Any], path: str) -> None:
    """What takes a trained model of this configuration."""
    if is_autoencoder(config):
        key = "model.params.first_stage_config.params.ckpt_path"
        facts.command("a latent model on it", "latent-train", "--config", "FILE", f"{key}={path}")
        facts.command("latents of a data set", "encode", "--config", "FILE", "--first_stage", path, "--out", "FOLDER")
        return
    model, names = ("--model_path", path), modalities(config)
    facts.command("everything from nothing", "latent-sample", *model, "--num_samples", 16)
    sides = list(map(str, params(config).get("mt_sides") or []))
    for side in sides:
        facts.command(f"the rest from {side}", "latent-sample", *model, "--given", side)
    for name, row in names.items():
        if row == "masked":
            facts.command("masked images", "latent-restore", *model, "--data_dir", "IMAGES", "--mask", "patches:10")
        elif row == "label":
            facts.command("of class 0", "latent-sample", *model, "--given", f"{name}=0", "--num_samples", 16)
            if params(config).get("mt_variant", "any") != "X":
                facts.command("classes of images", "latent-classify", *model, "--data_dir", "IMAGES")
    if len(sides) > 1:
        facts.command("a picture of all subsets", "subsets", *model)
    facts.command("for latent-diffusion", "export", "ldm", *model, "--out", "model.ckpt")
