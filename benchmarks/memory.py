"""What training Stable Diffusion 2 with representations takes in memory: one real step on the CPU, and a table for cards.

    python benchmarks/memory.py step                  the whole U-Net on an 8 x 8 latent, batch 1, float32, AdamW: some 15 GiB
    python benchmarks/memory.py table                 nothing is allocated: shapes alone, of latents of 64 x 64 and 96 x 96

The step is that of latent_mt/configs/stable_diffusion_2_clip.yaml with a small first stage, a small text stage and a small
image tower around the U-Net. The table counts parameters, gradients, AdamW's moments and averages in float32, the frozen parts
as a run with precision bf16-mixed holds them, and the activations that autograd keeps (memory_counts.py); under strategy fsdp the
processes share the trained part out. Fragments of the allocator, cuDNN's workspaces and CUDA's own context are not in it: leave
10 % of a card to them.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np
import torch
from memory_counts import activations, at_work
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from guided_mt.data import Batch
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.random import SampleStreams
from guided_mt.generation.build import complete
from guided_mt.modalities import Images, Pixels
from guided_mt.networks.layers import Block
from guided_mt.training.optim import guard_step
from guided_mt.training.units import measure_units
from latent_mt.model import codec
from latent_mt.model.backbones import described
from latent_mt.model.latent_diffusion import LatentMTDiffusion
from latent_mt.model.network import build_network
from latent_mt.model.tasks import TaskKeys, read_tasks
from latent_mt.runs.configuration import load_config
from latent_mt.runs.targets import instantiate

GIB = 2**30
CONFIG = "stable_diffusion_2_clip"
CARDS = (24, 40, 80)  # GiB
PROCESSES = 8  # that share the trained weights out, with strategy fsdp
WIDTH = 1024  # of the context and of CLIP's vectors
SMALL = {
    "model.params.image_size": 8,
    "model.params.first_stage_config.params.ddconfig.ch": 32,
    "model.params.first_stage_config.params.ddconfig.ch_mult": "[1,1,1,1]",
    "model.params.first_stage_config.params.ddconfig.num_res_blocks": 1,
    "model.params.cond_stage_config.params.version": "null",
    "model.params.mt_tasks.representation.clip_weights": "untrained",
}
ARCH: dict[str, Any] = {
    "embed_dim": WIDTH,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 16, "layers": 2},
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
}


def built(overrides: dict[str, Any], arch: dict[str, Any] | None = None) -> LatentMTDiffusion:
    """The model of CONFIG without a checkpoint. arch: of the text stage and the image tower, in the place of ViT-H-14."""
    config = load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])
    params = config["model"]["params"]
    del params["ckpt_path"]
    if arch is not None:
        params["cond_stage_config"]["params"]["arch"] = arch
        params["mt_tasks"]["representation"]["clip_arch"] = arch
    return instantiate({"target": config["model"]["target"], "params": params}, "model")


def peak() -> float:
    """The largest resident size of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def step() -> None:
    """Build, forward, backward, AdamW; a line for each."""
    torch.manual_seed(0)
    begun = time.perf_counter()

    def say(what: str) -> None:
        print(f"{what}: peak {peak():.2f} GiB, {time.perf_counter() - begun:.0f} s", flush=True)

    say("python and torch")
    model = built(SMALL, ARCH)
    model.network.train()
    own = sum(p.numel() for name, p in model.network.named_parameters() if not name.startswith("heads."))
    count = sum(p.numel() for p in model.network.parameters())
    say(f"built, {own / 1e6:.1f} M parameters of the U-Net and {(count - own) / 1e6:.1f} M of the head")
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    measure_units(model.modalities, [Images(torch.zeros(8, 4, 8, 8), image=pixels / 127.5 - 1)])
    batch = Batch(pixels[:1], None, torch.tensor([0]), torch.tensor([0]), captions=["a photo of a cat"])
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    losses, _ = model.losses(batch, SampleStreams(0, batch.positions), torch.tensor([500]))
    say("forward")
    losses.loss.mean().backward()
    say("backward, gradients")
    grads = [p.grad for p in model.network.parameters() if p.grad is not None]
    norm, _ = guard_step(optimizer, grads, 0.0)
    optimizer.step()
    terms = ", ".join(f"{name} {float(losses.terms[name].detach()):.4f}" for name in model.terms)
    cosine = float(losses.figures["cos_representation"])
    say(f"AdamW, moments ({terms}, cosine {cosine:.3f}, gradient norm {float(norm.detach()):.3f})")


def table() -> None:
    """Markdown: what is there whatever the batch, then what an image of a batch adds, and how many fit."""
    with torch.device("meta"):
        model = built({})
    weights = _gib(model.network, 4)
    trained = {
        "U-Net and head, float32": weights,
        "gradients": weights,
        "AdamW's moments": 2 * weights,
        "averages (`ema_device: cpu`: 0, `ema_dtype: bf16`: half)": weights,
    }
    frozen = {
        "text stage, float32": _gib(model.cond_stage_model, 4),
        "first stage, float32": _gib(model.first_stage_model, 4),
        "CLIP's image tower, bf16 (0 where its vectors are stored)": _image_tower(),
    }
    rows = {**trained, **frozen}
    shared = {name: size / PROCESSES for name, size in trained.items()}
    shared = {
        **shared,
        "whole for a moment: what is in no block, two blocks and their gradients": _at_work(model.network),
        **frozen,
    }
    print(f"| whatever the batch | `ddp`, GiB | `fsdp` over {PROCESSES}, GiB |\n| --- | --- | --- |")
    for name in shared:
        print(f"| {name} | {rows.get(name, 0):.1f} | {shared[name]:.1f} |")
    print(f"| all | {sum(rows.values()):.1f} | {sum(shared.values()):.1f} |")
    print(
        "\n| latent | activations | with every batch | each image | "
        + " | ".join(f"images in {card} GiB" for card in CARDS)
        + " |"
    )
    print("| --- " * (4 + len(CARDS)) + "|")
    smallest = sum(rows.values()) - weights - rows["CLIP's image tower, bf16 (0 where its vectors are stored)"]
    for size in (64, 96):
        found = activations(network_of_config, size, WIDTH)
        for name, kept in (("all kept", found.kept), ("recomputed (`use_checkpoint`)", found.recomputed)):
            fixed, each = kept
            fits = [max(0, int((0.9 * card - smallest - fixed) // each)) for card in CARDS]
            print(f"| {size} x {size} | {name} | {fixed:.1f} | {each:.2f} | {' | '.join(map(str, fits))} |", flush=True)
    print("\nImages in a card: with the averages on the host and stored vectors, and a tenth of the card left free.")
    for pixels in (512, 768):
        count = max(1, codec.PASS // pixels**2)
        held = f"{_encoding(count, pixels):.1f} GiB for {count} image(s) of {pixels} x {pixels}"
        print(f"Before the U-Net runs, the first stage holds {held} at a time.")


def network_of_config() -> nn.Module:
    """The U-Net of CONFIG with its head."""
    config = load_config(CONFIG)
    params = config["model"]["params"]
    keys = {key: value for key, value in params.items() if key in TaskKeys.__dataclass_fields__}
    settings = read_tasks(TaskKeys(**keys), precision="fp32")
    complete(settings)
    network, process = described(params["unet_config"]), GaussianDiffusion(betas=np.full(1000, 0.01))
    return build_network(network, settings, process, Pixels(params["image_size"]))


def _encoding(count: int, pixels: int) -> float:
    """GiB of the feature maps of a pass of CONFIG's first stage."""
    first = load_config(CONFIG)["model"]["params"]["first_stage_config"]
    with FakeTensorMode():
        stage, images = instantiate(first, "first stage").eval(), torch.zeros(count, 3, pixels, pixels)
        return at_work(lambda: stage.encode_moments(images))


def _at_work(network: nn.Module) -> float:
    """What `fsdp` holds whole at once, GiB: the weights outside blocks, and weights and gradients of the two largest blocks."""
    blocks = [_gib(module, 4) for module in network.modules() if isinstance(module, Block)]
    return _gib(network, 4) - sum(blocks) + 2 * sum(sorted(blocks)[-2:])


def _gib(module: Any, bytes_each: int) -> float:
    return sum(p.numel() for p in module.parameters()) * bytes_each / GIB


def _image_tower() -> float:
    from guided_mt.networks.clip import build_clip

    with torch.device("meta"):
        return _gib(build_clip("ViT-H-14", towers="image").visual, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "table"))
    {"step": step, "table": table}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
