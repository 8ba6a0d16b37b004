"""Draw images, and the second kind of data with them, from a trained model (ADM's image_sample.py and its flags)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import distributed
from ..checkpoint import find_weights
from ..config import Config, SampleConfig, option
from ..errors import UserError
from ..generate import Generator, output_path, parse_seeds
from ..images import make_grid, save_png, to_nhwc
from ..random import SampleStreams
from ..sharded import run_sharded
from .console import announce, run, with_saved_config

GRID = 64


@dataclass
class GenerateConfig:
    """What to draw"""

    num_samples: int = option(10000, "how many images", least=1)
    class_name: str = option("", "draw this class only, by name or id (also --class); empty: classes at random")


SECTIONS = (SampleConfig, GenerateConfig)


def main(argv: Sequence[str]) -> None:
    argv = ["--class_name" if word == "--class" else word.replace("--class=", "--class_name=", 1) for word in argv]
    config = with_saved_config(argv, SECTIONS, __doc__)
    processes = distributed.setup(config.device)
    out = output_path(config, f"samples_{config.num_samples}x{config.image_size}x{config.image_size}x3.npz")
    if announce(config, processes, f"writing {out}"):
        return
    seeds = parse_seeds(config.seeds, config.num_samples)
    generator = Generator.load(config, processes.device)
    settings = config[SampleConfig]

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        own = [seeds[i] for i in batch]
        labels = choose_labels(config, generator, own)
        drawn = generator.draw(own, settings, labels=labels)
        arrays = {"arr_0": to_nhwc(drawn.x_start)}
        if labels is not None:
            arrays["arr_1"] = labels.cpu().numpy()
        for name, x in drawn.modalities.items():
            if name not in generator.model.condition_names:  # those were given, and said nothing
                arrays |= generator.modalities[name].arrays(x)
        return arrays

    signature = {**config.as_dict(), "weights": str(find_weights(config.model_path, config.ema))}
    arrays = run_sharded(out, config.num_samples, config.batch_size, processes, signature, make)
    if processes.is_main:
        shown = [arrays[name][:GRID] for name in arrays if arrays[name].ndim == 4]
        columns = min(8, len(shown[0]))
        save_png(np.concatenate([make_grid(images, columns) for images in shown], axis=1), out.with_suffix(".png"))
        print(f"{out}: {', '.join(f'{name} {array.dtype} {list(array.shape)}' for name, array in arrays.items())}")
        print(f"{out.with_suffix('.png')}: the first {min(GRID, len(arrays['arr_0']))}")
    processes.close()


def choose_labels(config: Config, generator: Generator, seeds: Sequence[int]) -> torch.Tensor | None:
    """Class ids [B] for a class-conditional model: the chosen one, or each sample's own draw among the known classes."""
    if not config.class_cond:
        if config.class_name:
            raise UserError("--class needs a class-conditional model (--class_cond True)")
        return None
    names = generator.classes or [str(i) for i in range(config.num_classes)]
    if not config.class_name:
        return SampleStreams(torch.as_tensor(seeds), index=2, device=generator.device).integers(len(names))
    if config.class_name in names:
        chosen = names.index(config.class_name)
    elif config.class_name.isdigit() and int(config.class_name) < len(names):
        chosen = int(config.class_name)
    else:
        raise UserError(
            f"--class '{config.class_name}': this model has {len(names)} classes, {', '.join(names[:10])} ..."
        )
    return torch.full((len(seeds),), chosen, device=generator.device)


def console() -> None:
    run(main)
