"""A tiny CLIP for the tests: its architecture as open_clip writes one, and files of it with weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from guided_mt.networks.clip import build_clip

SIZE = 24  # of its vectors
ARCH = {
    "embed_dim": SIZE,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
}


def write_clip(folder: Path, seed: int = 3) -> tuple[Path, Path]:
    """(JSON file of the architecture, file of its weights) in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    arch, weights = folder / "clip.json", folder / f"clip_{seed}.pt"
    arch.write_text(json.dumps(ARCH))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = build_clip(ARCH)
        for name, parameter in clip.named_parameters():
            if parameter.ndim > 1 and name != "token_embedding.weight":
                torch.nn.init.normal_(parameter.data, std=parameter.shape[-1] ** -0.5)
    torch.save(clip.state_dict(), weights)
    return arch, weights
