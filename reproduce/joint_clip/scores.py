"""What pictures drawn of captions are scored by, on the unit vectors of a CLIP that nothing was trained towards."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations.scores.kid import kernel_distance
from evaluations.scores.metrics import frechet_distance

NEAREST = 5


def distances(true: Tensor, drawn: Tensor) -> dict[str, float]:
    """Frechet distance and 1000 KID between two sets of unit vectors [N, D] and [M, D]. KID's kernel is for entries of size 1."""
    a, b = (vectors.double().numpy() for vectors in (true, drawn))
    frechet = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    size = a.shape[1] ** 0.5
    return {"fd": float(frechet), "kid": 1000 * kernel_distance(size * a, size * b)[0]}


def agreement(drawn: Tensor, texts: Tensor, all_texts: Tensor) -> dict[str, float]:
    """How well pictures [N, D] show their captions [N, D]: the mean cosine, and how often the caption is among the 5 nearest of
    all captions [K, D]. A caption that others share counts as near as the first of them."""
    own = (drawn * texts).sum(dim=1)
    nearer = (drawn @ all_texts.T > own[:, None] + 1e-6).sum(dim=1)
    return {"agreement": float(own.mean()), "top5": float((nearer < NEAREST).float().mean())}


def of_head(progress: Path) -> dict[str, float]:
    """The cosine of the head's vector and the true one, over the last tenth of the log; {} where there is none."""
    with open(progress, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in (rows[-1] if rows else {}) if name.startswith("cos_") and "_q" not in name]
    last = rows[-max(1, len(rows) // 10) :]
    found = torch.tensor([float(row[columns[0]]) for row in last]) if columns else torch.empty(0)
    return {"head": float(found.mean())} if len(found) else {}
