"""What a trained model gets on held-out images: its losses, which no sampling blurs, and what its heads find."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from guided_mt.data.dataset import LoadedImages
from guided_mt.diffusion.random import SampleStreams, Stream
from guided_mt.generation.batches import take_images
from guided_mt.generation.classification import head_estimates, read_timesteps
from guided_mt.generation.generate import Generator
from guided_mt.generation.masks import make_mask
from guided_mt.generation.restoration import restore
from guided_mt.modalities import Images
from guided_mt.runs.config import SampleConfig
from guided_mt.training.objective import multi_task_losses

QUARTILES, EACH = 4, 2  # timesteps in each quartile, at which every held-out image is seen
BATCH = 64
SPREAD = 1 << 32  # between the seeds of an image at two timesteps
PLAIN, FRAMED, DENOISING = "image", "image in the frame", "denoising"
RESTORED = 100  # images with half of them hidden


@torch.no_grad()
def losses(generator: Generator, loaded: LoadedImages) -> dict[str, float]:
    """{what: mean, what_q0: ... what_q3}: `image` is the denoising loss without any frame and with nothing given, where the model
    was trained on that, the one quantity that all models share; `image in the frame`, and each modality's own loss as its head
    has it, with all modalities in the frame and none given.

    Every image is seen at the same timesteps with the same noise by every model.
    """
    total, config, modalities = generator.process.num_timesteps, generator.config, generator.modalities
    timesteps = [int((k + 0.5) * total / (QUARTILES * EACH)) for k in range(QUARTILES * EACH)]
    sums: dict[str, Tensor] = {}  # [2, timesteps]: of the values, and how many they are
    for number, step in enumerate(timesteps):
        for part, images in _batches(generator, loaded):
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            if modalities:
                framed = _terms(generator, part + number * SPREAD, images, step, dropped=False)
                seen |= {FRAMED: framed.pop(DENOISING), **framed}
            if not modalities or config.mt_drop_prob > 0:
                plain = _terms(generator, part + number * SPREAD, images, step, dropped=bool(modalities))
                seen[PLAIN] = plain[DENOISING]
            for name, (values, counts) in seen.items():
                totals = sums.setdefault(name, torch.zeros(2, len(timesteps), device=values.device))
                totals[:, number] += torch.stack([(values * counts).sum(), counts.sum()])
    found: dict[str, float] = {}
    for name, (values, counts) in sums.items():
        quartiles = (values / counts).view(QUARTILES, EACH).mean(dim=1).tolist()
        found[name] = sum(quartiles) / QUARTILES
        found |= {f"{name}_q{q}": value for q, value in enumerate(quartiles)}
    return found


def _terms(
    generator: Generator, seeds: Tensor, images: Images, step: int, *, dropped: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """{term: (values [B], 1 where a sample has it, else 0)} at a timestep, with everything in the frame and nothing given, or
    `dropped`: without a frame. The noise is each sample's first draw, so that it is the same in all models."""
    streams = SampleStreams(seeds, index=Stream.INPUT, device=generator.device)
    noise = streams.normal(*images.x_start.shape[1:])
    found = multi_task_losses(
        generator.network,
        generator.process,
        generator.modalities,
        images,
        torch.full((len(seeds),), step, device=generator.device),
        noise,
        streams,
        variant=generator.model.variant,
        drop_prob=float(dropped),
        given_prob=0.0,
    )
    heads = {name: found.terms[name] for name in generator.modalities} | found.figures
    denoising = found.terms["mse"]
    return {DENOISING: (denoising, torch.ones_like(denoising))} | {
        name: (values, found.predicted[name]) for name, values in heads.items()
    }


@torch.no_grad()
def abilities(generator: Generator, loaded: LoadedImages) -> dict[str, float]:
    """{what: how well}: `label accuracy` of the head of labels, `restoration error` in hidden halves."""
    found: dict[str, float] = {}
    process = generator.process
    for name, modality in generator.modalities.items():
        if modality.is_class and loaded.labels is not None:
            timesteps = read_timesteps("", process.num_timesteps, process.aggregation)
            right = 0
            for part, images in _batches(generator, loaded):
                streams = SampleStreams(part, index=Stream.INPUT, device=generator.device)
                said = head_estimates(
                    generator.model, process, generator.modalities, images.x_start, timesteps, 1, streams, name
                )
                right += int((said.argmax(dim=1) == images.labels).sum())
            found["label accuracy"] = right / len(loaded.images)
        if modality.is_mask:
            errors = []
            for part, images in _batches(generator, loaded, RESTORED):
                x = images.x_start
                streams = SampleStreams(part, index=Stream.INPUT, device=generator.device)
                keep = make_mask("half", generator.config.image_size, generator.mask_patch, streams)
                made = restore("mt", generator, SampleConfig(steps=20, sampler="dpm++"), x * keep, keep, part.tolist())
                errors.append(
                    ((made - x) ** 2 * (1 - keep)).flatten(1).sum(1) / ((1 - keep).flatten(1).sum(1) * x.shape[1])
                )
            found["restoration error"] = float(torch.cat(errors).mean())
    return found


def _batches(generator: Generator, loaded: LoadedImages, most: int | None = None) -> Iterator[tuple[Tensor, Images]]:
    """(numbers [B], images) of the held-out images, or of the first `most`."""
    count = len(loaded.images) if most is None else min(most, len(loaded.images))
    for start in range(0, count, BATCH):
        rows = slice(start, min(start + BATCH, count))
        part = torch.arange(rows.start, rows.stop)
        yield part, take_images(loaded, rows, generator.modalities, generator.device)
