"""LDM's YAML files: reading them, and naming what is wrong in them.

    model:     {target, base_learning_rate or learning_rate, params}
    data:      {target, params}
    lightning: {trainer, callbacks, logger, modelcheckpoint}
    run:       ours, see latent_mt.runs.run_config.RunConfig

What a target means is in targets.py; lightning.trainer is read by trainer_options.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from guided_mt.errors import UserError, nearest, reason
from guided_mt.runs.config import check_keys

from .. import configs
from .targets import check_target, mapping, way_out

TOP_LEVEL = ("model", "data", "lightning", "run")
LIGHTNING = ("trainer", "callbacks", "logger", "modelcheckpoint")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file with `a.b.c=value` overrides applied in their order, as plain dictionaries and lists of known shape.

    path: the file, or the name of one in latent_mt/configs.
    An override of a `target` by another class empties its `params`. Raises UserError for a file that can't be read, an override
    that can't be applied, and as `check_shape` does.
    """
    try:
        text = find_config(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({reason(error)})") from None
    try:
        config: Any = OmegaConf.create(text)
    except Exception as error:  # OmegaConf and PyYAML raise many kinds; all mean the same to the user
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or reason(error)})") from None
    if not OmegaConf.is_dict(config) or not config:
        raise UserError(f"{path}: a YAML file with the keys {', '.join(TOP_LEVEL)} is expected")
    for word in overrides:
        key, sign, value = word.partition("=")
        if not sign or not key or key.startswith("-"):
            raise UserError(f"don't know what to do with '{word}'; overrides are written key.of.the.file=value")
        try:
            given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
            if key.endswith(".target") and OmegaConf.select(config, key) not in (None, value):
                # Another class takes other keys: its params come after it on the command line.
                OmegaConf.select(config, key.removesuffix(".target"))["params"] = {}
            OmegaConf.update(config, key, given["value"], merge=True)
        except Exception as error:
            raise UserError(f"{word}: can't be applied to {path} ({reason(error)})") from None
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or "a key"
        raise UserError(f"{path}: {key} has no value; give it as {key}=VALUE on the command line") from None
    except Exception as error:
        raise UserError(f"{path}: {reason(error)}") from None
    check_shape(plain, str(path))
    return plain


def find_config(path: str | Path) -> Path:
    """The file that is meant: a path, or a name in `configs.names()`. Raises UserError where it is neither."""
    if Path(path).is_file():
        return Path(path)
    stem = Path(path).name.removesuffix(".yaml")
    if str(path) in configs.names():
        return configs.file_of(str(path))
    if stem in configs.names():
        raise UserError(f"{path}: no such file; the configuration of this name comes along: --config {stem}")
    if "/" not in str(path) and not Path(path).suffix:
        known = ", ".join(configs.names())
        raise UserError(
            f"{path}: no such file, and no configuration of that name{nearest(stem, configs.names())}; there are {known}"
        )
    return Path(path)


def check_shape(config: Mapping[str, Any], source: str = "the configuration") -> None:
    """Raises UserError for top-level keys, parts and targets that no latent model has, naming the nearest valid one.

    Nothing is imported or built; keys of `params` are checked by `instantiate`.
    """
    check_keys(config, TOP_LEVEL, source)
    if "model" not in config:
        raise UserError(f"{source}: has no 'model: {{target, params}}'")
    for part, keys in (
        ("model", ("target", "params", "base_learning_rate", "learning_rate")),
        ("data", ("target", "params")),
        ("lightning", LIGHTNING),
        ("run", None),
    ):
        value = mapping(config, part, source)
        if keys:
            check_keys(value, keys, f"{source}: {part}")
    model = config["model"]
    rates = [key for key in ("base_learning_rate", "learning_rate") if key in model]
    if len(rates) > 1:
        raise UserError(f"{source}: model has both {' and '.join(rates)}; give one of them")
    for key in rates:
        if isinstance(model[key], bool) or not isinstance(model[key], (int, float)) or not 0 <= model[key] < 1e9:
            raise UserError(f"{source}: model.{key} takes a number, not '{model[key]}'")
    for key in LIGHTNING:
        mapping(config.get("lightning") or {}, key, f"{source}: lightning")
    for part in ("model", "data"):
        if config.get(part) and not isinstance(config[part].get("target"), str):
            raise UserError(f"{source}: {part} has no target, the dotted name of a class")
    missing = way_out(str(model.get("target")))
    if missing:  # before all that only such a model has
        raise UserError(f"{source}: model: {model['target']} {missing}")
    for part in TOP_LEVEL[:3]:
        for where, target in _targets(config.get(part), part):
            try:
                check_target(target)
            except UserError as error:
                raise UserError(f"{source}: {where}: {error}") from None


def replaced(config: Mapping[str, Any]) -> list[str]:
    """One line for each of LDM's callbacks and loggers in a configuration that something of ours stands for."""
    lines = []
    for where, target in _targets(config.get("lightning"), "lightning"):
        instead = way_out(target)
        if instead and "lightning.trainer." not in where:
            lines.append(f"{where}: {target} {instead}")
    return lines


def _targets(config: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, dotted name) of every {target, params} in a configuration, outer ones first."""
    if isinstance(config, dict):
        if isinstance(config.get("target"), str):
            yield where, config["target"]
        for key, value in config.items():
            yield from _targets(value, f"{where}.{key}")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _targets(value, f"{where}.{index}")
