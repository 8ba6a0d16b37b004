"""One picture of what a model of several kinds of data knows: its image, or every side, from every subset of the rest.

    mt-diffusion subsets --model_path RUN --num_samples 6

For runs of both packages. A row per side and subset given, after the true images; a column per item of the data, for latent models
of the validation split. The table tells how far the drawn side is from the true one (mean squared error of pixels in [-1, 1]), and
how far it is from that of another item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from guided_mt.commands.console import announce, run
from guided_mt.data.images import make_grid, save_png, to_nhwc
from guided_mt.generation.generate import Generator, parse_seeds, samples_folder
from guided_mt.runs import distributed
from guided_mt.runs.config import Config, SamplingOptions

from .items import Items, givable, open_run, read_flags, take_items

TITLE, HEAD = 150, 16  # width of a row's title and height of the columns' titles, pixels


def main(argv: Sequence[str]) -> None:
    """Draw every side from every subset of the rest, as `argv` says, into one picture. Raises UserError."""
    config = read_flags(argv, __doc__)
    out = Path(config.out or samples_folder(Path(config.model_path)) / "subsets.png")
    processes = distributed.setup(config.device)
    if announce(config, processes, f"writing {out}"):
        return
    generator, source, size = open_run(config, processes.device)
    items = take_items(config, generator, source, size)
    alone = len(items.truth) == 1
    pictures = [(f"{side} (true)", images) for side, images in items.truth.items()]
    pictures += [(f"{name} (true)", images) for name, images in items.shown.items()]
    print(f"{'drawn':12s} {'given':28s} {'error':>8s} {'to another':>10s}")
    for target, known in subsets(generator):
        drawn, truth = draw(config, generator, items, target, known), items.truth[target]
        error, other = (float((drawn - x).square().mean()) for x in (truth, truth.roll(1, 0)))
        given = ", ".join(known) or "nothing"
        print(f"{target:12s} {given:28s} {error:8.4f} {other:10.4f}", flush=True)
        pictures.append((f"given: {given}" if alone else f"{target} of {given}", drawn))
    save_png(titled(pictures, items.classes), out)
    print(f"{out}: {len(pictures)} rows of {config.num_samples} items")


def subsets(generator: Generator) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(side to draw, names given) of all that the model was trained for."""
    sides = generator.roles.sides
    for role in generator.roles.trained:
        others = [name for name in givable(generator) if name != sides[role]]
        if generator.model.variant == "X":
            yield sides[role], tuple(others)
            continue
        for known in chain.from_iterable(combinations(others, count) for count in range(len(others) + 1)):
            yield sides[role], known


def draw(config: Config, generator: Generator, items: Items, target: str, known: Sequence[str]) -> Tensor:
    """The images [N, 3, S, S] of the side `target`."""
    values = {name: items.known[name] for name in known}
    seeds = parse_seeds(config.seeds, config.num_samples)
    labels = items.labels if getattr(generator.config, "class_cond", False) else None
    settings = next(section for section in config.sections() if isinstance(section, SamplingOptions))
    drawn = generator.draw(seeds, settings, values, labels, target=target)
    return generator.space.decode(drawn.x_start)


def titled(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str] = ()) -> np.ndarray:
    """uint8 [H, W, 3]: a row of pictures each, after its title; `columns`: what stands above each, none for no such line."""
    lines = []
    for title, images in rows:
        line = make_grid(to_nhwc(images), columns=len(images))
        label = Image.new("RGB", (TITLE, len(line)), "white")
        words = title.replace(" of ", "\nof ").replace(": ", ":\n").replace(", ", ",\n")
        ImageDraw.Draw(label).multiline_text((4, 4), words, fill="black", spacing=2)
        lines.append(np.concatenate([np.asarray(label), line], axis=1))
    if columns:
        head = Image.new("RGB", (lines[0].shape[1], HEAD), "white")
        width = (head.width - TITLE) / len(columns)
        for k, name in enumerate(columns):
            ImageDraw.Draw(head).text((TITLE + (k + 0.5) * width, HEAD // 2), name, fill="black", anchor="mm")
        lines.insert(0, np.asarray(head))
    return np.concatenate(lines)


def console() -> None:
    """The script's door."""
    run(main)
