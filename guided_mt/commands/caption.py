"""Write captions of images by the caption head of a model trained with --mt_task caption (form U or any).

    mt-diffusion caption --model_path runs/emoji --data_dir emoji-64.tar/test
    mt-diffusion caption --model_path runs/emoji --data_dir emoji-64.tar/test --how drawn

Where the images have captions, prints and writes how many tokens and texts are right, and whether an image and its caption find
each other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data import load_images
from ..data.dataset import captions_of
from ..data.images import from_uint8, save_npz
from ..data.open import open_source
from ..data.subset import Subset, spread
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..generation.build import trained_process
from ..generation.captioning import drawn_captions, log_probs_of
from ..generation.classification import head_estimates, read_timesteps
from ..generation.generate import Generator, output_path
from ..generation.sharded import content_hash, run_sharded
from ..modalities import CaptionModality
from ..modalities.captions import scores
from ..modalities.settings import loss_weights, row_config, row_of, task_names
from ..runs import distributed
from ..runs.config import Config, option, redefined
from .classify import ClassifyConfig
from .console import announce, run, with_saved_config

WAYS = ("read", "drawn")
DRAWN_STEPS, DRAWN_FROM = 10, 0.4  # timesteps that captions are drawn at, and the largest of them, of T


@dataclass
class CaptionImagesConfig:
    """What to caption, and how"""

    model_path: str = option("", "run folder, checkpoint folder or weights file of a model with a caption head")
    ema: str = option("", "which averaged weights to use, '0.9999' or 'none'; empty: the slowest")
    data_dir: str = option("", "images to caption: folder, .tar or .zip, .npz, or builtin:digits-test")
    num_samples: int = option(-1, "how many images, spread evenly over the data; -1: all", least=1)
    name: str = option("", "the modality to write, of a model with several captions; empty: the first")
    how: str = option(
        "read",
        "read: the likeliest token of each position by itself; drawn: tokens committed a few at a time and shown to the network",
        WAYS,
    )
    temperature: float = option(0.0, "of tokens that are drawn: 1 as the head says, 0 the likeliest", least=0)
    timesteps: str = option(
        "",
        "noise levels, as in 0,20,40; empty: to read 0, 4, 8 and 12 % of them, or less where the frame is larger sooner, and to "
        "draw ten up to 40 %",
    )
    draws: int = option(4, "noise draws at each timestep, to read", least=1)
    seed: int = redefined(ClassifyConfig, "seed")
    out: str = option(
        "", "the .npz to write, with a .csv and a .json beside it; empty: captions.npz in the run's folder"
    )
    batch_size: int = redefined(ClassifyConfig, "batch_size")
    fill_batches: bool = redefined(ClassifyConfig, "fill_batches")
    device: str = redefined(ClassifyConfig, "device")
    dry_run: bool = redefined(ClassifyConfig, "dry_run")


def main(argv: Sequence[str]) -> None:
    """Write captions and their scores as `argv` says. Raises UserError."""
    config = with_saved_config(argv, (CaptionImagesConfig,), __doc__)
    processes = distributed.setup(config.device)
    out = output_path(config, "captions.npz")
    name, process = caption_name(config), trained_process(config)
    timesteps = chosen_timesteps(config, process.num_timesteps, process.aggregation)
    if announce(config, processes, f"timesteps {', '.join(map(str, timesteps))}", f"writing {out}"):
        return
    if not config.data_dir:
        raise UserError("--data_dir is missing: the images to caption")
    source = open_captioned(config, name)
    loaded = load_images(source, config.image_size)
    numbers = torch.from_numpy(source.numbers)[loaded.indices]  # which the noise belongs to
    generator = Generator.load(config, processes.device)
    caption = generator.modalities[name]
    assert isinstance(caption, CaptionModality)

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        streams = SampleStreams(config.seed, numbers[batch], device=processes.device)
        z_0 = generator.space.encode(from_uint8(loaded.images[batch].to(processes.device)))
        network, modalities = generator.network_in(0), generator.modalities
        said = head_estimates(network, generator.process, modalities, z_0, reading, config.draws, streams, name)
        best, _ = caption.head.best(said)
        arrays = {"said": said.cpu().numpy(), "best": best.cpu().numpy(), "ids": best.cpu().numpy()}
        if config.how == "drawn":
            options = {"streams": streams, "name": name, "temperature": config.temperature}
            ids = drawn_captions(network, generator.process, modalities, z_0, reading, timesteps, **options)
            arrays["ids"] = ids.cpu().numpy()
        return arrays

    # Scores of single tokens are of what is read, however the captions are made.
    reading = timesteps if config.how == "read" else read_timesteps("", process.num_timesteps, process.aggregation)
    signature = {**config.as_dict(), "weights": config.model_path, "images": content_hash(loaded.images.numpy())}
    arrays = run_sharded(
        out, len(loaded.images), config.batch_size, processes, signature, make, fill=config.fill_batches
    )
    if arrays is not None:
        found = caption.texts(torch.from_numpy(arrays["ids"]))
        texts = captions_of(source, loaded.indices.numpy())
        save_npz(out, {**arrays, "caption": np.array(found)})
        columns = {"file": loaded.names, "caption": found} | ({} if texts is None else {"true": texts})
        with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        print(f"{out}, {out.with_suffix('.csv')}: {len(found)} captions")
        if texts is not None:
            figures = scored(caption, arrays, found, texts, processes.device)
            out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            for key, value in figures.items():
                print(f"{key:32s} {value:.4g}")
    processes.close()


def caption_name(config: Config) -> str:
    """The caption modality to write. Raises UserError for a model without one, and one whose head can't be read."""
    path, names = config.model_path, [n for n in task_names(config) if row_of(config, n).captions is not None]
    if not names or config.name not in ("", *names):
        raise UserError(
            f"{path}: was trained with --mt_task {config.mt_task}, so it has no caption{f' {config.name}' if config.name else ''}; "
            f"{f'it has {names[0]}' if names else 'train with caption'}"
        )
    name = config.name or names[0]
    if config.mt_variant == "X":
        raise UserError(f"{path}: form X is told the caption, so it can't write one; train with --mt_variant U or any")
    if loss_weights(config)[name] == 0 or config.mt_drop_prob == 1:
        raise UserError(f"{path}: its caption head learned nothing (--mt_loss_weight 0 or --mt_drop_prob 1)")
    return name


def chosen_timesteps(config: Config, count: int, aggregation: object) -> list[int]:
    """Those of `--timesteps`, or what suits `--how`."""
    if config.how == "drawn" and not config.timesteps.strip():
        return sorted({int(DRAWN_FROM * count * k / DRAWN_STEPS) for k in range(DRAWN_STEPS)}, reverse=True)
    return read_timesteps(config.timesteps, count, aggregation)  # type: ignore[arg-type]


def open_captioned(config: Config, name: str) -> Subset:
    """The images, with their captions where they have some. Raises UserError where captions that were asked for are not there."""
    source = open_source(config.data_dir)
    captions = row_of(config, name).captions
    assert captions is not None
    asked = {"caption_file", "caption_template"} & config.typed
    try:
        source.captions = captions(row_config(config, name), source)
    except UserError as error:
        if asked:
            raise
        print(f"# no scores: {error}")
    return spread(source, config.num_samples if config.num_samples > 0 else len(source))


def scored(
    caption: CaptionModality,
    arrays: dict[str, np.ndarray],
    found: Sequence[str],
    texts: Sequence[str],
    device: torch.device,
) -> dict[str, float]:
    """{what: how much}, of the images that have a caption. Raises UserError where none has."""
    ids = caption.load_texts(texts)
    assert ids is not None
    kept = ids[:, 0] >= 0
    if not kept.any():
        raise UserError("none of the images has a caption with a word in it")
    ids, rows = ids[kept], kept.numpy()
    own = caption.own_tokens(ids).bool().numpy()
    true = caption.texts(ids)  # as this vocabulary says them
    figures = {
        "images": float(len(ids)),
        "token accuracy": scores.token_accuracy(ids.numpy(), arrays["best"][rows], own),
        "exact match": scores.exact_match(true, [text for text, keep in zip(found, rows, strict=True) if keep]),
    }
    said = torch.from_numpy(arrays["said"][rows]).to(device)
    log_p = log_probs_of(caption, said, ids.to(device)).cpu().numpy()
    figures["nats per caption"] = float(-np.diagonal(log_p).mean())
    ranked = scores.retrieval(log_p, true)
    figures["different captions"] = float(ranked.different)
    for what, ranks in (("caption of image", ranked.caption_of_image), ("image of caption", ranked.image_of_caption)):
        figures[f"{what}: median rank"] = float(np.median(ranks))
        for nearest in scores.NEAREST:
            figures[f"{what}: among {nearest}"] = scores.recall(ranks, nearest)
    return figures


def console() -> None:
    """The script's door."""
    run(main)
