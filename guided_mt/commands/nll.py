"""Bits per dimension of images under a trained model, and the four terms of Theorem 1 one by one.

    mt-diffusion nll --model_path runs/first --data_dir builtin:digits-test --num_samples 100

The flags are those of guided-diffusion's image_nll.py and ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import load_images
from ..data.images import save_npz
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..generation.batches import take_images
from ..generation.build import check_labels, open_images, trained_process
from ..generation.drawing import refuse_not_finite
from ..generation.generate import Generator, adm_path
from ..generation.masks import make_mask
from ..modalities import Images
from ..runs import distributed
from ..runs.config import Config, SampleConfig, option
from .console import announce, run, with_saved_config


@dataclass
class NllConfig:
    """What to evaluate"""

    data_dir: str = option("", "images: folder, .tar or .zip, .npz, or builtin:digits-test")
    num_samples: int = option(1000, "how many images, from the first", least=1)
    mask: str = option(
        "", "masked images to give or to put into the frame (patches:M, half, full); empty: as in training"
    )


SECTIONS = (SampleConfig, NllConfig)
ADM_TERMS = ("vb", "mse", "xstart_mse")  # of which ADM writes NAME_terms.npz


def main(argv: Sequence[str]) -> None:
    config = with_saved_config(argv, SECTIONS, __doc__)
    processes = distributed.setup(config.device)
    out = adm_path(config, "nll.npz")
    if announce(config, processes, f"writing {out}"):
        return
    if not config.data_dir:
        raise UserError("--data_dir is missing: the images to evaluate")
    generator = Generator.load(config, processes.device)
    source = open_images(config, generator.known_classes)
    check_labels(config, source)
    for modality in generator.modalities.values():
        modality.prepare(source)
    loaded = load_images(source, config.image_size, config.num_samples)
    diffusion = trained_process(config, config.timestep_respacing)
    count = len(loaded.images)
    starts = range(0, count, config.batch_size)[processes.rank :: processes.world_size]
    columns: dict[str, list[torch.Tensor]] = {}
    by_timestep = torch.zeros(len(ADM_TERMS), diffusion.num_timesteps, dtype=torch.float64)
    for start in tqdm(starts, unit="batch", disable=not processes.is_main):
        part = slice(start, min(start + config.batch_size, count))
        images = take_images(loaded, part, generator.modalities, processes.device, source.side_names)
        streams = SampleStreams(0, torch.arange(part.start, part.stop), device=processes.device)
        values_of, terms = bound_terms(config, generator, diffusion, images, streams)
        refuse_not_finite("the terms of the bound", values_of["total_bpd"])
        for name, values in values_of.items():
            columns.setdefault(name, []).append(values.float())
        by_timestep += torch.stack([terms[name].double().sum(dim=0) for name in ADM_TERMS]).cpu()
    names = sorted(columns) if columns else []
    table = torch.stack([torch.cat(columns[name]) for name in names], dim=1) if names else torch.zeros(0, 1)
    rows = gather_rows(processes, table, count, config.batch_size)
    sums = processes.all_gather(by_timestep.flatten().to(processes.device)).view(-1, *by_timestep.shape).sum(dim=0)
    if processes.is_main:
        save_npz(out, {name: rows[:, i].numpy() for i, name in enumerate(names)})
        for i, name in enumerate(names):
            values = rows[:, i].double()
            values = values[~values.isnan()]  # of an image that lacks the modality
            error = float(values.std() / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            print(f"{name:24s} {values.mean():10.4f} +- {error:.4f}")
        print(f"{out}: one value per image, {count} images, {diffusion.num_timesteps} timesteps")
        for name, terms_file, means in zip(ADM_TERMS, term_files(config, out), sums.cpu().numpy() / count, strict=True):
            save_npz(terms_file, {"arr_0": means.astype(np.float32)})
            print(f"{terms_file}: {name} by timestep, mean over the images, the largest timestep first")
    processes.close()


def term_files(config: Config, out: Path) -> list[Path]:
    """Where the means by timestep go: ADM's names, after that of --out where it is given, so that two runs keep apart."""
    before = f"{out.stem}_" if config.out else ""
    return [out.with_name(f"{before}{name}_terms.npz") for name in ADM_TERMS]


def bound_terms(
    config: Config, generator: Generator, diffusion: GaussianDiffusion, images: Images, streams: SampleStreams
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(Theorem 1 per image [B], what `calc_bpd_loop` returns).

    Per image: L0_prior, L1_denoising, L3_decoder and their sum in bits per dimension; L2 per modality, the mean over timesteps of
    KL_i in the unit of its loss (mean squared error or nats), NaN for an image that lacks it.
    """
    modalities, gives, x_start = generator.modalities, generator.gives, images.x_start
    data = {}
    for name, modality in modalities.items():
        if config.mask and modality.is_mask:
            keep = make_mask(config.mask, config.image_size, generator.mask_patch, streams)
            data[name] = modality.enter(images.pixels * keep)
        else:
            data[name] = modality.from_batch(images, streams)
    found = {name: modality.present(images) for name, modality in modalities.items()}
    present = {name: mask for name, mask in found.items() if mask is not None}
    kl = {name: torch.zeros(len(x_start), device=x_start.device) for name in modalities}

    def on_predictions(predictions: Mapping[str, torch.Tensor], t: torch.Tensor) -> None:
        for name, modality in modalities.items():
            kl[name] += modality.loss(predictions[name], data[name]) / diffusion.num_timesteps

    def encoded(name: str) -> torch.Tensor:
        encoding = modalities[name].encode(data[name])
        return encoding * present[name].view(-1, 1, 1, 1) if name in present else encoding

    terms = diffusion.calc_bpd_loop(
        generator.network_in(0, images.labels if config.class_cond else None),
        x_start,
        config.clip_denoised,
        {"modalities": data if gives else {}, **({"absent": {n: ~x for n, x in present.items()}} if present else {})},
        encodings={} if gives else {name: encoded(name) for name in modalities},
        noise_fn=lambda step: streams.normal(*x_start.shape[1:]),
        on_predictions=on_predictions,
    )
    kl |= {name: torch.where(mask, kl[name], torch.nan) for name, mask in present.items()}
    vb = terms["vb"]
    result = {"total_bpd": terms["total_bpd"], "L0_prior_bpd": terms["prior_bpd"], "L3_decoder_bpd": vb[:, -1]}
    result |= {"L1_denoising_bpd": vb[:, :-1].sum(dim=1)} | {f"L2_{name}": values for name, values in kl.items()}
    return result, terms


def gather_rows(processes: distributed.Processes, table: torch.Tensor, count: int, batch_size: int) -> torch.Tensor:
    """The processes' rows [n_r, K] back in the order of the images: [count, K] on every process."""
    if processes.world_size == 1:
        return table.cpu()
    batches = math.ceil(count / batch_size)
    most = math.ceil(batches / processes.world_size) * batch_size
    columns = int(processes.all_gather(torch.tensor([table.shape[1]], device=processes.device)).max())
    padded = torch.zeros(most, columns, device=processes.device)
    padded[: len(table), : table.shape[1]] = table
    gathered = processes.all_gather(padded).view(processes.world_size, most, columns).cpu()
    rows = []
    for number in range(batches):
        first = number // processes.world_size * batch_size
        rows.append(
            gathered[number % processes.world_size, first : first + min(batch_size, count - number * batch_size)]
        )
    return torch.cat(rows)


def console() -> None:
    run(main)
