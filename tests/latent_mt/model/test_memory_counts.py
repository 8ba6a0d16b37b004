"""The counts of activations in benchmarks/memory.py: shapes alone give what real tensors give, and recomputation keeps what it
says."""

from __future__ import annotations

import sys

import torch
from tiny import ROOT
from tiny_latent import UNET
from torch._subclasses.fake_tensor import FakeTensorMode

from guided_mt.networks.layers import Block
from guided_mt.networks.model import MTModel
from latent_mt.model.unet import unet_options

sys.path.append(str(ROOT / "benchmarks"))
from memory_counts import Counter, count

WIDTH = 24


def network() -> MTModel:
    options = unet_options(**{**UNET, "use_spatial_transformer": True, "context_dim": WIDTH, "use_checkpoint": False})
    return MTModel(heads={}, conditioned=True, **options)


def test_shapes_count_as_real_tensors_do():
    real = count(network(), 2, 8, WIDTH)
    with FakeTensorMode():
        fake = count(network(), 2, 8, WIDTH)
    assert (real.kept(), real.recomputed()) == (fake.kept(), fake.recomputed())
    assert 0 < real.recomputed() < real.kept()


def test_what_is_kept_is_what_autograd_saves():
    """One linear layer keeps its input; one with a ReLU behind it keeps the output too."""
    layer = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU())
    counter = Counter(layer)
    x = torch.randn(3, 5)
    with counter.watching():
        layer(x)
    assert counter.kept() == 4 * (3 * 5 + 3 * 7)


def test_what_recomputation_keeps_is_what_torch_keeps():
    """With `use_checkpoint` torch itself saves the blocks' inputs, which the hooks then see."""
    made = network()
    counted = count(made, 1, 8, WIDTH)
    for module in made.modules():
        if isinstance(module, Block):
            module.use_checkpoint = True
    seen = count(made, 1, 8, WIDTH)
    context = 4 * 77 * WIDTH  # which torch's function holds as it is, and does not save
    assert seen.kept() == counted.held() - context and seen.kept() < counted.recomputed() < counted.kept()
