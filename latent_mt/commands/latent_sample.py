"""Translate the images of a split with a trained latent model, either way, or draw pairs from nothing.

    python scripts/latent_sample.py --model_path RUN --given photo             # maps of photos: generated, and read off the head
    python scripts/latent_sample.py --model_path RUN --given map               # photos of maps
    python scripts/latent_sample.py --model_path RUN --num_samples 16          # pairs

--model_path may also be a .ckpt of latent-diffusion with the --config FILE that describes it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from guided_mt.commands.console import announce, run
from guided_mt.data import load_images
from guided_mt.data.images import from_uint8, make_grid, save_npz, save_png, to_nhwc
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.errors import UserError, nearest
from guided_mt.generation.drawing import start_warning
from guided_mt.generation.generate import parse_seeds, samples_folder
from guided_mt.generation.sharded import content_hash, run_sharded
from guided_mt.runs import checkpoint, distributed
from guided_mt.runs.config import Config, option, parse
from guided_mt.runs.distributed import Processes

from ..data import PairData, PairSource
from ..model.generate import ROUTES, LatentGenerator, LatentSampleConfig
from ..model.latent_diffusion import LatentMTDiffusion
from ..runs.configuration import load_config
from ..runs.ldm_checkpoint import load_ldm
from ..runs.targets import instantiate

GRID = 8  # columns of a picture grid
DEFAULT_PAIRS = 16
log = logging.getLogger("latent_mt")
OF_PAIRS = ("route", "data_dir", "split", "timesteps", "draws")  # flags that say nothing without --given


@dataclass
class TranslateConfig:
    """What to translate"""

    config: str = option("", "YAML file of a foreign --model_path, such as latent-diffusion's beside a .ckpt")
    given: str = option("", "the side that is given, as in photo; the other one is made. Empty: pairs from nothing")
    route: str = option(
        "generate,read",
        f"how the other side is made, of {', '.join(ROUTES)}: from noise, or off the head at little noise",
    )
    data_dir: str = option("", "the pairs: folder, .tar or .zip; empty: those of training")
    split: str = option("", "which split of the pairs; empty: the validation split of training")
    num_samples: int = option(-1, f"how many; -1: the whole split, or {DEFAULT_PAIRS} pairs from nothing", least=1)
    timesteps: str = option("", "route read: timesteps to read at, as in 0,20; empty: four of little noise")
    draws: int = option(1, "route read: noise draws per timestep", least=1)
    timestep_respacing: str = option("", "timesteps to visit, as in guided_mt, or ldm50 for LDM's 50; overrides steps")
    class_id: int = option(-1, "the class, for a class-conditional latent diffusion model; -1: at random", least=0)


def main(argv: Sequence[str]) -> None:
    config = parse(argv, (LatentSampleConfig, TranslateConfig), description=__doc__)
    check_flags(config)
    weights = checkpoint.find_weights(config.model_path, config.ema)
    saved = read_saved(weights, config.config)
    out = Path(config.out) if config.out else samples_folder(weights)
    processes = distributed.setup(config.device)
    if announce(config, processes, f"weights {weights}", f"writing to {out}"):
        return
    generator = LatentGenerator(load_model(saved, weights, processes.device, averaged=config.ema != "none"))
    signature = {**config.as_dict(), "weights": str(weights)}
    if config.given:
        translate(config, saved, generator, out, processes, signature)
    else:
        draw_pairs(config, generator, out, processes, signature)
    processes.close()


def check_flags(config: Config) -> None:
    """Raises UserError for flags that contradict each other."""
    options = config[TranslateConfig]
    if Path(config.out).suffix == ".npz":
        raise UserError(f"--out {config.out}: names a folder here; the .npz files in it have names of their own")
    alone = [name for name in OF_PAIRS if name in config.typed and not options.given]
    if alone:
        raise UserError(f"--{alone[0]} goes with --given, the side that is translated, as in --given photo")
    if options.given and "class_id" in config.typed:
        raise UserError("--class_id is of class-conditional models, which draw from nothing; leave out --given")


def read_saved(weights: Path, file: str) -> dict[str, Any]:
    """The configuration of the run that the weights lie in, or that of `file`. Raises UserError where there is none."""
    beside = weights.parent / "config.yaml"
    if not file and not beside.exists():
        raise UserError(
            f"{weights}: has no config.yaml beside it; give the YAML file that describes it by --config FILE"
        )
    return load_config(file or beside)


def load_model(
    saved: Mapping[str, Any], weights: Path, device: torch.device, averaged: bool = True
) -> LatentMTDiffusion:
    """The trained model, ready to draw from. averaged: take the averages of a foreign file. Raises UserError."""
    params = {**(saved["model"].get("params") or {}), "ckpt_path": None}
    # The weights file holds the first stage too.
    stage = params.get("first_stage_config") or {}
    params["first_stage_config"] = {**stage, "params": {**(stage.get("params") or {}), "ckpt_path": None}}
    model = instantiate({"target": saved["model"]["target"], "params": params}, "model")
    if not isinstance(model, LatentMTDiffusion):
        raise UserError(f"{weights}: is no latent diffusion model but {saved['model']['target']}")
    found = load_ldm(model, weights, ema=averaged)
    lacking = model.network.state_dict().keys() - found.model.keys() - (found.ema or {}).keys()
    if lacking:
        raise UserError(
            f"{weights}: has no heads or condition inputs ({len(lacking)} entries, such as '{min(lacking)}'), as "
            "latent-diffusion's own models have none: take mt_sides out of the YAML file, or give a run's own weights"
        )
    return model.to(device).to_fast_layout().eval().requires_grad_(False)


# ---------------------------------------------------------------- from one side to the other


def translate(
    config: Config,
    saved: Mapping[str, Any],
    generator: LatentGenerator,
    out: Path,
    processes: Processes,
    signature: dict,
) -> None:
    """Write NAME.npz, NAME/*.png and NAME.png for every route, and the truth beside them."""
    name_given = config.given
    source_side = generator.side(name_given)
    target = generator.model.sides[1 - source_side]
    routes = _routes(config, generator, source_side)
    pairs, size = open_split(config, saved)
    found = [side.name for side in pairs.sides]
    if found != list(generator.model.sides):
        raise UserError(
            f"{pairs.path}: its sides are {' and '.join(found)}, but the model's are {' and '.join(generator.model.sides)}"
        )
    loaded = load_images(pairs, size, limit=config.num_samples if config.num_samples > 0 else None)
    seeds = parse_seeds(config.seeds, len(loaded.images))
    sides = loaded.images.chunk(2, dim=1)  # uint8 (N, 3, H, W) each
    given, truth = sides[source_side], sides[1 - source_side]
    stems = unique_stems(loaded.names, pairs.path)
    for route in routes:
        name = f"{target}_of_{name_given}" + ("" if route == "generate" else "_read")

        def make(batch: list[int], route: str = route) -> dict[str, np.ndarray]:
            own = [seeds[i] for i in batch]
            images = from_uint8(given[batch].to(processes.device))
            latents = generator.model.encode_images(images)
            if route == "generate":
                z = generator.translate(
                    source_side, latents, own, config[LatentSampleConfig], config.timestep_respacing
                )
            else:
                z = generator.read(source_side, latents, own, config.timesteps, config.draws)
            return {"arr_0": to_nhwc(generator.model.decode_latents(z))}

        settings = {**signature, "route": route, "images": content_hash(loaded.images.numpy())}
        arrays = run_sharded(out / f"{name}.npz", len(stems), config.batch_size, processes, settings, make)
        if arrays is not None:
            made = arrays["arr_0"]
            write_folder(out / name, stems, made)
            rows = [x[:GRID].permute(0, 2, 3, 1).numpy() for x in (given, truth)] + [made[:GRID]]
            save_png(make_grid(np.concatenate(rows), columns=min(GRID, len(made))), out / f"{name}.png")
            print(f"{out / name}.npz: arr_0 uint8 {list(made.shape)}, and {out / name}/ with as many PNG files")
            print(f"{out / name}.png: rows {name_given}, {target} (truth), {target} ({route})")
    if processes.is_main:
        write_truth(out, target, pairs, loaded.indices.tolist(), stems, truth.permute(0, 2, 3, 1).numpy(), size)


def _routes(config: Config, generator: LatentGenerator, source: int) -> list[str]:
    """Those of --route that this model has. Raises UserError where it has none, or not all that were typed."""
    routes = [word.strip() for word in config.route.split(",") if word.strip()]
    for word in routes:
        if word not in ROUTES:
            raise UserError(f"--route: '{word}' is none of {', '.join(ROUTES)}{nearest(word, ROUTES)}")
    if not routes:
        raise UserError(f"--route '{config.route}': name {' or '.join(ROUTES)}, or both")
    can = {"generate": generator.generates(source), "read": generator.reads(source)}
    possible = [route for route in routes if can[route]]
    if "route" in config.typed or not possible:
        for route in routes:
            generator.check(route, source)
    return possible


def open_split(config: Config, saved: Mapping[str, Any]) -> tuple[PairSource, int]:
    """(pairs of the split to translate, their size in pixels). Raises UserError."""
    data = saved.get("data") or {}
    params = {**(data.get("params") or {}), "latents": None, "limit": None}
    if config.data_dir:
        params["path"] = config.data_dir
    opened = instantiate({"target": data.get("target"), "params": params}, "data")
    if not isinstance(opened, PairData):
        raise UserError(f"--given {config.given}: the data of this run are single images, not pairs")
    return opened.pixel_source(config.split or opened.splits[1] or opened.splits[0]), opened.image_size


def unique_stems(names: Sequence[str], path: str) -> list[str]:
    """File names without folder and suffix. Raises UserError where two are the same."""
    stems = [Path(name).stem for name in names]
    twice = next((stem for stem, count in Counter(stems).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"{path}: two images are called {twice}, so their results would overwrite each other; rename one"
        )
    return stems


def write_folder(folder: Path, stems: Sequence[str], images: np.ndarray) -> None:
    """Images uint8 [N, H, W, 3] or maps [N, H, W] as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, image in zip(stems, images, strict=True):
        Image.fromarray(image).save(folder / f"{stem}.png")


def write_truth(
    out: Path,
    target: str,
    pairs: PairSource,
    indices: Sequence[int],
    stems: Sequence[str],
    images: np.ndarray,
    size: int,
) -> None:
    """The true target side: NAME_truth.npz (arr_0) for the evaluator, and for label maps their indices as PNG and classes.txt."""
    save_npz(out / f"{target}_truth.npz", {"arr_0": images})
    side = next(side for side in pairs.sides if side.name == target)
    if side.palette is None:  # no label map
        return
    write_folder(out / f"{target}_truth", stems, np.stack([pairs.label_map(i, size) for i in indices]))
    lines = [
        f"{c.index} {c.name.replace(' ', '_')} {' '.join(map(str, c.colour))}"
        for c in (*side.palette.classes, *side.palette.void)
    ]
    (out / "classes.txt").write_text("\n".join(["# index name R G B", *lines, ""]))
    print(
        f"{out / target}_truth/: the true classes; score with evaluations/segmentation.py --classes {out / 'classes.txt'}"
    )


# ---------------------------------------------------------------- from nothing


def draw_pairs(config: Config, generator: LatentGenerator, out: Path, processes: Processes, signature: dict) -> None:
    """Write samples of both sides (or of single images) as .npz, `arr_0` the first side, and a picture grid."""
    model = generator.model
    count = config.num_samples if config.num_samples > 0 else DEFAULT_PAIRS
    seeds = parse_seeds(config.seeds, count)
    names = ["arr_0", *model.sides[1:]]
    far = start_warning(model.diffusion, config[LatentSampleConfig], model.modality_names)
    if far and processes.is_main:
        log.warning("%s", far)

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        own = [seeds[i] for i in batch]
        conditions = class_condition(model, own, config.class_id)
        latents = generator.pairs(own, config[LatentSampleConfig], config.timestep_respacing, conditions)
        return {name: to_nhwc(model.decode_latents(z)) for name, z in zip(names, latents, strict=True)}

    file = out / (f"pairs_{count}.npz" if model.sides else f"samples_{count}.npz")
    arrays = run_sharded(file, count, config.batch_size, processes, signature, make)
    if arrays is not None:
        rows = [arrays[name][start : start + GRID] for start in range(0, min(count, 32), GRID) for name in names]
        save_png(make_grid(np.concatenate(rows), columns=min(GRID, count)), file.with_suffix(".png"))
        print(f"{file}: {', '.join(f'{name} uint8 {list(arrays[name].shape)}' for name in names)}")
        print(
            f"{file.with_suffix('.png')}: "
            + (f"rows {' and '.join(model.sides)} in turn" if model.sides else "the first")
        )


def class_condition(model: LatentMTDiffusion, seeds: Sequence[int], class_id: int) -> dict[str, Any]:
    """LDM's condition for samples: a class, chosen or each sample's own. Raises UserError for other kinds of condition."""
    if model.conditioning_key is None and (model.sides or model.network.num_classes is None):
        if class_id >= 0:
            raise UserError(f"--class_id {class_id}: this model knows of no classes; leave the flag out")
        return {}
    stage: Any = getattr(model, "cond_stage_model", None)
    by_class = model.cond_stage_key == "class_label" and model.conditioning_key == "crossattn" and stage is not None
    by_label = model.conditioning_key in (None, "adm") and model.network.num_classes is not None  # ADM's own way
    if not by_class and not by_label:
        raise UserError(
            f"this model is conditioned on {model.cond_stage_key} ({model.conditioning_key}), which has no flag; in Python, pass "
            "it as `conditions` of LatentGenerator.pairs"
        )
    count: int = stage.embedding.num_embeddings if by_class else model.network.num_classes or 0
    if class_id >= count:
        raise UserError(f"--class_id {class_id}: this model has classes 0 to {count - 1}")
    own = SampleStreams(
        torch.as_tensor(list(seeds)), index=Stream.LATENT_CLASS, device=model.scale_factor.device
    ).integers(count)
    classes = own if class_id < 0 else torch.full_like(own, class_id)
    return {"c_crossattn": stage({stage.key: classes})} if by_class else {"y": classes}


def console() -> None:
    run(main)
