"""The modalities of a latent model: `mt_tasks` of a YAML file, and the short form of a pair, as the configuration of guided_mt.

    mt_tasks:
      map:    {task: paired, weights: bridge, loss_weight: 0.1}
      label:  {num_classes: 10, mt_label_head: M}
      masked: {mask_max_patches: 10}

A key is the modality's name; `task` is its row of guided_mt's TASKS, the name unless given. The rest are `weights`,
`loss_weight`, `timestep_weights`, `swap_prob` and `absent` of this modality alone (else mt_weights, mt_loss_weight, ... hold), and
its row's options, of which one that takes a JSON file may be a mapping.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_mt.diffusion.aggregation import WEIGHTS
from guided_mt.diffusion.weighting import TIMESTEP_WEIGHTS
from guided_mt.errors import UserError, nearest
from guided_mt.modalities.names import check_name
from guided_mt.modalities.registry import TASKS
from guided_mt.modalities.settings import MTConfig
from guided_mt.modalities.weighting.settings import WeightingConfig, check_tasks_weighed
from guided_mt.networks.model import VARIANTS
from guided_mt.runs.config import Config, ModelConfig, make_section, option, redefined

PAIRED = "paired"  # the row of a side that names none, and the one modality of a model of pairs
_OWN = ("task", "weights", "loss_weight", "timestep_weights", "swap_prob", "absent")
_WHERE = "model.params"


@dataclass(frozen=True)
class TaskKeys:
    """The keys of `model.params` that say what is modelled with the image; see LatentMTDiffusion."""

    mt_tasks: Mapping[str, Any] | None = option(None, "the modalities, as NAME: {key: value}; empty: the sides alone")
    mt_sides: Sequence[str] = option(
        (), "names of the images of an item in the order of the data; the first is the image, each other one a modality"
    )
    mt_variant: str = option(
        "any", "U: the network sees z_t; X: it is also given the modalities; any: a random subset of them", VARIANTS
    )
    mt_weights: str = option("paper", "aggregation weights w_t of the modalities that name none themselves", WEIGHTS)
    mt_loss_weight: float = option(0.1, "lambda of eq. 6 of the modalities that name none themselves", least=0)
    mt_given_prob: float = option(0.5, "variant any: how often a modality is given to the network", least=0, most=1)
    mt_drop_prob: float = option(
        0.0, "share of samples trained unconditionally, with no modality and no class", least=0, most=1
    )
    mt_swap_prob: float | Mapping[str, float] = option(
        0.0, "how often another side than the first is z_0, shared by them, or {side: share}", least=0, most=1
    )
    mt_context_dim: int = option(-1, "width of the tokens of labels and vectors; -1: 4 times the network's", least=1)
    mt_timestep_weights: str = option(
        "uniform", "factors by timestep on the terms of the modalities that name none themselves", TIMESTEP_WEIGHTS
    )
    mt_task_weighting: str = redefined(WeightingConfig, "mt_task_weighting")
    mt_task_weighting_interval: int = redefined(WeightingConfig, "mt_task_weighting_interval")
    mt_timestep_intervals: int = redefined(
        WeightingConfig, "mt_timestep_intervals", help="intervals of the timesteps, for mt_task_weighting uncertainty"
    )
    mt_interval_rule: str = redefined(WeightingConfig, "mt_interval_rule")
    mt_routing: str = redefined(MTConfig, "mt_routing")
    mt_routing_alpha: float = redefined(MTConfig, "mt_routing_alpha")
    mt_routing_beta: float = redefined(MTConfig, "mt_routing_beta")
    mt_time: str = redefined(MTConfig, "mt_time")

    def section(self, section: type, *names: str) -> dict[str, Any]:
        """{key: value} of these keys, as options of a section of guided_mt. Raises UserError naming one that is no such value."""
        made = make_section(section, {name: getattr(self, name) for name in names}, _WHERE)
        return {name: getattr(made, name) for name in names}

    def check(self) -> None:
        """Raises UserError naming the key that is no such value."""
        named = {"mt_variant": VARIANTS, "mt_weights": WEIGHTS, "mt_timestep_weights": TIMESTEP_WEIGHTS}
        for key, known in named.items():
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"{_WHERE}.{key} '{value}' is none of {', '.join(known)}")
        for key in ("mt_given_prob", "mt_drop_prob", "mt_swap_prob"):
            value = getattr(self, key)
            if not isinstance(value, Mapping):
                _check_number(value, f"{_WHERE}.{key}", most=1)
        _check_number(self.mt_loss_weight, f"{_WHERE}.mt_loss_weight")
        sides = list(self.mt_sides)
        if len(sides) == 1 or not all(isinstance(side, str) for side in sides) or len(set(sides)) != len(sides):
            raise UserError(f"{_WHERE}.mt_sides {sides}: name the sides of an item, each once, or none")
        if self.mt_tasks is not None and not isinstance(self.mt_tasks, Mapping):
            raise UserError(
                f"{_WHERE}.mt_tasks: write the modalities as NAME: {{key: value}}, as in masked: {{}}, not '{self.mt_tasks}'"
            )
        if self.mt_context_dim != -1 and self.mt_context_dim < 1:
            raise UserError(f"{_WHERE}.mt_context_dim must be at least 1, or -1, not {self.mt_context_dim}")


def read_tasks(keys: TaskKeys, *, precision: str) -> Config:
    """The configuration of guided_mt that the keys mean, for a network of this precision. Raises UserError."""
    keys.check()
    entries = _entries(keys)
    own: dict[str, Any] = {}
    words: dict[str, Any] = {key: {} for key in ("task", "weights", "loss_weight", "timestep_weights", "swap_prob")}
    absent = []
    for name, entry in entries.items():
        where, row = f"{_WHERE}.mt_tasks.{name}", entry.get("task", name)
        check_name(name)
        if name in keys.mt_sides[:1]:
            raise UserError(f"{where}: the images themselves are called {name} (mt_sides); choose another name")
        if not isinstance(row, str) or row not in TASKS:
            raise UserError(f"{where}.task: unknown '{row}'{nearest(str(row), TASKS)}; choose from {', '.join(TASKS)}")
        own[name] = _own_options(entry, row, where)
        words["task"][name] = row
        for key in ("weights", "loss_weight", "timestep_weights"):
            words[key][name] = entry.get(key, getattr(keys, f"mt_{key}"))
        for key, rows in (("weights", WEIGHTS), ("timestep_weights", TIMESTEP_WEIGHTS)):
            value = words[key][name]
            if not isinstance(value, str) or value not in rows:
                raise UserError(f"{where}.{key} '{value}' is none of {', '.join(rows)}{nearest(str(value), rows)}")
        _check_number(words["loss_weight"][name], f"{where}.loss_weight")
        if not isinstance(entry.get("absent", False), bool):
            raise UserError(f"{where}.absent takes true or false, not '{entry['absent']}'")
        absent += [name] if entry.get("absent") else []
    words["swap_prob"] = _shares(keys, entries)
    multi = MTConfig(
        mt_task=",".join(f"{name}:{row}" for name, row in words["task"].items()) or "none",
        mt_variant=keys.mt_variant if entries else "U",
        mt_weights=_text(words["weights"]) or MTConfig.mt_weights,
        mt_loss_weight=_text(words["loss_weight"]) or MTConfig.mt_loss_weight,
        mt_swap_prob=_text(words["swap_prob"]) or "0",
        mt_image=keys.mt_sides[0] if keys.mt_sides else MTConfig.mt_image,
        mt_absent=",".join(absent),
        mt_given_prob=keys.mt_given_prob,
        mt_drop_prob=keys.mt_drop_prob,
        mt_context_dim=keys.mt_context_dim,
        **keys.section(MTConfig, "mt_routing", "mt_routing_alpha", "mt_routing_beta", "mt_time"),
    )
    over_tasks = [field.name for field in dataclasses.fields(WeightingConfig) if field.name != "mt_timestep_weights"]
    weighting = WeightingConfig(**keys.section(WeightingConfig, *over_tasks))
    weighting.mt_timestep_weights = _text(words["timestep_weights"]) or weighting.mt_timestep_weights
    sections = [ModelConfig(precision=precision), multi, weighting]
    sections += [options() for options in dict.fromkeys(TASKS[row].options for row in words["task"].values())]
    config = Config(sections, own=own)
    check_tasks_weighed(config, f"{_WHERE}.")
    return config


def _entries(keys: TaskKeys) -> dict[str, dict[str, Any]]:
    """{modality: what the file says of it}: the sides in the order of the data, then the others in that of the file."""
    written: dict[str, dict[str, Any]] = {}
    for name, entry in (keys.mt_tasks or {}).items():
        if entry is not None and not isinstance(entry, Mapping):
            raise UserError(f"{_WHERE}.mt_tasks.{name}: write {{key: value}} pairs, not '{entry}'")
        written[str(name)] = dict(entry or {})
    if len(keys.mt_sides) == 2 and not written:
        return {PAIRED: {"paired_side": keys.mt_sides[1]}}
    for name in set(written).intersection(keys.mt_sides[1:]):
        written[name].setdefault("task", PAIRED)
    paired: dict[str, str] = {}
    for name, entry in written.items():
        side = entry.get("paired_side") or name
        if _is_side(name, entry) and paired.setdefault(side, name) != name:
            raise UserError(f"{_WHERE}.mt_tasks.{name}: the side '{side}' is that of {paired[side]}; leave one out")
    if not keys.mt_sides:
        return {n: written[n] for n in [*paired.values(), *(n for n in written if n not in paired.values())]}
    for side in paired:
        if side not in keys.mt_sides[1:]:
            raise UserError(
                f"{_WHERE}.mt_tasks.{paired[side]}: '{side}' is none of the sides {', '.join(keys.mt_sides[1:])} "
                f"beside {keys.mt_sides[0]}{nearest(side, keys.mt_sides)}"
            )
    sides = {
        paired.get(side, side): written.pop(paired.get(side, side), {"task": PAIRED}) for side in keys.mt_sides[1:]
    }
    for name, entry in sides.items():
        if not _is_side(name, entry):
            raise UserError(
                f"{_WHERE}.mt_tasks.{name}: is a side of mt_sides, so its task is {PAIRED}, not {entry['task']}"
            )
    return sides | written


def _is_side(name: str, entry: Mapping[str, Any]) -> bool:
    row = entry.get("task", name)
    return isinstance(row, str) and row in TASKS and TASKS[row].is_side


def _own_options(entry: Mapping[str, Any], row: str, where: str) -> dict[str, Any]:
    """{option: value} of a modality alone: all options of its row, and those of the run that the file gives."""
    task = TASKS[row]
    fields = [field.name for field in dataclasses.fields(task.options)]
    for key in entry:
        known = [*_OWN, *fields, *task.run_options]
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), known)}; it may have {', '.join(known)}")
    given = {key: entry[key] for key in entry if key in fields}
    given = {key: json.dumps(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    found = vars(make_section(task.options, given, where))
    for key in task.run_options:
        if key in entry:
            section = next(s for s in (ModelConfig, MTConfig) if key in s.__dataclass_fields__)
            found[key] = getattr(make_section(section, {key: entry[key]}, where), key)
    if not task.is_side and "swap_prob" in entry:
        raise UserError(f"{where}.swap_prob: only a side can be z_0 in the image's place; leave it out")
    if task.is_side and any(found[key] for key in task.file_options):
        key = next(key for key in task.file_options if found[key])
        raise UserError(f"{where}.{key}: sides come with the data here (data.params.paired); leave it out")
    for key in task.data_options:
        if found[key]:
            raise UserError(f"{where}.{key}: captions come with the data here (data.params.captions); leave it out")
    if "num_classes" in task.run_options and "num_classes" not in found:
        raise UserError(f"{where}: has no num_classes, the number of the data's classes")
    return dict(found)


def _shares(keys: TaskKeys, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """{modality: how often its image is z_0} of the sides."""
    slots = [name for name, entry in entries.items() if _is_side(name, entry)]
    given = keys.mt_swap_prob
    if isinstance(given, Mapping):
        names = {entries[name].get("paired_side") or name: name for name in slots}
        for side in given:
            if side not in names:
                raise UserError(f"{_WHERE}.mt_swap_prob: '{side}' is none of {', '.join(names) or 'no side'}")
        shares = {name: given.get(side, 0.0) for side, name in names.items()}
    else:
        shares = {name: given / len(slots) for name in slots}
    shares |= {name: entries[name]["swap_prob"] for name in slots if "swap_prob" in entries[name]}
    for name, share in shares.items():
        _check_number(share, f"{_WHERE}.mt_swap_prob of {name}", most=1)
    if sum(shares.values()) > 1 + 1e-9:
        raise UserError(f"{_WHERE}.mt_swap_prob: the sides' shares {_text(shares)} are more than 1 together")
    return shares


def _text(values: Mapping[str, Any]) -> str:
    return ",".join(
        f"{name}={value!r}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _check_number(value: Any, where: str, most: float = float("inf")) -> None:
    """Raises UserError for what is no finite number from 0 to `most`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == float("inf"):
        wanted = f"between 0 and {most:g}" if most < float("inf") else "at least 0"
        raise UserError(f"{where} must be {wanted}, not {value}")
