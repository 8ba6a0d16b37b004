"""Classify images by the label head of a model trained with --mt_task label (form U or any), or by a classifier of its own.

    mt-diffusion classify --model_path runs/labels --data_dir builtin:digits-test
    mt-diffusion classify --classifier_path runs/classifier --data_dir builtin:digits-test

--texts classifies without labels, by the head of a model of CLIP's representation: the class is the nearest text.

Writes the probabilities; where the data say the true classes, prints the scores and draws two pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import ImageSource, UnknownClassError, load_images, open_source
from ..data.dataset import LoadedImages
from ..data.images import from_uint8, save_npz
from ..data.subset import spread
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..generation import zero_shot
from ..generation.build import trained_process
from ..generation.classification import classifier_probabilities, head_estimates, read_timesteps
from ..generation.generate import Generator, samples_folder
from ..generation.noisy_classifier import build_process, classifier_sections, find_classifier, load_classifier
from ..generation.sharded import content_hash, run_sharded
from ..modalities.settings import loss_weights, row_of, task_names
from ..runs import distributed
from ..runs.checkpoint import checkpoint_step, find_weights, read_classes, read_config, read_weights
from ..runs.config import Config, ModelConfig, SampleConfig, option, parse, redefined
from ..runs.weights import refuse_foreign
from .console import announce, split_flags, with_saved_config


@dataclass
class ClassifyConfig:
    """What to classify, and how"""

    model_path: str = option(
        "",
        "run folder, checkpoint folder or weights file of a model with a label head, or one that says CLIP's vectors",
    )
    classifier_path: str = option(
        "",
        "instead of a model: a classifier's run or weights file, an ADM .pt, or the one of a run with --mt_label_head E",
    )
    texts: str = option(
        "",
        "classify by the head of CLIP's representation instead, as one of these: a file with a class in each line, 'a cat;a dog', "
        "or data: the data's classes",
    )
    template: str = option("a photo of a {}", "the text of a class, for texts")
    ema: str = option("", "which averaged weights to use, '0.9999' or 'none'; empty: the slowest")
    data_dir: str = option("", "images to classify: folder, .tar or .zip, .npz, or builtin:digits-test")
    num_samples: int = option(-1, "how many images, spread evenly over the data; -1: all", least=1)
    labelled: bool = option(True, "False: take no classes from the data's names")
    timesteps: str = option(
        "",
        "noise levels to classify at, as in 0,20,40 (0 to diffusion_steps - 1); empty: 0, 4, 8 and 12 % of them, "
        "or less where the frame is larger sooner",
    )
    draws: int = option(4, "noise draws at each timestep", least=1)
    seed: int = option(0, "seed of the noise", least=0, most=2**32 - 1)
    out: str = option("", "the .npz to write. Empty: classified_STEP.npz in the run folder, or classifier_STEP.npz")
    batch_size: int = option(64, "images per forward pass", least=1)
    fill_batches: bool = redefined(
        SampleConfig,
        "fill_batches",
        help="on a CPU, fill smaller batches up to 16: an image's result is then the same to the bit in any batch",
    )
    device: str = option("", "cpu, cuda, cuda:1 ...; empty: a GPU if there is one")
    dry_run: bool = option(False, "print the resolved configuration, then stop")


class Network(NamedTuple):
    """What classifies. load(device) -> function of images [B, 3, S, S] and their `streams`: probabilities [B, K], or several arrays
    [B, ...] by name with `probabilities` among them."""

    config: Config
    weights: Path
    classes: list[str] | None  # names by id, where they are known
    reads: str  # what it is shown of each image
    load: Callable[[torch.device], Callable[..., Tensor | Mapping[str, Tensor]]]


class Classified(NamedTuple):
    """A written file, and whether it holds the images' true labels."""

    path: Path
    labelled: bool


def main(argv: Sequence[str]) -> Classified | None:
    """Write the probabilities; returns the file on the main process, None on the others and with --dry_run."""
    return classify_images(open_classifier(argv) if split_flags(argv, ["classifier_path"])[0] else open_head(argv))


def classify_images(network: Network) -> Classified | None:
    """What `main` does with what classifies. Raises UserError."""
    config, weights = network.config, network.weights
    processes = distributed.setup(config.device)
    step = checkpoint_step(weights.parent) if re.fullmatch(r"step_\d+", weights.parent.name) else None
    stem = "classifier" if config.classifier_path else "classified"
    name = f"{stem}.npz" if step is None else f"{stem}_{step:08d}.npz"
    out = Path(config.out) if config.out else samples_folder(weights) / name
    if announce(config, processes, f"weights {weights}", network.reads, f"writing {out}"):
        return None
    if not config.data_dir:
        raise UserError("--data_dir is missing: the images to classify")
    source = open_images(config, network.classes)
    loaded, numbers = load(config, source)
    read = network.load(processes.device)

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        streams = SampleStreams(config.seed, numbers[batch], device=processes.device)
        found = read(from_uint8(loaded.images[batch].to(processes.device)), streams=streams)
        found = {"probabilities": found} if isinstance(found, Tensor) else found
        arrays = {name: x.float().cpu().numpy() for name, x in found.items()}
        return arrays | ({} if loaded.labels is None else {"labels": loaded.labels[batch].numpy()})

    signature = {**config.as_dict(), "weights": str(weights), "images": content_hash(loaded.images.numpy())}
    arrays = run_sharded(
        out, len(loaded.images), config.batch_size, processes, signature, make, fill=config.fill_batches
    )
    if arrays is not None:
        names = network.classes or (source.class_names if loaded.labels is not None else [])
        arrays |= {"classes": np.array(names)} if names else {}
        arrays |= {} if step is None else {"step": np.array(step)}
        save_npz(out, arrays)
        print(f"{out}: {', '.join(f'{key} {array.dtype} {list(array.shape)}' for key, array in arrays.items())}")
        for line in compared(arrays):
            print(line)
    processes.close()
    return Classified(out, loaded.labels is not None) if processes.is_main else None


# ---------------------------------------------------------------- what classifies


def open_head(argv: Sequence[str]) -> Network:
    """The label head of `--model_path`. Raises UserError for a model that has none, or none that can be used."""
    config = with_saved_config(argv, (ClassifyConfig,), __doc__)
    weights = find_weights(config.model_path, config.ema)
    if config.texts:
        return by_texts(config, weights, trained_process(config), lambda device: Generator.load(config, device))
    label = check_head(config, weights)
    diffusion = trained_process(config)
    timesteps = read_timesteps(config.timesteps, diffusion.num_timesteps, diffusion.aggregation)

    def load(device: torch.device) -> Callable[..., Tensor]:
        generator = Generator.load(config, device)
        options = {"timesteps": timesteps, "draws": config.draws}
        return partial(read_head, generator, label, **options)

    return Network(config, weights, read_classes(weights.parent), noisy(timesteps, config.draws), load)


def by_texts(
    config: Config, weights: Path, process: GaussianDiffusion, load_generator: Callable[[torch.device], Generator]
) -> Network:
    """Zero-shot classification by `--texts`. process: the model's. Raises UserError for a model or texts that don't suit."""
    name = zero_shot.encoder_head(config, config.model_path)
    if config.texts == zero_shot.OF_THE_DATA:
        names = list(open_source(config.data_dir).class_names) if config.data_dir else []
        if not names:
            raise UserError(
                f"--texts {config.texts}: --data_dir {config.data_dir} has no classes; write them, as in 'a cat;a dog'"
            )
        texts = zero_shot.texts_of(names, config.template)
    else:
        names, texts = zero_shot.read_texts(config.texts, config.template)
    config[ModelConfig].num_classes = len(names)
    timesteps = read_timesteps(config.timesteps, process.num_timesteps, process.aggregation)

    def load(device: torch.device) -> Callable[..., Mapping[str, Tensor]]:
        classes = zero_shot.encode_texts(config, name, texts, device)
        generator = load_generator(device)

        def read(pixels: Tensor, streams: SampleStreams) -> dict[str, Tensor]:
            found = zero_shot.answer(generator, name, classes, pixels, streams, timesteps=timesteps, draws=config.draws)
            vectors = {name: found.vector, "cosine": found.cosine}
            return {"probabilities": found.head, "encoder_probabilities": found.encoder, **vectors}

        return read

    return Network(config, weights, names, noisy(timesteps, config.draws), load)


def compared(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Where the encoder's own answer stands beside the head's: how far they agree, and how often each is right."""
    if "encoder_probabilities" not in arrays:
        return []
    answers = {"head": arrays["probabilities"].argmax(1), "encoder": arrays["encoder_probabilities"].argmax(1)}
    same = float((answers["head"] == answers["encoder"]).mean())
    lines = [f"head and encoder: the same class for {same:.1%}, cosine {float(arrays['cosine'].mean()):.3f}"]
    if "labels" in arrays:
        right = ", ".join(f"{who} {float((found == arrays['labels']).mean()):.1%}" for who, found in answers.items())
        lines.append(f"right: {right}")
    return lines


def read_head(
    generator: Generator, name: str, pixels: Tensor, timesteps: Sequence[int], draws: int, streams: SampleStreams
) -> Tensor:
    """The probabilities [B, K] by the head of the modality `name`, of images [B, 3, S, S] in [-1, 1]."""
    network, modalities = generator.network_in(0), generator.modalities
    z_0 = generator.space.encode(pixels)
    return head_estimates(network, generator.process, modalities, z_0, timesteps, draws, streams, name)


def check_head(config: Config, weights: Path) -> str:
    """The modality that is the images' class. Raises UserError for a model whose head of it doesn't exist, was not trained, or was
    trained with the label as input."""
    path, other = config.model_path, "or give a classifier by --classifier_path"
    label = next((name for name in task_names(config) if row_of(config, name).needs_labels), "")
    if not label and zero_shot.says_vectors(config):
        raise UserError(
            f"{path}: has no label head, but one that says CLIP's vectors; write the classes by --texts 'a cat;a dog'"
        )
    if not label:
        raise UserError(
            f"{path}: was trained with --mt_task {config.mt_task}, so it has no label head; train with label, {other}"
        )
    if config.mt_variant == "X":
        raise UserError(
            f"{path}: form X is told the label, so it can't classify; train with --mt_variant U or any, {other}"
        )
    if loss_weights(config)[label] == 0 or config.mt_drop_prob == 1:
        flag = "--mt_drop_prob 1" if config.mt_drop_prob == 1 else f"--mt_loss_weight {config.mt_loss_weight}"
        raise UserError(
            f"{path}: was trained with {flag}, so its label head learned nothing; train with another, {other}"
        )
    if read_config(weights) is None:
        state = read_weights(weights)
        refuse_foreign(state, weights, "pixel")
        if not any(key.startswith(f"heads.{label}.") for key in state):
            raise UserError(f"{path}: holds no label head; give a run trained with --mt_task label, {other}")
    return label


def open_classifier(argv: Sequence[str]) -> Network:
    """The classifier of `--classifier_path`, with ADM's flags where it is a foreign file. Raises UserError."""
    flags = parse(argv, (ClassifyConfig, *classifier_sections()), description=__doc__)
    if flags.model_path:
        raise UserError("--model_path and --classifier_path are both given; leave one of them out")
    own = {field.name for field in fields(ClassifyConfig)}
    settings = {name: getattr(flags, name) for name in flags.typed - own}
    weights, found = find_classifier(flags.classifier_path, flags.ema, settings)
    config = Config([flags[ClassifyConfig], *found.sections()], flags.typed)
    noised = (read_config(weights) or {}).get("noised", True)
    if not noised and config.timesteps not in ("", "0"):
        raise UserError(
            f"--timesteps {config.timesteps}: {config.classifier_path} was trained on clean images; leave the flag out"
        )
    diffusion = build_process(found)
    timesteps = read_timesteps(config.timesteps, diffusion.num_timesteps) if noised else [0]

    def load(device: torch.device) -> Callable[..., Tensor]:
        classifier = load_classifier(config.classifier_path, ema=config.ema, settings=settings, device=device).model
        draws = config.draws if noised else 0
        return partial(classifier_probabilities, classifier, diffusion, timesteps=timesteps, draws=draws)

    reads = noisy(timesteps, config.draws) if noised else "clean images, as in its training"
    return Network(config, weights, read_classes(weights.parent), reads, load)


def noisy(timesteps: Sequence[int], draws: int) -> str:
    """The timesteps and draws that were averaged over, in words."""
    return f"timesteps {', '.join(map(str, timesteps))}, {draws} draws each"


# ---------------------------------------------------------------- the images


def open_images(config: Config, classes: Sequence[str] | None) -> ImageSource:
    """The images, with class ids as the network's. Raises UserError for classes that it doesn't have."""
    try:
        source = open_source(config.data_dir, class_names=classes if config.labelled else None)
    except UnknownClassError as error:
        raise UserError(f"{error}; --labelled False classifies without comparing") from None
    if not config.labelled:
        source.labels = None
    if source.labels is not None and source.labels.min() < 0:
        raise UserError(
            f"{config.data_dir}: some of the images have no class; --labelled False classifies without comparing"
        )
    if source.labels is not None and source.labels.max() >= config.num_classes:
        raise UserError(
            f"{config.data_dir}: has {source.labels.max() + 1} classes, the network {config.num_classes}; "
            "--labelled False classifies without comparing"
        )
    return source


def load(config: Config, source: ImageSource) -> tuple[LoadedImages, Tensor]:
    """The chosen images, and their numbers in the source [N], which their noise belongs to."""
    chosen = spread(source, config.num_samples if config.num_samples > 0 else len(source))
    loaded = load_images(chosen, config.image_size)
    return loaded, torch.from_numpy(chosen.numbers)[loaded.indices]
