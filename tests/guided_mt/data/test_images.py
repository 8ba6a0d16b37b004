"""uint8 and back, grids, sample files."""

from __future__ import annotations

import numpy as np
import torch

from guided_mt.data.images import from_uint8, make_grid, save_npz, to_nhwc, to_uint8


def test_every_pixel_value_survives_the_way_through_floats():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values).min() == -1 and from_uint8(values).max() == 1


def test_rounding_is_adms_elsewhere():
    x = torch.linspace(-1.2, 1.2, 10_001)
    adm = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert (to_uint8(x) != adm).float().mean() < 1e-3


def test_grid():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 40, 40, 3), np.uint8)
    grid = make_grid(images, columns=3, gap=2, least=1)
    assert grid.shape == (2 * 42 + 2, 3 * 42 + 2, 3)
    assert (grid[2:42, 44:84] == 1).all() and (grid[44:84, 2:42] == 3).all() and (grid[44:84, 86:] == 255).all()
    assert make_grid(images, 5).shape[0] == 2 + 40 + 2  # 40 pixels are not enlarged to 64: only whole factors


def test_npz_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "x.npz"
    for value in (1, 2):
        save_npz(path, {"arr_0": to_nhwc(torch.full((1, 3, 2, 2), 0.0)), "v": np.array([value])})
    with np.load(path) as file:
        assert file["v"] == 2 and file["arr_0"].shape == (1, 2, 2, 3)
    assert [p.name for p in path.parent.iterdir()] == ["x.npz"]
