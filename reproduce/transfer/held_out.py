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
PLAIN, FRAMED = "image", "image in the frame"
RESTORED = 100  # images with half of them hidden


@torch.no_grad()
def losses(generator: Generator, loaded: LoadedImages) -> dict[str, float]:
    """{what: mean, what_q0: ... what_q3}: `image` is the denoising loss without any frame and with nothing given, where the model
    was trained on that, the one quantity that all models share; `image in the frame`, and each modality's own loss as its head
    has it, with all modalities in the frame and none given.

    Every image is seen at the same timesteps with the same noise by every model.
    """
    modalities, process, model = generator.modalities, generator.process, generator.network
    total = process.num_timesteps
    timesteps = [int((k + 0.5) * total / (QUARTILES * EACH)) for k in range(QUARTILES * EACH)]
    drops = generator.config.mt_drop_prob > 0
    sums: dict[str, Tensor] = {}
    for number, step in enumerate(timesteps):
        for part, images in _batches(generator, loaded):
            streams = SampleStreams(part + number * SPREAD, index=Stream.INPUT, device=generator.device)
            t = torch.full((len(part),), step, device=generator.device)
            noise = streams.normal(*images.x_start.shape[1:])

            def measure(
                drop: float,
                images: Images = images,
                t: Tensor = t,
                noise: Tensor = noise,
                streams: SampleStreams = streams,
            ) -> dict[str, Tensor]:
                variant = generator.model.variant
                found = multi_task_losses(
                    model,
                    process,
                    modalities,
                    images,
                    t,
                    noise,
                    streams,
                    variant=variant,
                    drop_prob=drop,
                    given_prob=0.0,
                )
                heads = {name: found.terms[name] for name in modalities}
                return {"denoising": found.terms["mse"], **heads, **found.figures}

            values: dict[str, Tensor] = {}
            if not modalities or drops:
                values[PLAIN] = measure(1.0 if modalities else 0.0)["denoising"]
            if modalities:
                framed = measure(0.0)
                values |= {FRAMED: framed.pop("denoising"), **framed}
            for name, each in values.items():
                sums.setdefault(name, torch.zeros(len(timesteps), device=each.device))[number] += each.sum()
    found: dict[str, float] = {}
    for name, by_timestep in sums.items():
        quartiles = (by_timestep / len(loaded.images)).view(QUARTILES, EACH).mean(dim=1).tolist()
        found[name] = sum(quartiles) / QUARTILES
        found |= {f"{name}_q{q}": value for q, value in enumerate(quartiles)}
    return found


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
