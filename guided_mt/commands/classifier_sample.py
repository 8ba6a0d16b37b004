"""Draw images of chosen classes, guided by a separate classifier of noisy images.

    mt-diffusion classifier-sample --model_path runs/first --classifier_path runs/classifier --classifier_scale 2 --class 7

The flags are those of guided-diffusion's classifier_sample.py and ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..data.images import make_grid, save_png, to_nhwc
from ..diffusion.sampling.guidance import classifier_guidance
from ..errors import UserError
from ..generation.generate import Generator, adm_path, parse_seeds
from ..generation.noisy_classifier import find_classifier, load_classifier
from ..generation.sharded import run_sharded
from ..modalities.classes import choose_classes
from ..runs import distributed
from ..runs.checkpoint import differing_keys, find_weights, read_classes
from ..runs.config import ClassifierConfig, Config, DiffusionConfig, SampleConfig, option, parse
from .console import announce, rename_flag, run, split_flags, with_saved_config

GRID = 64


@dataclass
class GuideConfig:
    """Guidance"""

    classifier_path: str = option(
        "", "the classifier: its run, its weights file, an ADM .pt, or a run trained with --mt_label_head E"
    )
    classifier_ema: str = option("", "which averaged weights of the classifier, '0.9999' or 'none'; empty: the slowest")
    classifier_scale: float = option(1.0, "strength of the guidance; 0: none", least=0)
    num_samples: int = option(10000, "how many images", least=1)
    class_name: str = option("", "draw this class only, by name or id (also --class); empty: classes at random")


SECTIONS = (SampleConfig, GuideConfig)


def main(argv: Sequence[str]) -> None:
    # A diffusion run has classifier flags of its own, those of its E head: what is typed here is of the other network.
    words, argv = split_flags(rename_flag(argv, "--class", "--class_name"), [f.name for f in fields(ClassifierConfig)])
    config = with_saved_config(argv, SECTIONS, __doc__)
    processes = distributed.setup(config.device)
    flags = parse(words, (ClassifierConfig,), description=__doc__)
    weights, guide = find_classifier(
        config.classifier_path,
        config.classifier_ema,
        {name: getattr(flags, name) for name in flags.typed},
        {"image_size": config.image_size, **config.as_dict(DiffusionConfig)},
    )
    check_pair(config, guide)
    names = class_names(config, weights, guide)
    shape = f"{config.num_samples}x{config.image_size}x{config.image_size}x3"
    out = adm_path(config, f"guided_{shape}.npz", f"samples_{shape}.npz")
    shown = ", ".join(f"{key} {value}" for key, value in guide.as_dict().items() if key.startswith("classifier_"))
    if announce(config, processes, f"classifier {weights}: {guide.num_classes} classes, {shown}", f"writing {out}"):
        return
    seeds = parse_seeds(config.seeds, config.num_samples)
    choose_classes(names, config.class_name, seeds[:1])
    generator = Generator.load(config, processes.device)
    generator.unconditional()  # refuses a model that never saw plain noisy images, before anything is written
    classifier = load_classifier(
        config.classifier_path, ema=config.classifier_ema, settings=guide.as_dict(), device=processes.device
    )

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        own = [seeds[i] for i in batch]
        labels = choose_classes(names, config.class_name, own, processes.device)
        guided = classifier_guidance(classifier.model, labels, config.classifier_scale)
        x_start = generator.draw_unconditional(
            own,
            config[SampleConfig],
            labels if config.class_cond else None,
            cond_fn=guided if config.classifier_scale > 0 else None,
        )
        return {"arr_0": to_nhwc(x_start), "arr_1": labels.cpu().numpy()}

    signature = {**config.as_dict(), **guide.as_dict(), "weights": str(find_weights(config.model_path, config.ema))}
    signature |= {"classifier": str(weights)}
    arrays = run_sharded(
        out, config.num_samples, config.batch_size, processes, signature, make, fill=config.fill_batches
    )
    if arrays is not None:
        save_png(make_grid(arrays["arr_0"][:GRID], columns=8), out.with_suffix(".png"))
        print(f"{out}: {', '.join(f'{name} {array.dtype} {list(array.shape)}' for name, array in arrays.items())}")
        print(f"{out.with_suffix('.png')}: the first {min(GRID, len(arrays['arr_0']))}")
    processes.close()


def check_pair(config: Config, guide: Config) -> None:
    """Raises UserError for a classifier that was trained for other images, classes or noise than the diffusion model's."""
    if guide.image_size != config.image_size:
        raise UserError(
            f"--classifier_path {config.classifier_path}: classifies images of size {guide.image_size}, and --model_path "
            f"{config.model_path} draws size {config.image_size}; take a classifier of that size"
        )
    said = "num_classes" in config.typed
    if (config.class_cond or said) and guide.num_classes != config.num_classes:
        other = f"--num_classes is {config.num_classes}" if said else f"{config.model_path} has {config.num_classes}"
        raise UserError(
            f"--classifier_path {config.classifier_path}: has {guide.num_classes} classes, and {other}; "
            "take a classifier of the same classes"
        )
    keys = ("diffusion_steps", "noise_schedule", "rescale_timesteps")  # what its timesteps mean
    different = differing_keys({k: getattr(guide, k) for k in keys}, {k: getattr(config, k) for k in keys})
    if different:
        raise UserError(
            f"--classifier_path {config.classifier_path}: was trained with another noise than the diffusion model: "
            f"{', '.join(different)}; train one with the model's diffusion flags"
        )


def class_names(config: Config, weights: Path, guide: Config) -> list[str]:
    """The names by id, which are those of the classifier. Raises UserError where the diffusion model has others."""
    own = read_classes(weights.parent)
    if not config.class_cond:
        return own or [str(i) for i in range(guide.num_classes)]
    model = read_classes(find_weights(config.model_path, config.ema).parent)
    if own and model and own != model:
        first = next((i for i, (a, b) in enumerate(zip(own, model, strict=False)) if a != b), min(len(own), len(model)))
        theirs, ours = (names[first] if first < len(names) else "missing" for names in (own, model))
        raise UserError(
            f"--classifier_path {config.classifier_path}: its class {first} is '{theirs}', that of {config.model_path} "
            f"'{ours}'; take a classifier trained on the same classes"
        )
    return own or model or [str(i) for i in range(guide.num_classes)]


def console() -> None:
    run(main)
