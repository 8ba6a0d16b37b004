"""A frozen encoder for tests of alignment, as a row of ENCODERS: --align_encoder tiny, or tiny:SEED."""

from __future__ import annotations

import torch

from guided_mt.networks.alignment import FeatureEncoder
from guided_mt.runs.config import Config
from guided_mt.training.terms.alignment import ENCODERS

CHANNELS = 6


def make(seed: str = "", config: Config | None = None) -> FeatureEncoder:
    """A random 3x3 convolution of stride 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        module = torch.nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
    return FeatureEncoder("tiny", module, module)


def register() -> None:
    ENCODERS["tiny"] = make
