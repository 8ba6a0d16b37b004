"""The frozen image encoder: its preprocessing against open_clip's own, its numbers, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from test_unet import fill, golden
from tiny_clip import ARCH, SIZE, write_clip

from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError
from guided_mt.networks.clip import build_clip
from guided_mt.networks.heads import VectorUnits
from guided_mt.networks.image_encoder import UNTRAINED, ImageEncoder, Preprocessing, check_width

SPEC, ARRAYS = golden("openclip_tiny")
CPU = torch.device("cpu")


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture with an edge and some noise, uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + c) + np.cos(y / (5 + c)) for c in range(3)], axis=-1)
    noisy = 128 + 50 * waves + np.random.default_rng(0).normal(0, 12, waves.shape) + 60 * (x > width / 2)[..., None]
    return noisy.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(96, 96), (90, 131), (150, 97), (20, 20)])
def test_preprocessing_is_open_clips_transform(size):
    pixels = picture(*size)
    wanted = open_clip.image_transform(32, is_train=False)(Image.fromarray(pixels))
    ours = Preprocessing.of({**ARCH, "vision_cfg": {**ARCH["vision_cfg"], "image_size": 32}})
    found = ours(from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)[None]))[0]
    difference = (found - wanted).abs() * 0.27 * 255  # in pixels' units
    assert found.shape == wanted.shape
    # Pillow rounds to whole numbers within 0..255 after each of its two passes.
    assert difference.max() < 3 and difference.mean() < 0.5


@pytest.mark.parametrize(
    ("arch", "version", "mean", "said"),
    [
        ("ViT-H-14", None, open_clip.OPENAI_DATASET_MEAN, "for all weights of ViT-H-14"),
        ("ViT-H-14", "laion2b_s32b_b79k", open_clip.OPENAI_DATASET_MEAN, "for ViT-H-14 laion2b_s32b_b79k"),
        ("ViT-B-16-SigLIP", "a file.pt", (0.5, 0.5, 0.5), "for all weights of ViT-B-16-SigLIP"),
        (ARCH, "a file.pt", open_clip.OPENAI_DATASET_MEAN, "nothing says"),
        ({**ARCH, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}, None, (0.1, 0.2, 0.3), "the mapping's preprocess_cfg"),
    ],
)
def test_mean_and_std_are_those_of_the_weights(arch, version, mean, said):
    """open_clip itself takes OpenAI's for a file, also where the architecture's weights all want others."""
    found = Preprocessing.of(arch, version)
    assert found.mean == tuple(mean) and said in str(found) and "\n" not in str(found)


def test_vectors_are_clips(tmp_path):
    tower = fill(build_clip({key: SPEC[key] for key in ARCH}), SPEC["fill_seed"])
    file = tmp_path / "clip.pt"
    torch.save(tower.state_dict(), file)
    encoder = ImageEncoder({key: SPEC[key] for key in ARCH}, str(file))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.preprocessing.mean, encoder.preprocessing.std))
    images = 2 * (ARRAYS["image"] * std + mean) - 1  # of the right size: nothing is resized
    assert images.shape[-1] == 32
    inside = images.clamp(-1, 1)
    wanted = tower.encode_image(((inside + 1) / 2 - mean) / std)
    found = encoder(inside)
    assert (found - wanted).abs().max() < 1e-5 and not found.requires_grad
    half = encoder.to(CPU, torch.bfloat16)(inside)
    assert half.dtype == torch.float32 and 0 < (half - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_weights_are_known_by_their_hash_and_random_numbers_stay(tmp_path):
    _, weights = write_clip(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = ImageEncoder(ARCH, UNTRAINED), ImageEncoder(ARCH, UNTRAINED)
    assert torch.equal(torch.rand(3), expected)
    assert one.digest == two.digest != ImageEncoder(ARCH, str(weights)).digest
    assert len(one.digest) == 32 and one.size == SIZE
    with pytest.raises(UserError, match="makes vectors of 24 numbers, the model's have 5"):
        check_width(one, 5, "--clip_weights")


def test_units_turn_back(tmp_path):
    units, vectors = VectorUnits(SIZE), 3 + 2 * torch.randn(6, SIZE)
    assert units.digest == b"" and torch.equal(units.to_x(vectors), vectors)
    units.set(vectors.mean(0), vectors.std(), bytes(range(32)))
    x = units.to_x(vectors)
    assert torch.allclose(units.to_vectors(x), vectors, atol=1e-5) and x.mean(0).abs().max() < 1e-5
    assert units.digest == bytes(range(32))
    # One scale for all entries: distances keep their order.
    assert torch.allclose(torch.cdist(x, x) * vectors.std(), torch.cdist(vectors, vectors), atol=1e-4)
