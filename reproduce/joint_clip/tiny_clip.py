"""A small CLIP, trained on pictures with captions until its vectors mean something; the model and the loss are open_clip's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guided_mt.data.images import from_uint8
from guided_mt.networks.clip import LENGTH, build_clip, open_clip, tokenize
from guided_mt.networks.image_encoder import Preprocessing

ARCH: dict[str, Any] = {
    "embed_dim": 64,
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
}
BATCH, RATE, DECAY, WARMUP = 128, 1e-3, 0.1, 50
log = logging.getLogger("guided_mt")


class TinyCLIP:
    """A trained CLIP of `ARCH`: pictures and texts to vectors of unit length. Frozen, on the CPU."""

    def __init__(self, file: Path):
        self.clip = build_clip(ARCH, None)
        self.clip.load_state_dict(load_file(file))
        self.clip.requires_grad_(False)
        self.preprocessing = Preprocessing.of(ARCH)

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> unit vectors [N, D]."""
        parts = pictures.split(256)
        return torch.cat([self._unit(self.clip.encode_image(self.preprocessing(from_uint8(part)))) for part in parts])

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """N captions -> unit vectors [N, D]."""
        return torch.cat([self._unit(self.clip.encode_text(ids)) for ids in tokenize(captions)[0].split(256)])

    @staticmethod
    def _unit(vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors.float(), dim=1)


def train_clip(pictures: Tensor, captions: Sequence[str], steps: int, seed: int, out: Path) -> None:
    """Contrastive training on uint8 [N, 3, H, W] and their captions; writes `out` (.safetensors) and the architecture beside it.

    The rate rises over the first steps and falls as a cosine. Half of the pictures are mirrored.
    """
    torch.manual_seed(seed)
    clip, preprocessing = build_clip(ARCH, None).train(), Preprocessing.of(ARCH)
    contrastive = open_clip().ClipLoss()
    optimizer = torch.optim.AdamW(grouped(clip), lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    rates = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - WARMUP)),
        ],
        [WARMUP],
    )
    ids, draws = tokenize(captions)[0], torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(pictures), generator=draws)[:BATCH]
        images = from_uint8(pictures[chosen])
        mirrored = torch.rand(len(chosen), generator=draws) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        found = clip(preprocessing(images), ids[chosen])
        loss = contrastive(*found)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rates.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, 4.6052)  # ln 100, as CLIP's
        if step % 100 == 0 or step == steps:
            log.info("small CLIP, seed %d, step %d/%d: loss %.3f", seed, step, steps, loss.detach().item())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(ARCH))
    unfinished = out.with_name(f".tmp_{out.name}")
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, unfinished)
    os.replace(unfinished, out)  # a file of this name is whole, whenever the run was killed


def grouped(clip: nn.Module) -> list[Mapping[str, Any]]:
    """Weight decay for matrices alone, as in CLIP's training."""
    parameters = [p for p in clip.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
