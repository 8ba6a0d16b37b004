"""Draw images from a trained model, and with them what else it models; or with some of that given.

    mt-diffusion sample --model_path runs/first --num_samples 64
    mt-diffusion sample --model_path runs/labels --num_samples 64 --given label=7
    mt-diffusion sample --model_path runs/both --num_samples 64 --given label=3 --given masked=holes.png

The flags are those of guided-diffusion's image_sample.py and ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.images import make_grid, save_png, to_nhwc
from ..diffusion.random import SampleStreams, Stream
from ..errors import UserError, nearest
from ..generation.generate import Generator, adm_path, parse_seeds
from ..generation.sharded import content_hash, run_sharded
from ..modalities.classes import choose_classes
from ..modalities.settings import absent_names
from ..runs import distributed
from ..runs.checkpoint import find_weights
from ..runs.config import Config, SampleConfig, option
from .console import announce, rename_flag, run, with_saved_config

GRID = 64


@dataclass
class GenerateConfig:
    """What to draw"""

    num_samples: int = option(10000, "how many images", least=1)
    class_name: str = option("", "draw this class only, by name or id (also --class); empty: classes at random")
    given: str = option(
        "", "known modalities, as in label=3 or label=cat,masked=FILE (repeatable); the others are drawn with the image"
    )
    target: str = option("", "with paired images: which of them is z_0 (arr_0); empty: the first that is not given")
    absent: str = option(
        "", "modalities that the samples are to have none of, as the images that lacked them in training"
    )
    label_draw: bool = option(False, "also write a label drawn from each sample's probabilities")


SECTIONS = (SampleConfig, GenerateConfig)


def main(argv: Sequence[str]) -> None:
    """Draw images and their modalities as `argv` says. Raises UserError."""
    argv = rename_flag(argv, "--class", "--class_name")
    config = with_saved_config(join_given(argv), SECTIONS, __doc__)
    processes = distributed.setup(config.device)
    out = adm_path(config, f"samples_{config.num_samples}x{config.image_size}x{config.image_size}x3.npz")
    if announce(config, processes, f"writing {out}"):
        return
    seeds = parse_seeds(config.seeds, config.num_samples)
    generator = Generator.load(config, processes.device)
    given, absent = read_given(config, generator), read_absent(config, generator)
    generator.role_for(list(given), config.target, absent)
    settings = config[SampleConfig]

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        own = [seeds[i] for i in batch]
        labels = choose_labels(config, generator, own)
        known = {name: (x[batch] if len(x) > 1 else x.expand(len(batch), *x.shape[1:])) for name, x in given.items()}
        known = {name: generator.modality_of(name).enter(x.to(processes.device)) for name, x in known.items()}
        drawn = generator.draw(own, settings, known, labels, target=config.target, absent=absent)
        arrays = {"arr_0": to_nhwc(generator.space.decode(drawn.x_start))}
        if labels is not None:
            arrays["arr_1"] = labels.cpu().numpy()
        for name, x in drawn.modalities.items():
            modality = generator.modality_of(name)
            arrays = beside(arrays, modality.arrays(x), name)
            if config.label_draw:
                streams = SampleStreams(torch.as_tensor(own), index=Stream.LABEL_DRAW, device=x.device)
                arrays = beside(arrays, modality.drawn(x, streams), name)
        return arrays

    hashes = {f"given {name}": content_hash(x.numpy()) for name, x in given.items()}
    signature = {**config.as_dict(), **hashes, "weights": str(find_weights(config.model_path, config.ema))}
    arrays = run_sharded(
        out, config.num_samples, config.batch_size, processes, signature, make, fill=config.fill_batches
    )
    if arrays is not None:
        shown = [arrays[name][:GRID] for name in arrays if arrays[name].ndim == 4]
        columns, texts = min(8, len(shown[0])), texts_below(arrays, len(shown[0]))
        grids = [make_grid(images, columns, texts=texts) for images in shown]
        save_png(np.concatenate(grids, axis=1), out.with_suffix(".png"))
        print(f"{out}: {', '.join(f'{name} {array.dtype} {list(array.shape)}' for name, array in arrays.items())}")
        print(f"{out.with_suffix('.png')}: the first {min(GRID, len(arrays['arr_0']))}")
    processes.close()


def texts_below(arrays: Mapping[str, np.ndarray], count: int) -> list[str] | None:
    """What is written under the first `count` images: their captions; None where there are none."""
    found = [array[:count] for array in arrays.values() if array.dtype.kind == "U"]
    return [" / ".join(texts) for texts in zip(*found, strict=True)] if found else None


def beside(arrays: Mapping[str, np.ndarray], more: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """`arrays` with those of the modality `name`. Raises UserError where it would replace one."""
    for key in more.keys() & arrays.keys():
        raise UserError(
            f"modality '{name}': writes the array {key}, which the sample file has already; name it otherwise"
        )
    return {**arrays, **more}


def join_given(argv: Sequence[str]) -> list[str]:
    """'--given a=1 --given b=2' is '--given a=1,b=2'."""
    words, parts, rest = iter(argv), [], []
    for word in words:
        if word == "--given":
            parts.append(next(words, ""))
        elif word.startswith("--given="):
            parts.append(word.partition("=")[2])
        else:
            rest.append(word)
    if "" in parts:
        raise UserError("--given: write NAME=VALUE, as in --given label=3")
    return [*rest, "--given", ",".join(parts)] if parts else rest


def read_given(config: Config, generator: Generator) -> dict[str, torch.Tensor]:
    """{modality: x [1 or N, ...]} of `--given`. Raises UserError for an unknown modality, and values that don't fit."""
    given: dict[str, torch.Tensor] = {}
    words = config.given
    modelled = class_modality(generator)
    if config.class_name and modelled:
        words = ",".join(filter(None, [words, f"{modelled}={config.class_name}"]))
    for part in re.split(r",(?=[\w-]+=)", words) if words else []:
        name, equals, text = part.partition("=")
        if name not in generator.names and name not in generator.modalities:
            known = ", ".join(generator.names) or "no modality"
            other = "; --class chooses its class" if config.class_cond and name == "label" else ""
            raise UserError(
                f"--given {part}: this model has no modality '{name}'{nearest(name, generator.names)}; it has {known}{other}"
            )
        if not equals or not text:
            raise UserError(f"--given {part}: write {name}=VALUE")
        if name in given:
            raise UserError(f"--given {words}: names {name} twice")
        given[name] = generator.modality_of(name).read(text, config.image_size, generator.classes)
        if 1 < len(given[name]) < config.num_samples:
            raise UserError(
                f"--given {part}: holds {len(given[name])} for {config.num_samples} samples; lower --num_samples"
            )
    return given


def read_absent(config: Config, generator: Generator) -> list[str]:
    """The modalities of `--absent`. Raises UserError for others, and those that the network can't be told of."""
    absent = [name.strip() for name in config.absent.split(",") if name.strip()]
    slots = generator.slots(0)
    for name in absent:
        if name not in slots:
            raise UserError(
                f"--absent {name}: this model has no such modality{nearest(name, slots)}; it has {', '.join(slots)}"
            )
        if slots[name] not in absent_names(generator.config):
            raise UserError(f"--absent {name}: no image lacked it in this model's training (--mt_absent)")
    return absent


def class_modality(generator: Generator) -> str:
    """The name of the modality that is the image's class, '' where there is none."""
    return next((name for name, modality in generator.modalities.items() if modality.is_class), "")


def choose_labels(config: Config, generator: Generator, seeds: Sequence[int]) -> torch.Tensor | None:
    """Class ids [B] for a class-conditional model: the chosen one, or each sample's own draw among the known classes."""
    if not config.class_cond:
        if config.class_name and not class_modality(generator):
            raise UserError("--class needs a class-conditional model (--class_cond True), or one with --mt_task label")
        return None
    names = generator.classes or [str(i) for i in range(config.num_classes)]
    return choose_classes(names, config.class_name, seeds, generator.device)


def console() -> None:
    """The script's door."""
    run(main)
