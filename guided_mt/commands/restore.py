"""Fill in the masked part of images by a trained model, or by the methods it is compared with in the paper's Table 1.

    mt-diffusion restore --model_path runs/first --data_dir builtin:digits-test --mask patches:10
    mt-diffusion restore --model_path runs/first --data_dir photos --mask image holes.png

Writes an .npz of the originals, the masks and the restored images, and a picture of the first ones beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import load_images, open_source
from ..data.images import from_uint8, make_grid, save_png, to_nhwc
from ..diffusion.random import SampleStreams, Stream
from ..errors import UserError
from ..generation.generate import Generator, output_path, parse_seeds
from ..generation.masks import make_mask
from ..generation.restoration import METHODS, restore
from ..generation.sharded import content_hash, run_sharded
from ..runs import distributed
from ..runs.checkpoint import find_weights
from ..runs.config import Config, SampleConfig, option
from ..runs.distributed import Processes
from .console import announce, run, with_saved_config

SHOWN = 10


@dataclass
class RestoreConfig:
    """What to restore, and how"""

    data_dir: str = option("", "images to mask and restore: folder, .tar or .zip, .npz, or builtin:digits-test")
    num_samples: int = option(100, "how many images, from the first", least=1)
    mask: str = option("patches:10", "patches:M, half, full, or image FILE (white is masked)")
    method: str = option(
        "mt",
        "mt: MT-Diffusion; the others are Table 1's (repaint always takes its published 250 ancestral steps)",
        METHODS,
    )
    strength: float = option(0.5, "sdedit: how far to noise the masked image, 0 to 1")
    repaint_resamples: int = option(10, "repaint: passes over every stretch of ten steps", least=1)
    exact_known: bool = option(False, "paste the unmasked pixels back; off, since the model is to keep them by itself")


SECTIONS = (SampleConfig, RestoreConfig)


def main(argv: Sequence[str]) -> None:
    config = with_saved_config(join_mask(argv), SECTIONS, __doc__)
    processes = distributed.setup(config.device)
    if not announce(config, processes, f"writing {restored_path(config)}"):
        restore_images(config, processes, Generator.load)


def restored_path(config: Config) -> Path:
    """The .npz to write."""
    mask = config.mask.replace(":", "").split("/")[-1].replace(" ", "_")
    return output_path(config, f"restored_{config.method}_{mask}.npz")


def restore_images(config: Config, processes: Processes, load: Callable[[Config, torch.device], Generator]) -> None:
    """Restore the images of `config.data_dir` by the model that `load` makes, and write them. Raises UserError."""
    out = restored_path(config)
    if not config.data_dir:
        raise UserError("--data_dir is missing: the images to restore")
    if not 0 < config.strength <= 1:
        raise UserError(f"--strength must be above 0 and at most 1, not {config.strength}")
    generator = load(config, processes.device)
    classes = generator.classes if generator.config.class_cond else None  # of other models, no label is read
    source = open_source(config.data_dir, class_names=classes)
    loaded = load_images(source, generator.config.image_size, config.num_samples)
    count = len(loaded.images)
    if generator.config.class_cond and loaded.labels is None:
        raise UserError(f"{config.data_dir}: has no classes, which this class-conditional model needs")
    seeds = parse_seeds(config.seeds, count)
    patch = generator.mask_patch

    def make(batch: list[int]) -> dict[str, np.ndarray]:
        own = torch.tensor([seeds[i] for i in batch])
        pixels = loaded.images[batch]
        x_start = from_uint8(pixels.to(processes.device))
        labels = (
            loaded.labels[batch].to(processes.device)
            if generator.config.class_cond and loaded.labels is not None
            else None
        )
        # The mask's numbers are a stream of their own (Stream.INPUT): the same masks for every method and sampler.
        streams = SampleStreams(own, index=Stream.INPUT, device=processes.device)
        keep = make_mask(config.mask, generator.config.image_size, patch, streams)
        masked = x_start * keep
        restored = restore(
            config.method,
            generator,
            config[SampleConfig],
            masked,
            keep,
            own.tolist(),
            labels,
            strength=config.strength,
            repaint_resamples=config.repaint_resamples,
        )
        # The given pixels are written as they were read: a way through floats would be off by one here and there.
        original, kept = pixels.permute(0, 2, 3, 1).numpy(), keep.permute(0, 2, 3, 1).cpu().numpy() > 0
        result = to_nhwc(restored)
        if config.exact_known:
            result = np.where(kept, original, result)
        grey = np.where(kept, original, np.uint8(127))
        hidden = np.where(kept[..., 0], 0, 255).astype(np.uint8)
        return {"arr_0": result, "original": original, "masked": grey, "restored": result, "mask": hidden}

    signature = {**config.as_dict(), "weights": str(find_weights(config.model_path, config.ema))}
    signature |= {"images": content_hash(loaded.images.numpy())}
    arrays = run_sharded(out, count, config.batch_size, processes, signature, make, fill=config.fill_batches)
    if arrays is not None:
        save_png(triples(arrays), out.with_suffix(".png"))
        report(arrays, config.exact_known)
        print(f"{out}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")
        print(f"{out.with_suffix('.png')}: original, masked and restored, row by row")
    processes.close()


def join_mask(argv: Sequence[str]) -> list[str]:
    """'--mask image FILE' is three words for one value."""
    argv = list(argv)
    for i in range(len(argv) - 2):
        if argv[i] == "--mask" and argv[i + 1] == "image" and not argv[i + 2].startswith("--"):
            argv[i + 1 : i + 3] = [f"image {argv[i + 2]}"]
            break
    return argv


def triples(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A picture of three rows: original, masked, restored."""
    rows = [arrays[name][: 2 * SHOWN] for name in ("original", "masked", "restored")]
    blocks = [np.concatenate([row[i : i + SHOWN] for row in rows]) for i in range(0, len(rows[0]), SHOWN)]
    return np.concatenate(
        [make_grid(block, columns=len(block) // 3) for block in blocks if len(block) == len(blocks[0])]
    )


def region_errors(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Errors on the scale [-1, 1] over all images: mean squared in the masked region, mean absolute outside."""
    mask = arrays["mask"][..., None] > 127
    original, restored, masked = (arrays[n].astype(np.float64) / 127.5 - 1 for n in ("original", "restored", "masked"))
    inside = np.broadcast_to(mask, original.shape)
    errors = {}
    if inside.any():
        errors["masked_mse"] = float(((restored - original) ** 2)[inside].mean())
        errors["masked_mse_unrestored"] = float(((masked - original) ** 2)[inside].mean())
    if not inside.all():
        errors["unmasked_mae"] = float(np.abs(restored - original)[~inside].mean())
    return errors


def report(arrays: dict[str, np.ndarray], exact_known: bool) -> None:
    errors = region_errors(arrays)
    if "masked_mse" in errors:
        print(
            f"masked region: mean squared error {errors['masked_mse']:.4f} (left masked: {errors['masked_mse_unrestored']:.4f})"
        )
    if "unmasked_mae" in errors:
        how = (
            "pasted back by --exact_known"
            if exact_known
            else "kept by the model itself; --exact_known True pastes them back"
        )
        print(f"unmasked region: mean absolute error {errors['unmasked_mae']:.4f} of a range of 2 ({how})")


def console() -> None:
    run(main)
