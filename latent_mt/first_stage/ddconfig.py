"""LDM's `ddconfig`: the sizes of an autoencoder's encoder and decoder, read and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guided_mt.errors import UserError, nearest

NORM_GROUPS = 32
ATTENTION = ("vanilla", "none")


@dataclass(frozen=True)
class DDConfig:
    """LDM's `ddconfig`: sizes of encoder and decoder. resolution only decides where attention stands.

    norm_groups (ours): LDM's group norms have 32 groups, which with 32 channels are one channel each: they then remove every
    channel's mean over the image, and with it the image's colour. LDM's own 128 channels make groups of four.
    """

    ch: int
    out_ch: int
    num_res_blocks: int
    in_channels: int
    resolution: int
    z_channels: int
    ch_mult: Sequence[int] = (1, 2, 4, 8)
    attn_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True
    double_z: bool = True
    use_linear_attn: bool = False
    attn_type: str = "vanilla"
    tanh_out: bool = False
    give_pre_end: bool = False
    norm_groups: int = NORM_GROUPS

    @property
    def downsampling(self) -> int:
        """How many pixels high and wide one position of the latent is."""
        return 2 ** (len(self.ch_mult) - 1)


def read_ddconfig(values: Mapping[str, Any] | DDConfig) -> DDConfig:
    """`ddconfig` of a YAML file, checked. Raises UserError naming the key."""
    if isinstance(values, DDConfig):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"ddconfig must hold 'key: value' lines, not {values!r}")
    fields = dataclasses.fields(DDConfig)
    names = [entry.name for entry in fields]
    for key in values:
        if key not in names:
            raise UserError(
                f"ddconfig.{key}: there is no such key{nearest(str(key), names)}; known: {', '.join(names)}"
            )
    for entry in fields:
        if entry.name not in values and entry.default is dataclasses.MISSING:
            raise UserError(f"ddconfig.{entry.name} is missing")
    checked = {key: _checked(key, value) for key, value in values.items()}
    config = DDConfig(**checked)
    if config.use_linear_attn or config.attn_type not in ATTENTION:
        kind = "use_linear_attn True" if config.use_linear_attn else f"attn_type '{config.attn_type}'"
        raise UserError(f"ddconfig.{kind}: the kinds of attention are {' and '.join(ATTENTION)}")
    if config.give_pre_end:
        raise UserError("ddconfig.give_pre_end True: the decoder always ends in an image; leave the key out")
    return config


def _checked(key: str, value: Any) -> Any:
    """A value of ddconfig as the type of its field."""
    default = {entry.name: entry.default for entry in dataclasses.fields(DDConfig)}[key]
    if key in ("ch_mult", "attn_resolutions"):
        whole = isinstance(value, Sequence) and all(type(item) is int and item > 0 for item in value)
        if not whole or (key == "ch_mult" and not len(value)):
            raise UserError(f"ddconfig.{key} {value!r}: write a list of whole numbers such as [1, 2, 4]")
        return tuple(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"ddconfig.{key} {value!r}: write true or false")
    elif key == "dropout":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"ddconfig.dropout {value!r}: write a share from 0 up to 1")
    elif not isinstance(default, str) and (type(value) is not int or value < 1):
        raise UserError(f"ddconfig.{key} {value!r}: write a whole number of 1 or more")
    return value
