"""Draw from a trained latent model: everything from nothing, or what is left open with some of it given.

    mt-diffusion latent-sample --model_path RUN --given photo             # maps of photos: generated, and read off the head
    mt-diffusion latent-sample --model_path RUN --given map,label=3       # photos of maps, of class 3
    mt-diffusion latent-sample --model_path RUN --given masked=FILE       # what the user has, not the data
    mt-diffusion latent-sample --model_path RUN --num_samples 16          # all sides
    mt-diffusion latent-sample --model_path DiT-XL-2-256x256.pt --config imagenet256_dit_xl --class_id 207 --guidance_scale 4
    mt-diffusion latent-sample --model_path SD --prompt "a red fox" --guidance_scale 7.5      # Stable Diffusion

A name alone is given what the images of the data have of it; NAME=VALUE is given the same for all samples, or a file with one each.
--model_path may also be a .ckpt of latent-diffusion or Stable Diffusion, or a DiT's .pt, with the --config FILE that describes it,
or a folder in the layout of Hugging Face's diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_mt.commands.console import announce, run
from guided_mt.commands.sample import beside, join_given, read_absent
from guided_mt.data import load_images
from guided_mt.data.dataset import LoadedImages
from guided_mt.data.images import from_uint8, make_grid, save_png, to_nhwc
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError, nearest
from guided_mt.generation.batches import load_beside, split_sides
from guided_mt.generation.drawing import take_parents_sampler
from guided_mt.generation.generate import parse_seeds, samples_folder
from guided_mt.generation.sharded import content_hash, run_sharded
from guided_mt.modalities import Images
from guided_mt.runs import checkpoint, distributed
from guided_mt.runs.compiling import COMPILE
from guided_mt.runs.config import Config, option, parse
from guided_mt.runs.distributed import Processes
from guided_mt.runs.processes.launcher import rank_of_launcher

from ..model.conditions import Prompts, TextConfig, check_prompts, conditions_of, latent_size, read_prompts
from ..model.generate import ROUTES, LatentGenerator, LatentSampleConfig
from .loading import load_model, open_split, read_saved, settle_precision
from .translated import unique_stems, write_folder, write_truth

GRID = 8  # columns of a picture grid
DEFAULT_COUNT = 16
OF_DATA = ("route", "data_dir", "split", "timesteps", "draws")  # flags that say nothing without a name in --given


@dataclass
class TranslateConfig:
    """What to draw"""

    config: str = option("", "YAML file of a foreign --model_path, such as latent-diffusion's beside a .ckpt")
    first_stage: str = option(
        "",
        "the autoencoder of a --model_path that holds the network alone, as DiT's do: a file, a run, or a folder of diffusers'; "
        "empty: ckpt_path of the YAML file's first_stage_config",
    )
    given: str = option(
        "", "what is given, as in photo or map,label=3 (repeatable); the rest is made. Empty: everything from nothing"
    )
    target: str = option("", "the side that is made as z_0; empty: the first that is not given and was trained so")
    absent: str = option(
        "", "modalities that the samples are to have none of, as the images that lacked them in training"
    )
    route: str = option(
        "generate,read",
        f"how another side is made of the data's, of {', '.join(ROUTES)}: from noise, or off the head at little noise",
    )
    data_dir: str = option("", "the data to take what is given from: folder, .tar or .zip; empty: those of training")
    split: str = option("", "which split of the data; empty: the validation split of training")
    num_samples: int = option(
        -1, f"how many; -1: the whole split, one per prompt, or {DEFAULT_COUNT} from nothing", least=1
    )
    precision: str = option("", "arithmetic of the network: fp32, bf16 or fp16; empty: that of the model's YAML file")
    timesteps: str = option("", "route read: timesteps to read at, as in 0,20; empty: four of little noise")
    draws: int = option(1, "route read: noise draws per timestep", least=1)
    timestep_respacing: str = option(
        "", "timesteps to visit, as in guided_mt, or ldm50 for LDM's DDIM with 50; overrides steps"
    )
    class_id: int = option(-1, "the class, for a class-conditional latent diffusion model; -1: at random", least=0)
    compile: str = option(
        "False",
        "torch.compile of the network and the arithmetic around it; reduce-overhead: also as CUDA graphs",
        COMPILE,
    )


@dataclass(frozen=True)
class Given:
    """--given as written: names that are taken from the data, and {name: text} of the others."""

    names: tuple[str, ...]
    values: dict[str, str]

    def __iter__(self) -> Any:
        return iter((*self.names, *self.values))

    @property
    def title(self) -> str:
        """For file names."""
        return "_".join(self)


def main(argv: Sequence[str]) -> None:
    """Draw or translate by a latent model as `argv` says. Raises UserError."""
    config = parse(join_given(argv), (LatentSampleConfig, TranslateConfig, TextConfig), description=__doc__)
    given, prompts = read_words(config.given), read_prompts(config)
    check_flags(config, given)
    take_parents_sampler(config)
    weights = checkpoint.find_weights(config.model_path, config.ema)
    saved = read_saved(weights, config.config)
    out = Path(config.out) if config.out else samples_folder(weights)
    processes = distributed.setup(config.device)
    if announce(config, processes, f"weights {weights}", f"writing to {out}"):
        return
    model = load_model(saved, weights, processes.device, averaged=config.ema != "none", first_stage=config.first_stage)
    model = settle_precision(model, config.precision)
    size = latent_size(model, config.height, config.width)
    generator = LatentGenerator(
        model, classes=checkpoint.read_classes(weights.parent), size=size, compiling=config.compile
    )
    check_names(config, given, generator)
    check_prompts(model, prompts, config.class_id)
    signature = {**config.as_dict(), "weights": str(weights), "prompts": prompts and prompts.texts}
    if given.names:
        of_data(config, given, prompts, saved, generator, out, processes, signature)
    else:
        of_values(config, given, prompts, generator, out, processes, signature)
    processes.close()


def read_words(text: str) -> Given:
    """Raises UserError for a name that is given twice."""
    names, values = [], {}  # type: list[str], dict[str, str]
    words: list[str] = []  # all of them
    for part in re.split(r",(?=[\w-]+=)", text) if text else []:
        name, equals, value = part.partition("=")
        # Behind a value a comma belongs to it; names alone stand before.
        *alone, name = name.split(",") if equals else [*part.split(","), ""]
        alone = [word.strip() for word in alone if word.strip()]
        names, words = [*names, *alone], [*words, *alone, *([name] if equals else [])]
        if equals:
            values[name] = value
    for name in words:
        if words.count(name) > 1:
            raise UserError(f"--given {text}: names {name} twice")
    return Given(tuple(names), values)


def check_flags(config: Config, given: Given) -> None:
    """Raises UserError for flags that contradict each other."""
    if Path(config.out).suffix == ".npz":
        raise UserError(f"--out {config.out}: names a folder here; the .npz files in it have names of their own")
    alone = [name for name in OF_DATA if name in config.typed and not given.names]
    if alone:
        raise UserError(f"--{alone[0]} goes with --given, the side that is translated, as in --given photo")
    if given.names and "class_id" in config.typed:
        raise UserError(
            "--class_id is of class-conditional models, and of samples that no images of data are given; leave it out"
        )


def check_names(config: Config, given: Given, generator: LatentGenerator) -> None:
    """Raises UserError for what the model doesn't know of."""
    for name in given:
        if not generator.modalities:
            raise UserError(
                f"'{name}' can't be given: this model knows of single images only (no mt_sides, no mt_tasks)"
            )
        if name not in generator.names:
            known = " and ".join(generator.names)
            raise UserError(
                f"'{name}' is no side or modality of this model{nearest(name, generator.names)}; it has {known}"
            )
    if config.target:
        generator.role_for(list(given), config.target, read_absent(config, generator))


def known_values(given: Given, generator: LatentGenerator, count: int) -> dict[str, Tensor]:
    """{name: what was read [1 or N, ...]} of NAME=VALUE. Raises UserError for values that don't fit."""
    found = {}
    for name, text in given.values.items():
        read = generator.modality_of(name).read(text, generator.config.image_size, generator.classes)
        if 1 < len(read) < count:
            raise UserError(f"--given {name}={text}: holds {len(read)} for {count} samples; lower --num_samples")
        if len(read) > count and rank_of_launcher() == 0:
            print(f"# --given {name}={text}: the first {count} of {len(read)} are taken; --num_samples says how many")
        found[name] = read
    return found


def entered(generator: LatentGenerator, read: Mapping[str, Tensor], batch: list[int]) -> dict[str, Tensor]:
    """{name: x [B, ...]} on the device, for some of the samples."""
    rows = {name: x[batch] if len(x) > 1 else x.expand(len(batch), *x.shape[1:]) for name, x in read.items()}
    return {name: generator.modality_of(name).enter(x.to(generator.device)) for name, x in rows.items()}


def shown(generator: LatentGenerator, made: Mapping[str, Tensor], given: Given) -> dict[str, np.ndarray]:
    """Arrays of what was made: uint8 images by side, and those of the other modalities."""
    sides = generator.roles.sides
    images = {
        name: to_nhwc(generator.latent.decode(made[name])) for name in sides if name in made and name not in given
    }
    for name, x in made.items():
        if name not in sides and name not in given:
            images = beside(images, generator.modality_of(name).arrays(x), name)
    return images


# ---------------------------------------------------------------- with something of the data given


def of_data(
    config: Config,
    given: Given,
    prompts: Prompts | None,
    saved: Mapping[str, Any],
    generator: LatentGenerator,
    out: Path,
    processes: Processes,
    signature: dict,
) -> None:
    """Write TARGET_of_GIVEN.npz, TARGET_of_GIVEN/*.png and TARGET_of_GIVEN.png for every route, and the truth beside them."""
    sides, absent = generator.roles.sides, read_absent(config, generator)
    open_sides = [side for side in sides if side not in given and side not in absent]
    target = config.target or (open_sides[0] if open_sides else "")
    source = given.names[0] if len(list(given)) == 1 and given.names[0] in sides else ""
    routes = _routes(config, generator, target, source, list(given), absent)
    data, size = open_split(config, saved)
    found = list(data.side_names or (sides[0],))
    if generator.roles.slots and not generator.latent.takes(found):
        raise UserError(f"{data.path}: its sides are {' and '.join(found)}, but the model's are {' and '.join(sides)}")
    for modality in generator.modalities.values():
        if modality.name in given.names and modality.name not in generator.roles.slots:
            modality.prepare(data)
    loaded = load_images(data, size, limit=config.num_samples if config.num_samples > 0 else None)
    loaded = having(given, generator, loaded, data.path)
    count = len(loaded.images)
    seeds, read = parse_seeds(config.seeds, count), known_values(given, generator, count)
    stems = unique_stems(loaded.names, data.path)
    pixels = dict(zip(sides, loaded.images.chunk(max(1, len(data.side_names)), dim=1), strict=False))
    truth = {side: images.permute(0, 2, 3, 1).numpy() for side, images in pixels.items()}
    hashes = {f"given {name}": content_hash(x.numpy()) for name, x in read.items()}
    for route in routes:
        name = f"{target}_of_{given.title}" + ("" if route == "generate" else "_read")

        def make(batch: list[int], route: str = route) -> dict[str, np.ndarray]:
            own = [seeds[i] for i in batch]
            known = {**taken(generator, given, loaded, batch, own), **entered(generator, read, batch)}
            drawer = generator.under(conditions_of(generator.latent, config, prompts, batch, own))
            texts = {} if prompts is None else prompts.arrays(batch)
            if route == "read":
                z = drawer.read(target, source, known[source], own, config.timesteps, config.draws)
                return {"arr_0": to_nhwc(generator.latent.decode(z)), **texts}
            made = drawer.made_from(
                known, own, config[LatentSampleConfig], config.timestep_respacing, config.target, absent
            )
            arrays = shown(generator, made, given)
            return {"arr_0": arrays.pop(target), **arrays, **texts}

        settings = {**signature, **hashes, "route": route, "images": content_hash(loaded.images.numpy())}
        arrays = run_sharded(
            out / f"{name}.npz", len(stems), config.batch_size, processes, settings, make, fill=config.fill_batches
        )
        if arrays is not None:
            made = {target: arrays["arr_0"], **{side: arrays[side] for side in open_sides if side in arrays}}
            rows = [truth[side] for side in sides if side in given] + [truth[side] for side in made]
            titles = [side for side in sides if side in given] + [f"{side} (truth)" for side in made]
            for side, images in made.items():
                write_folder(out / name.replace(target, side, 1), stems, images)
            picture = np.concatenate([images[:GRID] for images in (*rows, *made.values())])
            save_png(make_grid(picture, columns=min(GRID, count)), out / f"{name}.png")
            described = ", ".join(f"{key} {x.dtype} {list(x.shape)}" for key, x in arrays.items())
            print(f"{out / name}.npz: {described}, and {out / name}/ with as many PNG files")
            print(f"{out / name}.png: rows {', '.join([*titles, *(f'{side} ({route})' for side in made)])}")
    if processes.is_main:
        for side in [side for side in open_sides if bool(loaded.present.get(side, torch.ones(1)).all())]:
            write_truth(out, side, data, loaded.indices.tolist(), stems, truth[side], size)


def having(given: Given, generator: LatentGenerator, loaded: LoadedImages, path: str) -> LoadedImages:
    """Those items that have all that is to be given of them. Raises UserError where none has."""
    roles, labels = generator.roles, loaded.labels
    masks = [loaded.present[name] for name in given.names if name in loaded.present]
    others = {n: m for n, m in generator.modalities.items() if n in given.names and n not in roles.slots}
    beside = load_beside(others, loaded.indices.numpy())
    images = Images(loaded.images, labels, beside, present=dict(loaded.present))
    masks += [mask for modality in others.values() if (mask := modality.present(images)) is not None]
    rows = [row for row in range(len(loaded.images)) if all(bool(mask[row]) for mask in masks)]
    if not rows:
        raise UserError(
            f"{path}: no item has {', '.join(given.names)}; leave out what is missing, or take another --split"
        )
    if len(rows) < len(loaded.images):
        print(f"# {len(loaded.images) - len(rows)} items are left out, which lack some of {', '.join(given.names)}")
    return loaded.take(rows)


def taken(
    generator: LatentGenerator, given: Given, loaded: LoadedImages, batch: list[int], seeds: Sequence[int]
) -> dict[str, Tensor]:
    """{name: x [B, ...]} of what the data's items have of the names that are given."""
    model, sides = generator.latent, generator.roles.sides
    pixels = from_uint8(loaded.images[batch].to(generator.device))
    image, others = split_sides(pixels, sides if generator.roles.slots else ())
    z = {name: model.encode(side) for name, side in {sides[0]: image, **others}.items() if name in given.names}
    labels = None if loaded.labels is None else loaded.labels[batch].to(generator.device)
    streams = SampleStreams(torch.as_tensor(seeds), index=Stream.INPUT, device=generator.device)
    left = {n: m for n, m in generator.modalities.items() if n in given.names and n not in z}
    beside = load_beside(left, loaded.indices[batch].numpy())
    images = Images(pixels, labels, {name: x.to(generator.device) for name, x in beside.items()}, image=image)
    return z | {name: modality.from_batch(images, streams) for name, modality in left.items()}


def _routes(
    config: Config,
    generator: LatentGenerator,
    target: str,
    source: str,
    given: Sequence[str],
    absent: Sequence[str],
) -> list[str]:
    """Those of --route that this model has. source: the one side that is given alone, '' where more is.

    Raises UserError where it has none, or not all that were typed.
    """
    routes = [word.strip() for word in config.route.split(",") if word.strip()]
    for word in routes:
        if word not in ROUTES:
            raise UserError(f"--route: '{word}' is none of {', '.join(ROUTES)}{nearest(word, ROUTES)}")
    if not routes:
        raise UserError(f"--route '{config.route}': name {' or '.join(ROUTES)}, or both")
    if not target or not source:
        if "route" in config.typed and "read" in routes:
            raise UserError("--route read: a head reads one side off another, which is all that is given")
        generator.role_for(given, config.target, absent)
        return ["generate"]
    can = {
        "generate": generator.roles.role_of(target) in generator.roles.trained,
        "read": generator.reads(target, source),
    }
    possible = [route for route in routes if can[route]]
    if "route" in config.typed or not possible:
        for route in routes:
            generator.check(route, target, source)
    return possible


# ---------------------------------------------------------------- with nothing of the data given


def of_values(
    config: Config,
    given: Given,
    prompts: Prompts | None,
    generator: LatentGenerator,
    out: Path,
    processes: Processes,
    signature: dict,
) -> None:
    """Write samples of what is not given as .npz, `arr_0` the first side, `prompt` each one's text, and a picture grid."""
    sides = generator.roles.sides
    count = config.num_samples if config.num_samples > 0 else DEFAULT_COUNT if prompts is None else len(prompts.texts)
    seeds, read, absent = (
        parse_seeds(config.seeds, count),
        known_values(given, generator, count),
        read_absent(config, generator),
    )
    generator.role_for(list(given), config.target, absent)
    names = [side for side in sides if side not in given and side not in absent]
    first = config.target or names[0]

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        own = [seeds[i] for i in batch]
        made = generator.under(conditions_of(generator.latent, config, prompts, batch, own)).made_from(
            entered(generator, read, batch),
            own,
            config[LatentSampleConfig],
            config.timestep_respacing,
            config.target,
            absent,
        )
        arrays = shown(generator, made, given)
        return {"arr_0": arrays.pop(first), **arrays, **({} if prompts is None else prompts.arrays(batch))}

    kind = "pairs" if len(sides) == 2 and not given.values else "samples"
    file = out / f"{kind}{f'_of_{given.title}' if given.values else ''}_{count}.npz"
    hashes = {f"given {name}": content_hash(x.numpy()) for name, x in read.items()}
    arrays = run_sharded(
        file, count, config.batch_size, processes, {**signature, **hashes}, make, fill=config.fill_batches
    )
    if arrays is not None:
        images = {first: arrays["arr_0"], **{side: arrays[side] for side in names if side in arrays}}
        rows = [x[start : start + GRID] for start in range(0, min(count, 32), GRID) for x in images.values()]
        save_png(make_grid(np.concatenate(rows), columns=min(GRID, count)), file.with_suffix(".png"))
        print(f"{file}: {', '.join(f'{name} {x.dtype} {list(x.shape)}' for name, x in arrays.items())}")
        print(
            f"{file.with_suffix('.png')}: "
            + (f"rows {' and '.join(images)} in turn" if len(images) > 1 else "the first")
        )


def console() -> None:
    """The script's door."""
    run(main)
