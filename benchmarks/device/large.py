"""The stage `large`: Stable Diffusion 2 with CLIP at full size, random weights: training steps, and images from text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from guided_mt.data import Batch
from guided_mt.diffusion.random import SampleStreams
from guided_mt.modalities import Images
from guided_mt.runs.config import SampleConfig
from guided_mt.training.ema import Ema
from guided_mt.training.optim import guard_step
from guided_mt.training.units import measure_units
from latent_mt.model.conditions import text_condition
from latent_mt.model.generate import LatentGenerator
from latent_mt.model.latent_diffusion import LatentMTDiffusion

from .fast import synchronize
from .right.arithmetic import PRECISIONS_OF_FLAGS, distance, no_tf32
from .runner import Stage, within

GIB = 2**30
STEPS = 3
# (size of the latents, whether blocks are recomputed, images): two batches each, of which the smaller is half
CASES = ((64, True, 64), (64, False, 32), (96, True, 32))
CALLS, IMAGES = 20, 8
CAPTION, NEGATIVE = "a photo of a cat", "blurry"


def run(stage: Stage) -> None:
    for size, recomputed, batch in ((8, True, 2),) if stage.tiny else CASES:
        how = "recomputed" if recomputed else "all kept"
        name = f"SD 2 with CLIP: training step, latents {size} x {size}, {how}, bf16"
        stage.measure(name, lambda s=size, r=recomputed, b=batch: training(stage, s, r, b), 15.0)
    stage.check("SD 2: images from text in bf16 and fp16, as in float32", lambda: drawing(stage), 20.0)


def make(stage: Stage, size: int, recomputed: bool) -> LatentMTDiffusion:
    """The model of stable_diffusion_2_clip.yaml without weights from anywhere, on the device."""
    import memory  # the script beside this folder

    changes: dict[str, Any] = {
        "model.params.image_size": size,
        "model.params.unet_config.params.use_checkpoint": recomputed,
        "model.params.cond_stage_config.params.version": "null",
        "model.params.mt_tasks.representation.clip_weights": "untrained",
    }
    small: Mapping[str, Any] = {}
    if stage.tiny:
        small = {**memory.SMALL, "model.params.unet_config.params.model_channels": 64}
    torch.manual_seed(0)
    with stage.device:
        model = memory.built({**changes, **small}, memory.ARCH if stage.tiny else None)
        with torch.no_grad():
            for parameter in model.network.parameters():  # zeros, as new networks have in places, would hide errors
                if parameter.ndim > 1:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    model.network.precision = "bf16"
    return model.to_fast_layout()


def training(stage: Stage, size: int, recomputed: bool, batch: int) -> dict[str, Any]:
    """ms and GiB of a step on images and captions, of two sizes of the batch: what a batch takes, and what each image adds."""
    model, cuda = make(stage, size, recomputed), stage.device.type == "cuda"
    model.network.train()
    pixels = size * model.first_stage_model.downsampling
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (batch, 3, pixels, pixels), dtype=np.uint8)).to(stage.device)
    shown = Images(torch.zeros(8, 4, size, size, device=stage.device), image=images[:8] / 127.5 - 1)
    measure_units(model.modalities, [shown])
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    averages = Ema(model.network, ["0.9999"])
    found: dict[str, Any] = {}

    def step(count: int, number: int) -> None:
        positions = torch.arange(count, device=stage.device) + number * count
        part = Batch(images[:count], None, positions, positions, captions=[CAPTION] * count)
        losses, _ = model.losses(part, SampleStreams(0, positions, device=stage.device))
        losses.loss.mean().backward()
        guard_step(optimizer, [p.grad for p in model.network.parameters() if p.grad is not None], 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages.update(None, number)

    peaks = []
    for count in (batch // 2, batch):
        step(count, 0)
        synchronize(stage.device)
        if cuda:
            found.setdefault("GiB at rest", torch.cuda.memory_allocated(stage.device) / GIB)
            torch.cuda.reset_peak_memory_stats(stage.device)
        seconds = []
        for number in range(1, 2 if stage.tiny else 1 + STEPS):
            start = time.perf_counter()
            step(count, number)
            synchronize(stage.device)
            seconds.append(time.perf_counter() - start)
        found[f"ms, batch {count}"] = 1000 * statistics.median(seconds)
        if cuda:
            peaks.append(torch.cuda.max_memory_allocated(stage.device) / GIB)
            found[f"GiB, batch {count}"] = peaks[-1]
    found["images/s"] = batch / statistics.median(seconds)
    if cuda:
        each = (peaks[1] - peaks[0]) / (batch - batch // 2)
        found |= {"GiB each image": each, "GiB every batch": peaks[1] - each * batch - found["GiB at rest"]}
    return found


@torch.no_grad()
def drawing(stage: Stage) -> dict[str, Any]:
    """Images per second from text with guidance, and how far the latents of half precision are from float32's after all calls.

    Raises Wrong where that is more than a network's own rounding, `right.arithmetic`, with guidance's factor.
    """
    size, images = (8, 2) if stage.tiny else (64, IMAGES)
    model = make(stage, size, False).eval()
    options = SampleConfig(steps=2 if stage.tiny else CALLS, sampler="dpm++", guidance_scale=7.5)
    generator = LatentGenerator(model, text_condition(model, [CAPTION] * images, NEGATIVE, True))
    found: dict[str, Any] = {}
    drawn: dict[str, torch.Tensor] = {}
    worst = 0.0
    flags = ("fp32", "bf16") if stage.tiny else ("fp32", "bf16", "fp16")
    for flag in flags:
        model.network.precision = flag
        with no_tf32():
            generator.draw(range(images), SampleConfig(steps=1, sampler="dpm++", guidance_scale=7.5), {})
            synchronize(stage.device)
            start = time.perf_counter()
            drawn[flag] = generator.draw(range(images), options, {}).x_start
            synchronize(stage.device)
        found[f"{flag}: latents/s"] = images / (time.perf_counter() - start)
        if flag != "fp32":
            error = distance(drawn[flag], drawn["fp32"])
            tolerance = PRECISIONS_OF_FLAGS[flag].tolerance(model.network) * (2 * options.guidance_scale - 1)
            found[f"{flag}: error"] = error
            worst = max(worst, error / tolerance)
    start = time.perf_counter()
    model.decode(drawn[flags[-1]])
    synchronize(stage.device)
    found["decoded images/s"] = images / (time.perf_counter() - start)
    return within(worst, 1.0, **found)
