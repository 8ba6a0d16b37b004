"""One picture of what a latent model of several images knows: every side drawn from every subset of what else there is.

    mt-diffusion subsets --model_path RUN --num_samples 6

A row per side and subset given, after the true images; a column per item of the validation split. The table tells how far the drawn
side is from the true one (mean squared error of pixels in [-1, 1]), and how far it is from that of another item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from guided_mt.commands.console import announce, run
from guided_mt.data import load_images
from guided_mt.data.images import from_uint8, make_grid, save_png, to_nhwc
from guided_mt.errors import UserError
from guided_mt.generation.batches import split_sides
from guided_mt.generation.generate import parse_seeds, samples_folder
from guided_mt.modalities.settings import row_of
from guided_mt.runs import checkpoint, distributed
from guided_mt.runs.config import Config, option, parse
from latent_mt.commands.latent_sample import open_split
from latent_mt.commands.loading import load_generator, read_saved
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig

TITLE = 150  # width of a row's title, pixels
ENLARGED = 64  # least side of a picture, pixels


@dataclass
class SubsetsConfig:
    """What to draw"""

    out: str = option("", "the .png to write; empty: subsets.png in the run's samples")
    data_dir: str = option("", "the data: folder, .tar or .zip; empty: those of training")
    split: str = option("", "which split of the data; empty: the validation split of training")
    num_samples: int = option(6, "items, spread evenly over the split", least=2)


def main(argv: Sequence[str]) -> None:
    config = parse(argv, (SubsetsConfig, LatentSampleConfig), description=__doc__)
    weights = checkpoint.find_weights(config.model_path, config.ema)
    out = Path(config[SubsetsConfig].out or samples_folder(weights) / "subsets.png")
    processes = distributed.setup(config.device)
    if announce(config, processes, f"writing {out}"):
        return
    generator = load_generator(str(weights), config.ema, processes.device)
    truth, labels = true_images(config, generator, weights)
    pictures = [(f"{side} (true)", images) for side, images in truth.items()]
    print(f"{'drawn':12s} {'given':28s} {'error':>8s} {'to another':>10s}")
    for target, known in subsets(generator):
        drawn = draw(config, generator, truth, labels, target, known)
        error, other = (float((drawn - x).square().mean()) for x in (truth[target], truth[target].roll(1, 0)))
        given = ", ".join(known) or "nothing"
        print(f"{target:12s} {given:28s} {error:8.4f} {other:10.4f}", flush=True)
        pictures.append((f"{target} of {given}", drawn))
    save_png(titled(pictures), out)
    print(f"{out}: {len(pictures)} rows of {len(truth[generator.roles.sides[0]])} items")


def subsets(generator: LatentGenerator) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(side to draw, names given) of all that the model was trained for: other sides and the classes."""
    sides, trained = generator.roles.sides, generator.roles.trained
    classes = [name for name, modality in generator.modalities.items() if modality.is_class]
    for role in trained:
        others = [side for side in sides if side != sides[role]] + classes
        if generator.model.variant == "X":
            yield sides[role], tuple(others)
            continue
        for known in chain.from_iterable(combinations(others, count) for count in range(len(others) + 1)):
            yield sides[role], known


def true_images(config: Config, generator: LatentGenerator, weights: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """({side: images [N, 3, S, S] in [-1, 1]}, classes [N]) of the chosen items. Raises UserError for other data."""
    source, size = open_split(config, read_saved(weights, ""))
    sides = generator.roles.sides
    if len(sides) < 2 or not generator.latent.takes(source.side_names):
        raise UserError(f"{source.path}: needs the sides {', '.join(sides)}, and a model that has several")
    loaded = load_images(source, size)
    whole = [row for row in range(len(loaded.images)) if all(bool(mask[row]) for mask in loaded.present.values())]
    if len(whole) < config.num_samples:
        raise UserError(f"{source.path}: {len(whole)} items have all sides; lower --num_samples {config.num_samples}")
    spread = np.linspace(0, len(whole) - 1, config.num_samples).round().astype(int)
    numbers = [whole[k] for k in spread]
    pixels = from_uint8(loaded.images[numbers].to(generator.device))
    first, others = split_sides(pixels, sides)
    labels = None if loaded.labels is None else loaded.labels[numbers].to(generator.device)
    needed = any(row_of(generator.config, name).needs_labels for name in generator.modalities)
    if needed and (labels is None or bool((labels < 0).any())):
        raise UserError(f"{source.path}: some of the items have no class, which this model is given")
    return {sides[0]: first, **others}, labels


def draw(
    config: Config,
    generator: LatentGenerator,
    truth: dict[str, Tensor],
    labels: Tensor | None,
    target: str,
    known: Sequence[str],
) -> Tensor:
    """The images [N, 3, S, S] of the side `target`."""
    values = {name: generator.latent.encode(truth[name]) for name in known if name in truth}
    if labels is not None:
        values |= {name: labels for name in known if name not in truth}
    seeds = parse_seeds(config.seeds, config.num_samples)
    made = generator.made_from(values, seeds, config[LatentSampleConfig], target=target)
    return generator.latent.decode(made[target])


def titled(rows: Sequence[tuple[str, Tensor]]) -> np.ndarray:
    """uint8 [H, W, 3]: a row of pictures each, after its title."""
    lines = []
    for title, images in rows:
        line = make_grid(to_nhwc(images), columns=len(images))
        factor = max(1, -(-ENLARGED // images.shape[-1]))
        line = line.repeat(factor, axis=0).repeat(factor, axis=1)
        label = Image.new("RGB", (TITLE, len(line)), "white")
        words = title.replace(" of ", "\nof ").replace(", ", ",\n")
        ImageDraw.Draw(label).multiline_text((4, 4), words, fill="black", spacing=2)
        lines.append(np.concatenate([np.asarray(label), line], axis=1))
    return np.concatenate(lines)


def console() -> None:
    run(main)
