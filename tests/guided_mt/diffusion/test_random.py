"""Per-sample random numbers: the published Philox vectors, independence of the batch, and the right distributions."""

from __future__ import annotations

import functools

import pytest
import torch

from guided_mt.diffusion.random import SampleStreams, one_kernel, philox, stream_words
from guided_mt.modalities import Images, MaskedImage, patch_mask

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, expected",  # Random123's kat_vectors, philox4x32-10
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


@pytest.fixture
def kernel(monkeypatch):
    """`one_kernel`, made anew within the test, and traced as for the compiler but not compiled, which would take a quarter of a
    minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    one_kernel.cache_clear()
    yield one_kernel
    one_kernel.cache_clear()


def arguments(batch: int, count: int):
    index, seed = (torch.arange(batch)[:, None] * factor for factor in (987_654_321_987, 12_345_678_901))
    halves = [((x & ALL), (x >> 32) & ALL) for x in (index, seed)]
    return torch.arange(count), torch.tensor(count % 3), *halves


def test_traced_words_are_the_same_to_the_bit_by_one_graph_for_all_sizes(kernel):
    words = kernel()
    torch._dynamo.utils.counters.clear()
    for size in ((5, 7), (3, 9), (4, 4), (16, 768)):
        for found, expected in zip(words(*arguments(*size)), stream_words(*arguments(*size)), strict=True):
            assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_the_words_are_the_same_and_one_line_says_so(kernel, monkeypatch, caplog):
    def no_compiler(*given):
        raise RuntimeError("no C compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    for size in ((2, 3), (3, 2)):
        found, expected = kernel()(*arguments(*size)), stream_words(*arguments(*size))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert [record.message for record in caplog.records] == [
        "random numbers are drawn slower, as they can't be compiled here: no C compiler"
    ]


def test_a_stream_depends_on_seed_and_index_alone():
    batch = SampleStreams(torch.tensor([7, 8, 9]), torch.tensor([0, 2**40, 5]))
    single = SampleStreams(torch.tensor([8]), 2**40)
    for draw in (lambda s: s.normal(3, 5), lambda s: s.uniform(), lambda s: s.integers(11, 2)):
        assert torch.equal(draw(batch)[1:2], draw(single))
    assert not torch.equal(SampleStreams(8, 0).normal(4), SampleStreams(8, 1).normal(4))
    assert not torch.equal(SampleStreams(8).normal(4), SampleStreams(8 + 2**32).normal(4))


def test_successive_draws_differ():
    streams = SampleStreams(3)
    assert not torch.equal(streams.uniform(8), streams.uniform(8))


def test_distributions():
    streams = SampleStreams(torch.arange(200))
    x = streams.normal(1001).flatten().double()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * (spread / len(x)) ** 0.5
    u = streams.uniform(1000).flatten().double()
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 5 / (12 * len(u)) ** 0.5
    counts = torch.bincount(streams.integers(11, 1000).flatten(), minlength=11).double() / 200_000
    assert len(counts) == 11 and (counts - 1 / 11).abs().max() < 0.004


def test_patch_masks_are_the_papers():
    """Corners uniform over the image, patches cut at the border, overlap allowed: against one patch at a time."""
    size, patch, most = (9, 7), 3, 4
    count = torch.tensor([0, 1, 4, 2])
    mask = patch_mask(size, patch, count, most, SampleStreams(torch.arange(4)))
    corners = SampleStreams(torch.arange(4)).uniform(2, most)
    for b in range(4):
        expected = torch.ones(size)
        for i in range(int(count[b])):
            top, left = int(corners[b, 0, i] * size[0]), int(corners[b, 1, i] * size[1])
            expected[top : top + patch, left : left + patch] = 0
        assert torch.equal(mask[b, 0], expected)


def test_masked_image_statistics():
    """m ~ Uniform{0..max}, and the complete mask for a share full_prob."""
    modality = MaskedImage(patch=1, max_patches=3, full_prob=0.25)
    x = modality.from_batch(Images(torch.ones(8000, 3, 64, 64)[:, :1]), SampleStreams(torch.arange(8000)))
    masked = (x[:, 0] == 0).flatten(1).sum(1)
    share = [float((masked == m).float().mean()) for m in range(4)]
    assert abs(float((masked == 64 * 64).float().mean()) - 0.25) < 0.025
    for value in share:  # one-pixel patches seldom overlap
        assert abs(value - 0.75 / 4) < 0.025
