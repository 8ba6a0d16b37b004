"""The names and shapes of a weights file, without its numbers: headers of safetensors, and memory maps of torch's files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_mt.runs.weights import Found, find_state, shapes_of

# Parts of a latent model's state dict, by the beginnings of their entries' names.
PARTS = {
    "model.": "network",
    "first_stage_model.": "first stage",
    "cond_stage_model.": "condition",
    "model_ema.": "averages of the network",
}


@dataclass(frozen=True)
class Contents:
    """shapes: {entry: shape}; types: the arithmetic that they are stored in; found: the rest of the file."""

    shapes: Mapping[str, Sequence[int]]
    types: Sequence[str]
    found: Found


def read_shapes(file: Path) -> Contents:
    """Raises UserError for what is no weights file, or a damaged one."""
    found = find_state(file, lazily=True)
    counted = Counter(str(value.dtype).removeprefix("torch.") for value in found.state.values())
    return Contents(shapes_of(found.state), [name for name, _ in counted.most_common()], found)


def parameters(shapes: Mapping[str, Sequence[int]]) -> str:
    """How many numbers, by part where there are several."""
    counted: Counter[str] = Counter()
    for key, shape in shapes.items():
        counted[next((part for beginning, part in PARTS.items() if key.startswith(beginning)), "others")] += math.prod(
            shape
        )
    total = f"{sum(counted.values()) / 1e6:.2f} M"
    parts = [f"{part} {count / 1e6:.2f} M" for part, count in counted.items() if part != "others" or len(counted) == 1]
    return total if len(counted) == 1 else f"{total}: {', '.join(parts)}"
