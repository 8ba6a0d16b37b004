"""What is checked and timed: the forms of the model as flags of `mt-diffusion train`, and the sizes of the networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from guided_mt.data import Batch, open_source
from guided_mt.generation.build import (
    bind,
    build_modalities,
    check_labels,
    check_tasks,
    complete,
    count_classes,
    run_sections,
)
from guided_mt.generation.compiling import compiled_arithmetic, compiled_encoder, compiled_network
from guided_mt.generation.generate import Generator
from guided_mt.runs.config import Config, parse
from guided_mt.runs.distributed import Processes
from guided_mt.training.train_loop import TrainLoop

CLASSES = 10

FORMS: dict[str, tuple[str, ...]] = {
    "single": ("--mt_task", "none"),
    "U": ("--mt_task", "masked", "--mt_variant", "U"),
    "X": ("--mt_task", "masked", "--mt_variant", "X"),
    "any": ("--mt_task", "masked,label", "--mt_variant", "any", "--mt_drop_prob", "0.1"),
    "label": ("--mt_task", "label", "--mt_variant", "U"),
    "label, K = 100": ("--mt_task", "label", "--mt_variant", "U", "--mt_encoder_refresh", "100"),
    "class_cond": ("--mt_task", "none", "--class_cond", "True"),
}


@dataclass(frozen=True)
class Size:
    """A network, its images and its batch. head_channels: channels per attention head.

    transformer: words of the command line for `--mt_backbone dit`, in the place of all that is the U-Net's.
    """

    name: str
    image_size: int
    channels: int
    res_blocks: int
    channel_mult: str
    attention: str
    batch: int
    head_channels: int = 64
    classes: int = CLASSES
    transformer: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        """As words of the command line."""
        values = {
            "image_size": self.image_size,
            "num_classes": self.classes,
            "global_batch_size": self.batch,
            "learn_sigma": True,
            "noise_schedule": "cosine",
        }
        unet = {
            "num_channels": self.channels,
            "num_res_blocks": self.res_blocks,
            "channel_mult": self.channel_mult,
            "attention_resolutions": self.attention,
            "num_head_channels": self.head_channels,
        }
        values |= {} if self.transformer else unet
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return [*words, *(("--mt_backbone", "dit", *self.transformer) if self.transformer else ())]

    @classmethod
    def of_transformer(cls, name: str, image_size: int, batch: int, *words: str) -> Size:
        """A transformer as `words` of the command line say."""
        return cls(name, image_size, 0, 0, "", "", batch, transformer=words)

    def with_batch(self, batch: int) -> Size:
        """The same network on other batches."""
        return dataclasses.replace(self, batch=batch)


TINY = Size("tiny", 8, 32, 1, "1,1", "4", 16, head_channels=32)
COMPARED = Size("compared", 16, 64, 1, "1,2", "8", 16)  # with the CPU in float64: every layer's kernel, and quick there
SMALL = Size("small", 32, 64, 1, "1,2,2", "16,8", 32)
CIFAR = Size("CIFAR", 32, 128, 3, "1,2,2,2", "16,8", 128)  # that of the presets
TWIN = Size("twin", 32, 64, 2, "1,2,2,2", "16,8", 128)  # what learns something on CIFAR-10 in half a minute
IMAGENET64 = Size("ImageNet-64", 64, 192, 3, "1,2,3,4", "32,16,8", 64, classes=1000)  # ADM's

_SMALL_DIT = ("--dit_hidden_size", "96", "--dit_depth", "4", "--dit_num_heads", "3")
TINY_DIT = Size.of_transformer("tiny DiT", 8, 16, *_SMALL_DIT)
COMPARED_DIT = Size.of_transformer("compared DiT", 16, 16, *_SMALL_DIT)
DIT_B2 = Size.of_transformer("DiT-B2, 256 tokens", 32, 128, "--dit_size", "B/2")
TWIN_DIT = Size.of_transformer("twin DiT", 32, 128, "--dit_size", "S/4", "--predict_xstart", "True")

# How twins are trained: for seconds, so with a fast average and hardly a warm-up.
TWIN_FLAGS = (
    "--lr",
    "4e-4",
    "--lr_warmup_steps",
    "100",
    "--grad_clip",
    "1",
    "--random_flip",
    "True",
    "--ema_rate",
    "0.995",
)
BF16 = ("--precision", "bf16", "--compile", "True")


def random_images(folder: Path, size: Size) -> Path:
    """An .npz with images of noise and their classes, enough for two batches; written once."""
    folder.mkdir(parents=True, exist_ok=True)
    file, count = folder / f"noise_{size.image_size}_{size.batch}_{size.classes}.npz", max(2 * size.batch, size.classes)
    if not file.exists():
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, size.image_size, size.image_size, 3), dtype=np.uint8)
        np.savez(file, arr_0=pixels, arr_1=np.arange(count) % size.classes)
    return file


def settings(form: str, size: Size, images: str | Path, *more: str) -> Config:
    """The configuration of a run of a form of FORMS on `images`, with more words of the command line. Raises UserError."""
    words = ["--data_dir", str(images), *size.flags(), *FORMS[form], *more]
    config = parse(words, run_sections(), description="")
    check_tasks(config)
    complete(config)
    return config


def make_loop(
    form: str,
    size: Size,
    device: torch.device,
    folder: Path,
    *more: str,
    images: str | Path = "",
    trained: bool = True,
    processes: Processes | None = None,
) -> TrainLoop:
    """A run of the project's own loop in `folder`, on images of noise unless others are named.

    trained: fill every weight with noise, since zeros, as new networks have in places, would hide errors and save work.
    """
    images = images or random_images(folder, size)
    config = settings(form, size, images, *more)
    source = open_source(str(images))
    count_classes(config, source)
    check_labels(config, source)
    loop = TrainLoop(config, processes or Processes(device=device), source, folder / "run")
    if trained:
        fill(loop.model)
        loop.ema.load(next(iter(loop.ema.averages)), loop.model.state_dict())
    loop.model.train()
    return loop


def make_generator(loop: TrainLoop, how: str = "False") -> Generator:
    """Draws from the network of a run, which trains no more, compiled as `how` says, as `Generator.load` compiles it.

    The heads' variances are 1 where the run has none yet.
    """
    model = loop.model.eval().requires_grad_(False)
    network, encode = compiled_network(model, how), compiled_encoder(model, how)
    modalities = build_modalities(loop.config)
    for modality in modalities.values():
        if modality.tracks_variance:
            modality.use_variance(torch.ones(loop.diffusion.num_timesteps, device=loop.device))
    bind(modalities, loop.config, model, encode=encode)
    between = compiled_arithmetic(how)
    return Generator(loop.config, model, modalities, None, network=network, encode=encode, arithmetic=between)


@torch.no_grad()
def fill(network: nn.Module, seed: int = 1) -> None:
    """Weights of a network as after some training: none is zero. The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        else:
            noise = parameter.detach().cpu() + 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise)


def batches(loop: TrainLoop, count: int) -> list[Batch]:
    """The first batches of a run, on the host."""
    with loop.stream() as stream:
        return [batch for batch, _ in zip(stream, range(count), strict=False)]
