"""Image, label and caption whose joint law is known, through `sample`: every sampler, and every subset given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import frechet
from joint_mixture import JointMixture
from test_samplers import finite_sample_error

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps, space_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample

SHAPE, N = (3, 2, 2), 1600
PROBABILITIES = (0.4, 0.3, 0.2, 0.1)
LABELS = (0, 0, 1, 1)
# Of different lengths; the first word alone tells neither the label nor the caption.
DATA = JointMixture(SHAPE, PROBABILITIES, LABELS, [(1,), (2, 3), (1, 3), (2, 3, 1)], apart=2.5)
GIVEN = {"nothing": [], "label": ["label"], "caption": ["caption"], "both": ["label", "caption"]}


def draw(data: JointMixture, weights: str = "bridge", *, n: int = N, sampler: str = "ddpm", steps=100, **options):
    names = {"label": weights, "caption": weights}
    full = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights=names)
    kept = kept_timesteps(full, steps) if isinstance(steps, str) else space_timesteps(1000, str(steps))
    settings = {"seeds": range(n), "clip_denoised": False, "sampler": sampler, **options}
    return sample(data.network(full), full.respace(kept), data.modalities(), (n, *SHAPE), **settings)


def known_of(data: JointMixture, names: list[str], components: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {"label": data.labels, "caption": data.captions}
    return {name: values[name][components] for name in names}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("given", GIVEN)
def test_every_subset_given(given, sampler):
    """Which component is drawn follows its probability given what is known; the image has that component's law, and label and
    caption that are reported are those that the image shows."""
    names, asked = GIVEN[given], torch.arange(N) % len(DATA)
    known = known_of(DATA, names, asked)
    options = {"known": known, "conditioning": "network"} if names else {}
    drawn = draw(DATA, sampler=sampler, steps=100 if sampler == "ddpm" else "solver80", **options)
    shown = DATA.nearest(drawn.x_start)
    found = drawn.modalities
    label = found["label"] if "label" in known else found["label"].argmax(dim=1)
    head = DATA.modalities()["caption"].head
    caption = found["caption"] if "caption" in known else head.best(found["caption"])[0]
    assert (label == DATA.labels[shown]).float().mean() > 0.999
    own = DATA.modalities()["caption"].own_tokens(DATA.captions[shown]).bool()
    assert ((caption == DATA.captions[shown]) | ~own).all(dim=1).float().mean() > 0.995
    carried = DATA.carrying(known).expand(N, -1).double() * torch.tensor(PROBABILITIES, dtype=torch.float64)
    law = carried / carried.sum(dim=1, keepdim=True)
    counts = torch.nn.functional.one_hot(shown, len(DATA)).double().mean(dim=0)
    error = (counts - law.mean(dim=0)).abs()
    assert (error < 0.002 + 4 * (law * (1 - law)).mean(dim=0).sqrt() / N**0.5).all(), (counts, law.mean(dim=0))
    for k, (mean, cov) in enumerate(zip(DATA.base.means, DATA.base.covs.numpy(), strict=True)):
        flat = drawn.x_start.flatten(1).double()[shown == k]
        assert float(((flat.mean(0) - mean) ** 2).sum()) < 4 * np.trace(cov) / len(flat)
        assert frechet(np.cov(flat.T.numpy()), cov) < 0.006 + 2 * finite_sample_error(cov, len(flat))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_caption_known_by_own_head(sampler):
    """Where a caption's words say nothing of each other, Bayes' rule with the caption's head is exact: sample by sample, form U
    draws what a network draws that is given the caption, the label being open in both."""
    data = JointMixture(SHAPE, PROBABILITIES, LABELS, [(1, 3), (2, 3), (1, 3), (2, 3)], apart=0.4)
    asked = torch.arange(60) % len(data)
    known = known_of(data, ["caption"], asked)
    names = {"label": "bridge", "caption": "bridge"}
    full = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights=names)
    exact = data.network(full)

    def given(z_t, t, modalities):
        """Form X for the caption while it stands in the frame, as own head has it: only the weights of the components differ."""
        abar, b = (
            torch.from_numpy(full.alphas_cumprod)[t],
            torch.from_numpy(full.aggregation.coefficients["caption"])[t],
        )
        log_joint, eps = data.components(z_t, abar, b, ["label", "caption"])
        log_joint = log_joint.masked_fill(~data.carrying(known), -1e4)
        mean = (log_joint.softmax(-1)[..., None] * eps).flatten(1) @ data.base.into.T
        return ModelOutput(mean.view(z_t.shape), exact(z_t, t, {}).predictions)

    process = full.respace(space_timesteps(1000, "25"))
    options = {"seeds": range(60), "clip_denoised": False, "sampler": sampler, "known": known}
    by_head = sample(exact, process, data.modalities(), (60, *SHAPE), **options)
    by_rule = sample(given, process, data.modalities(), (60, *SHAPE), **options, conditioning="algorithm1")
    torch.testing.assert_close(by_head.x_start, by_rule.x_start, rtol=1e-4, atol=1e-4)


def test_what_stands_for_an_open_caption_is_its_mean_encoding():
    """E of what the head says is the mean of E over the captions that are left, whatever their lengths."""
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    caption = DATA.modalities()["caption"]
    said = DATA.caption_logits(weights.log())
    mean = torch.einsum("bk,k...->b...", weights, DATA.tables["caption"])
    torch.testing.assert_close(caption.encode(said), mean, rtol=1e-5, atol=1e-5)
