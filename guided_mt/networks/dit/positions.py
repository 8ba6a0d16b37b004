"""Where the patches of an image lie, as the fixed vectors that a diffusion transformer adds to them (Vaswani et al. 2017)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PERIOD = 10000.0


def sin_cos_positions(width: int, grid: int) -> Tensor:
    """[1, grid * grid, width] float32, rows first: a quarter each of sines and cosines of the column, then of the row.

    Computed in float64, as facebookresearch/DiT does. `width` is a multiple of 4.
    """
    frequencies = MAX_PERIOD ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid, dtype=np.float64)[:, None] * frequencies  # (grid, width / 4)
    of_place = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    columns = np.broadcast_to(of_place[None], (grid, grid, width // 2))
    rows = np.broadcast_to(of_place[:, None], (grid, grid, width // 2))
    table = np.concatenate([columns, rows], axis=2).reshape(1, grid * grid, width)
    return torch.tensor(table, dtype=torch.float32)  # where the rest of the network is made, also on "meta"


def resized_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Positions [1, N, C] of a square grid, interpolated bicubically to height x width patches: [1, height * width, C].

    The grid is stretched and not continued, so that the image's border stays where the network learnt it.
    """
    grid = int(positions.shape[1] ** 0.5)
    if (height, width) == (grid, grid):
        return positions
    table = positions.transpose(1, 2).unflatten(2, (grid, grid))
    resized = F.interpolate(table, (height, width), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)
