"""Which samples of a shard are trained on, by what their .json says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from guided_mt.errors import UserError, nearest

# Of each quantity: the fields of the .json that may hold it, the first that is there counts. Names of img2dataset and LAION.
FIELDS: dict[str, tuple[str, ...]] = {
    "width": ("width",),
    "height": ("height",),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score"),
    "watermark": ("pwatermark",),
}

Values = Mapping[str, np.ndarray]  # {quantity: float32 [N], NaN where the .json does not say}
# Name: the quantities that it needs, and which samples pass. NaN passes nothing.
FILTERS: dict[str, tuple[tuple[str, ...], Callable[[Values, float], np.ndarray]]] = {
    "min_width": (("width",), lambda x, least: x["width"] >= least),
    "min_height": (("height",), lambda x, least: x["height"] >= least),
    "max_aspect": (("width", "height"), lambda x, most: _aspect(x) <= most),
    "min_aesthetic": (("aesthetic",), lambda x, least: x["aesthetic"] >= least),
    "max_watermark": (("watermark",), lambda x, most: x["watermark"] <= most),
}


def _aspect(values: Values) -> np.ndarray:
    """The longer side over the shorter one."""
    width, height = values["width"], values["height"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(width, height) / np.minimum(width, height)


class Filters:
    """Bounds {name of FILTERS: number}, and {quantity: the names of its fields} where they are not FIELDS'.

    Raises UserError for a name or a value that is none.
    """

    def __init__(self, bounds: Mapping[str, float] | None = None, fields: Mapping[str, Any] | None = None):
        for key, given, known in (("filters", bounds, list(FILTERS)), ("fields", fields, list(FIELDS))):
            if given is not None and not isinstance(given, Mapping):
                raise UserError(f"data.params.{key} {given!r}: must be {{name: value}} of {', '.join(known)}")
            for name in given or {}:
                if name not in known:
                    raise UserError(
                        f"data.params.{key}: unknown '{name}'{nearest(str(name), known)}; there are {', '.join(known)}"
                    )
        self.bounds: dict[str, float] = {}
        for name, bound in (bounds or {}).items():
            if bound is None:
                continue
            if not isinstance(bound, (int, float)) or isinstance(bound, bool):
                raise UserError(f"data.params.filters.{name} takes a number, not '{bound}'")
            self.bounds[name] = float(bound)
        self.fields = {**FIELDS, **{name: _names(name, value) for name, value in (fields or {}).items()}}

    @property
    def quantities(self) -> dict[str, tuple[str, ...]]:
        """{quantity: its fields} of those that the bounds need, in the order of FIELDS."""
        needed = {quantity for name in self.bounds for quantity in FILTERS[name][0]}
        return {quantity: self.fields[quantity] for quantity in FIELDS if quantity in needed}

    def values(self, described: Mapping[str, Any]) -> list[float]:
        """The quantities of a sample by its .json, NaN where that does not say."""
        return [_number(described, names) for names in self.quantities.values()]

    def passes(self, values: Values, count: int) -> tuple[np.ndarray, dict[str, int]]:
        """(which of N samples pass all, bool [N]; {name: how many it alone would leave out})."""
        kept, left_out = np.ones(count, bool), {}
        for name, bound in self.bounds.items():
            passed = FILTERS[name][1](values, bound)
            left_out[name] = count - int(passed.sum())
            kept &= passed
        return kept, left_out


def _names(quantity: str, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"data.params.fields.{quantity} takes the name of a field, or a list of names, not '{value}'")
    return tuple(names)


def _number(described: Mapping[str, Any], names: Sequence[str]) -> float:
    for name in names:
        value = described.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return float("nan")
