"""Reading a config.json: values that mean one thing only here are checked, the others are told by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guided_mt.errors import UserError


def refuse_others(config: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    """UserError for a key whose value is another than the one in `only` that is supported; a missing key has it."""
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} {config[key]!r} is not supported, only {value!r}")


def needed(config: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key. Raises UserError where it is missing."""
    if config.get(key) is None:
        raise UserError(f"{where}: has no {key}")
    return config[key]


def swapped(names: Mapping[str, str]) -> dict[str, str]:
    """{b: a} of {a: b}."""
    return {theirs: ours for ours, theirs in names.items()}
