"""Floating-point operations of a network, counted without computing them, and what cards can do of them in a second."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from guided_mt.generation.build import build_model

from .forms import Size, settings

# TFLOP/s of dense bf16, as in NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "A100": 312.0}


def peak(card: str) -> float | None:
    """TFLOP/s in bf16 of a card by its name; None for one that isn't known."""
    return next((value for name, value in PEAKS.items() if name in card), None)


@functools.cache
def per_image(form: str, size: Size) -> float:
    """Operations of the network's forward and backward pass for one image, multiplication and addition counted apart."""
    config = settings(form, size, "none")
    batch = 2
    no_autocast = mock.patch("torch.autocast", lambda *args, **options: contextlib.nullcontext())
    with no_autocast, torch.device("meta"):  # which autocast doesn't know, and the count is the same
        model = build_model(config)
        z, t = torch.empty(batch, 3, size.image_size, size.image_size), torch.zeros(batch)
        ids = torch.zeros(batch, dtype=torch.int64)
        modalities = {}
        if form in ("X", "any"):
            modalities["masked"] = torch.empty_like(z)
        if form == "any":
            modalities["label"] = ids
        options = {"y": ids} if form == "class_cond" else {}
        with FlopCounterMode(display=False) as counter:
            made = model(z, t, modalities, **options)
            sum(x.sum() for x in (made.output, *made.predictions.values())).backward()
    return counter.get_total_flops() / batch
