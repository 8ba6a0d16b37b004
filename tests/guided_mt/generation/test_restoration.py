"""Masks and the un-conditional methods of Table 1."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gaussian import frechet
from PIL import Image

from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion, space_timesteps
from guided_mt.errors import UserError
from guided_mt.generation.masks import make_mask
from guided_mt.generation.restoration import repaint, repaint_schedule


@pytest.mark.parametrize("steps, jump, resamples", [(250, 10, 10), (30, 10, 3), (20, 5, 1), (8, 10, 4)])
def test_repaint_walk(steps, jump, resamples):
    """From T to 0 in single levels, reaching each level 1, 1 + jump, ... from above `resamples` times."""
    walk = list(repaint_schedule(steps, jump, resamples))
    assert walk[0][0] == steps and walk[-1] == (1, 0)
    assert all(abs(a - b) == 1 for a, b in walk)
    assert all(first[1] == second[0] for first, second in itertools.pairwise(walk))
    levels = range(1, steps - jump + 1, jump)
    arrivals = [to for at, to in walk if to < at]
    assert all(arrivals.count(level) == resamples for level in levels)
    assert sum(to > at for at, to in walk) == len(levels) * jump * (resamples - 1)


def gaussian_model(diffusion, cov):
    eye = np.eye(len(cov))
    matrices = [np.sqrt(1 - a) * np.linalg.inv(a * cov + (1 - a) * eye) for a in diffusion.alphas_cumprod]
    matrices = torch.from_numpy(np.stack(matrices)).float()
    return lambda x, t: (x.flatten(1) @ matrices[int(t[0])].T).view(x.shape)


def test_repaint_on_gaussian_data():
    """Everything masked: the model's own law. Nothing masked: the image. Half: resampling helps."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4)) / 2
    cov = 0.1 * (root @ root.T + 0.2 * np.eye(4))
    full = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True)
    process, model = full.respace(space_timesteps(1000, "100")), gaussian_model(full, cov)
    n = 3000
    x = torch.from_numpy(rng.normal(size=(n, 4)) @ np.linalg.cholesky(cov).T).float().view(n, 1, 2, 2)
    ones = torch.ones(n, 1, 2, 2)
    assert torch.equal(repaint(model, process, x[:2], ones[:2], [0, 1], resamples=2), x[:2])

    drawn = repaint(model, process, x, 0 * ones, range(n), resamples=1).flatten(1).double().numpy()
    assert frechet(drawn.T @ drawn / n, cov) < 0.01 * np.trace(cov)

    keep = ones.clone()
    keep[:, :, 1] = 0
    truth, errors = cov[2:, :2] @ np.linalg.inv(cov[:2, :2]), []
    for resamples in (1, 10):
        drawn = repaint(model, process, x, keep, range(n), resamples=resamples).flatten(1).double().numpy()
        np.testing.assert_array_equal(drawn[:, :2], x.flatten(1)[:, :2].double())
        fitted = np.linalg.lstsq(drawn[:, :2], drawn[:, 2:], rcond=None)[0].T
        errors.append(np.abs(fitted - truth).max())
    assert errors[1] < 0.8 * errors[0]  # resampling is what brings the two halves together


def test_masks(tmp_path):
    streams = lambda: SampleStreams(torch.arange(3))  # noqa: E731
    assert make_mask("patches:0", 8, 2, streams()).all()
    assert not make_mask("full", 8, 2, streams()).any()
    half = make_mask("half", 8, 2, streams())
    assert half[..., :4].all() and not half[..., 4:].any()
    patches = make_mask("patches:1", 8, 3, streams())
    assert all(0 < int((m == 0).sum()) <= 9 for m in patches)
    picture = np.zeros((16, 16), np.uint8)
    picture[:8] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    for words in (
        f"image {tmp_path / 'mask.png'}",
        f"image:{tmp_path / 'mask.png'}",
        ["image", str(tmp_path / "mask.png")],
    ):
        mask = make_mask(words, 8, 2, streams())
        assert not mask[:, :, :4].any() and mask[:, :, 4:].all()
    Image.fromarray(picture * 0).save(tmp_path / "black.png")
    for bad in ("patch:3", "patches:x", "image /nowhere.png", f"image {tmp_path / 'black.png'}"):
        with pytest.raises(UserError, match="--mask"):
            make_mask(bad, 8, 2, streams())
