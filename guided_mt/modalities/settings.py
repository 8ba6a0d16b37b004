"""What a configuration says of its modalities: which there are, how each enters the frame, what its loss weighs, which is z_0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..diffusion.aggregation import WEIGHTS
from ..diffusion.network import TIMES
from ..errors import UserError, nearest
from ..networks.multi_task import VARIANTS
from ..networks.routing import ROUTINGS, Routing
from ..runs.backbones import BACKBONES
from ..runs.config import Config, option
from .names import check_name
from .registry import TASKS, Task
from .roles import Roles
from .roles import roles_of as make_roles
from .row_config import RowConfig, per_modality, split_names
from .space import Pixels, Space
from .tokens import ENCODING_NORMS


@dataclass
class MTConfig:
    """Multi-modal diffusion"""

    mt_task: str = option(
        "none",
        "what is modelled with the image: none, or some, as in masked,label; under names of its own: map:paired",
        names=TASKS,
    )
    mt_backbone: str = option("unet", "the network that all of it is built on", BACKBONES, also=("backbone",))
    mt_time: str = option(
        "steps",
        "what the network is told of time: t (steps), or, where it sees the straight path as flow models do, the noise's level "
        "tau in 0..1 (as REPA's), 1 - tau (data-level, as SiT's), or 1000 tau",
        TIMES,
    )
    mt_variant: str = option(
        "auto",
        "U: the network sees z_t; X: it is also given the modalities; any: a random subset of them; auto: X for images, "
        "U where a modality is no image",
        ("auto", *VARIANTS),
    )
    mt_weights: str = option("paper", "aggregation weights w_t, or one each: masked=paper,label=bridge", names=WEIGHTS)
    mt_loss_weight: str = option(
        "0.1", "lambda of eq. 6, or one each: masked=0.1,label=0.05; 0 trains the purely conditional twin"
    )
    mt_drop_prob: float = option(
        0.0, "share of samples trained unconditionally, with no modality and no class", least=0, most=1
    )
    mt_image: str = option("image", "what the images themselves are called, beside those of --paired_dir")
    mt_swap_prob: str = option(
        "0",
        "how often a paired image is z_0 and the image is the modality in its place, or one each: map=0.3,depth=0.2",
    )
    mt_absent: str = option(
        "", "modalities that some images lack, so that the network is told; empty: those that the data show"
    )
    mt_given_prob: float = option(0.5, "variant any: how often a modality is given to the network", least=0, most=1)
    mt_encoding_norm: str = option("none", "rms: rescale the network's own encodings E(x) to RMS 1", ENCODING_NORMS)
    mt_encoder_refresh: int = option(
        1, "steps between encoding all classes anew; 1: exact, with the weights of each step", least=1, free=True
    )
    mt_context_dim: int = option(
        -1, "width of the tokens of labels and vectors; -1: 4 num_channels, or dit_hidden_size", least=1
    )
    mt_embedding: bool = option(
        False,
        "add a learned vector to the tokens of each label, caption or vector, which says whose they are; zero at first",
    )
    mt_routing: str = option(
        "none", "dtr: each residual block computes on a window of its channels, by timestep and by modality", ROUTINGS
    )
    mt_routing_alpha: float = option(4.0, "dtr: windows begin at (t / (T - 1))^alpha of their range", least=0)
    mt_routing_beta: float = option(0.8, "dtr: a window's share of the channels; 1: all of them", least=0.1, most=1)
    mt_conflict_interval: int = option(
        0,
        "steps between measuring the tasks' gradients on the backbone, and their cosines; 0: never",
        least=0,
        free=True,
    )


def task_names(config: Config) -> list[str]:
    """The modalities of `--mt_task`. Raises UserError for an unknown one, one named twice, and a name that is taken."""
    return list(_parse_task(config.mt_task, tuple(TASKS)))


def row_of(config: Config, name: str) -> Task:
    """The row of TASKS that the modality `name` is built from."""
    return TASKS[_parse_task(config.mt_task, tuple(TASKS))[name]]


def row_config(config: Config, name: str, space: Space | None = None) -> RowConfig:
    """What the modality `name` is built from."""
    return RowConfig(config, name, row_of(config, name).file_options, space or Pixels())


@lru_cache
def _parse_task(mt_task: str, known: tuple[str, ...]) -> dict[str, str]:
    """{modality: row}, once for each value of the flag, however often it is asked."""
    rows = split_names(mt_task)
    for name, row in rows.items():
        if row not in known:
            raise UserError(f"--mt_task: unknown '{row}'{nearest(row, known)}; choose from none, {', '.join(known)}")
        check_name(name)
    words = [word.strip().partition(":")[0] for word in mt_task.split(",")]
    for name in rows:
        if words.count(name) > 1:
            raise UserError(f"--mt_task {mt_task}: names {name} twice")
    return rows


def loss_weights(config: Config) -> dict[str, float]:
    """lambda per modality (`--mt_loss_weight`). Raises UserError for what is not a number of at least 0."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf:
            raise UserError(
                f"--mt_loss_weight must be at least 0, a number or NAME=NUMBER,..., not {config.mt_loss_weight}"
            )
        return value

    return per_modality(config, "mt_loss_weight", number, MTConfig.mt_loss_weight)


def weights_names(config: Config) -> dict[str, str]:
    """The aggregation weights' name per modality (`--mt_weights`). Raises UserError for an unknown one."""

    def known(name: str) -> str:
        if name not in WEIGHTS:
            raise UserError(f"--mt_weights: '{name}' is none of {', '.join(WEIGHTS)}{nearest(name, WEIGHTS)}")
        return name

    return per_modality(config, "mt_weights", known, MTConfig.mt_weights)


def variant_of(config: Config) -> str:
    """U, X or any: what `--mt_variant` says or, for auto, suits the modalities. A label is there to be predicted too, hence U."""
    if config.mt_variant != "auto":
        return config.mt_variant
    return "X" if all(row_of(config, name).tokens is None for name in task_names(config)) else "U"


def routing_of(config: Config, last: float) -> Routing | None:
    """`--mt_routing` of a network that is told the timestep `last` at t = T - 1; None: it has none."""
    make = ROUTINGS[config.mt_routing]
    encoded = tuple(name for name in task_names(config) if row_of(config, name).tokens is not None)
    return None if make is None else make(config.mt_routing_alpha, config.mt_routing_beta, last, encoded)


def roles_of(config: Config) -> Roles:
    """The sides of a sample, and how often each is z_0. Raises UserError for shares that can't be."""
    slots = [name for name in task_names(config) if row_of(config, name).is_side]

    def share(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f"--mt_swap_prob must be a number or NAME=NUMBER,..., not {config.mt_swap_prob}") from None

    shares = per_modality(config, "mt_swap_prob", share, "0", of=slots)
    if shares and "=" not in config.mt_swap_prob:
        shares = {name: value / len(slots) for name, value in shares.items()}
    sides = [row_config(config, name).paired_side or name for name in slots]
    try:
        return make_roles([config.mt_image, *sides], slots, list(shares.values()))
    except ValueError as error:
        raise UserError(f"--mt_swap_prob, --mt_image: {error}") from None


def absent_names(config: Config) -> list[str]:
    """The modalities of `--mt_absent`. Raises UserError for one that is not in --mt_task."""
    names, known = [name.strip() for name in config.mt_absent.split(",") if name.strip()], task_names(config)
    for name in names:
        if name not in known:
            raise UserError(
                f"--mt_absent {config.mt_absent}: --mt_task {config.mt_task} has no '{name}'{nearest(name, known)}"
            )
    return names


def encoding_norm(config: Config, name: str) -> str:
    """`--mt_encoding_norm` of one modality."""
    return config.own.get(name, {}).get("mt_encoding_norm", config.mt_encoding_norm)
