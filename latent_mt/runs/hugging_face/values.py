"""Reading a config.json: values that mean one thing only here are checked, the others are told by their names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def whole(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number from 1 on; default None: the key is needed. Raises UserError for anything else."""
    value = needed(config, key, where) if default is None or key in config else default
    if not _is_whole(value):
        raise UserError(f"{where}: {key} {value!r}: one whole number from 1 on is expected")
    return int(value)


def wholes(config: Mapping[str, Any], key: str, where: str) -> list[int]:
    """A list of whole numbers from 1 on, one at least. Raises UserError for anything else."""
    values = needed(config, key, where)
    if not isinstance(values, list) or not values or not all(map(_is_whole, values)):
        raise UserError(f"{where}: {key} {values!r}: a list of whole numbers from 1 on is expected")
    return [int(value) for value in values]


def number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A finite number above 0; default None: the key is needed. Raises UserError for anything else."""
    value = needed(config, key, where) if default is None or key in config else default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} {value!r}: a number above 0 is expected")
    return value


def multiples(channels: Sequence[int], where: str) -> list[int]:
    """block_out_channels as multiples of the first. Raises UserError where they are none."""
    mult = [c // channels[0] for c in channels]
    if [m * channels[0] for m in mult] != list(channels):
        raise UserError(f"{where}: block_out_channels {list(channels)} are not multiples of the first")
    return mult


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def swapped(names: Mapping[str, str]) -> dict[str, str]:
    """{b: a} of {a: b}."""
    return {theirs: ours for ours, theirs in names.items()}
