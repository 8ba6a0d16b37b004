"""A mixture whose components carry a caption: the best network is known, and image and caption are drawn together, or either of the
other, with the law of a caption whose positions are told apart from its length (docs/method.md, section 10.10)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mixture import LabelledMixture
from test_mixture import APART, PROBABILITIES, SHAPE, N, assert_classes, assert_frequencies

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion, space_timesteps
from guided_mt.diffusion.sampling import sample
from guided_mt.generation.captioning import drawn_captions
from guided_mt.generation.classification import head_estimates
from guided_mt.modalities import CaptionModality
from guided_mt.networks.caption_head import CaptionHead

V, L, END = 3, 3, 0
CAPTIONS = torch.tensor([[1, 2, END], [2, END, END], [1, 1, 2]])  # of the components; of three lengths
CODES = torch.randn(L, V, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POSITIONS = torch.arange(L)
DATA = LabelledMixture(APART.probabilities, APART.means, APART.covs, CODES[POSITIONS, CAPTIONS].sum(dim=1))


def modality() -> CaptionModality:
    """The package's own; E is linear in the tokens, and what its head says are log probabilities."""
    head = CaptionHead(SimpleNamespace(middle_channels=8), V, L, V)
    with torch.no_grad():
        head.vocabulary.weight.copy_(torch.eye(V))
        head.vocabulary.bias.copy_(torch.tensor([0.0, 0.0, 0.0]))
    caption = CaptionModality("caption", "words", L, V)
    caption.use_network(
        SimpleNamespace(heads={"caption": head}, context_in={"caption": SimpleNamespace(weight=torch.eye(V))})
    )
    caption.encoder = encode
    return caption


def encode(x: torch.Tensor) -> torch.Tensor:
    """ids [B, L], or the mean of the one-hot tokens [B, L, V]."""
    p = x.double() if x.is_floating_point() else F.one_hot(x, V).double()
    return torch.einsum("blv,lv...->b...", p, CODES)


def network(diffusion):
    """The best network. Its head says of each position the tokens' probabilities where the caption has not ended before."""
    labelled = DATA.network(diffusion, "caption")
    tokens = F.one_hot(CAPTIONS, V).double()  # (K, L, V)
    ended = (CAPTIONS == END).long()
    reached = ((ended.cumsum(1) - ended) == 0).double()  # (K, L)

    def called(z_t, t, modalities, **options):
        known = {name: (x[:, None] == CAPTIONS).all(-1).long().argmax(1) for name, x in modalities.items()}
        found = labelled(z_t, t, known, **options)
        p = found.predictions["caption"].softmax(-1)
        joint = torch.einsum("bk,kl,klv->blv", p, reached, tokens)
        said = (joint / joint.sum(-1, keepdim=True).clamp(min=1e-300)).clamp(min=1e-30).log()
        return ModelOutput(found.output, {"caption": said})

    return called


def process(weights: str = "bridge"):
    return create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights={"caption": weights})


def components(caption: CaptionModality, x: torch.Tensor) -> torch.Tensor:
    """Which component's caption each is, -1 for none."""
    ids = caption.head.best(x)[0] if x.is_floating_point() else x
    ended = (ids == END).long()
    ids = torch.where(ended.cumsum(1) > 0, END, ids)
    same = (ids[:, None] == CAPTIONS).all(-1)
    return torch.where(same.any(1), same.long().argmax(1), -1)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_image_and_caption_together(sampler):
    full, caption = process(), modality()
    frame = full.respace(space_timesteps(1000, "100"))
    settings = {"seeds": range(N), "clip_denoised": False, "sampler": sampler}
    drawn = sample(network(full), frame, {"caption": caption}, (N, *SHAPE), **settings)
    reported, shown = components(caption, drawn.modalities["caption"]), DATA.nearest(drawn.x_start)
    assert (reported == shown).float().mean() > 0.999
    assert_frequencies(shown)
    assert_classes(DATA, drawn.x_start, reported, of_cov=0.006)


@pytest.mark.parametrize("how", ["given", "absent"])
def test_image_of_a_caption_and_without_one(how):
    full, caption, labels = process(), modality(), torch.arange(N) % 3
    settings = {"seeds": range(N), "clip_denoised": False, "sampler": "dpm++", "conditioning": "network"}
    state = {"known": {"caption": CAPTIONS[labels]}} if how == "given" else {"absent": ["caption"]}
    frame = full.respace(space_timesteps(1000, "100"))
    drawn = sample(network(full), frame, {"caption": caption}, (N, *SHAPE), **settings, **state)
    if how == "given":
        assert torch.equal(components(caption, drawn.modalities["caption"]), labels)
        assert_classes(DATA, drawn.x_start, labels, of_cov=0.006)
    else:
        assert_frequencies(DATA.nearest(drawn.x_start))


@pytest.mark.parametrize("how", ["read", "drawn"])
def test_caption_of_an_image(how):
    """That of the component which the image shows."""
    full, caption, count = process(), modality(), 300
    labels = torch.arange(count) % len(PROBABILITIES)
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(count, DATA.means.shape[1], generator=rng, dtype=torch.float64)
    roots = torch.linalg.cholesky(DATA.covs)
    x_start = (DATA.means[labels] + torch.einsum("bde,be->bd", roots[labels], noise)).view(count, *SHAPE)
    streams, modalities = SampleStreams(torch.arange(count)), {"caption": caption}
    if how == "read":
        x = head_estimates(network(full), full, modalities, x_start, [10, 0], 1, streams, "caption")
    else:
        steps = [300, 200, 100, 50, 10, 0]
        x = drawn_captions(network(full), full, modalities, x_start, [10, 0], steps, streams, temperature=1.0)
    assert (components(caption, x) == DATA.nearest(x_start)).float().mean() > 0.99


def test_what_is_drawn_is_coherent(monkeypatch):
    """Of images that tell nothing of their caption, tokens drawn each by itself mix the captions; what is committed and shown in a
    large frame makes the others fit."""
    one = DATA.covs[:1].expand(3, -1, -1).contiguous()
    monkeypatch.setitem(globals(), "DATA", LabelledMixture(DATA.probabilities, 0.1 * DATA.means, one, DATA.table))
    full, caption, count = process(), modality(), 300
    x_start = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2
    arguments = network(full), full, {"caption": caption}, x_start
    said = head_estimates(*arguments, [9, 6, 3, 0], 4, SampleStreams(torch.arange(count)), "caption")
    alone = caption.head.drawn(said, SampleStreams(torch.arange(count), 1).uniform(L))
    steps = range(0, 400, 40)
    drawn = drawn_captions(*arguments, [9, 6, 3, 0], steps, SampleStreams(torch.arange(count)), temperature=1.0)
    assert (components(caption, alone) < 0).float().mean() > 0.4
    assert (components(caption, drawn) < 0).float().mean() < 0.05
