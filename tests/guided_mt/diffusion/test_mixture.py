"""A mixture with labels, whose best network is known, through every sampler, weights and conditioning (docs/method.md, section 5).

Statistics of N draws are held against what N exact draws would show: frequencies to 4 standard errors, class means to 4 times
their squared standard error, covariances to twice their own finite-sample Frechet distance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gaussian import frechet
from mixture import LabelledMixture
from test_samplers import SOUND_WEIGHTS, finite_sample_error

from guided_mt.diffusion.aggregation import WEIGHTS
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps, space_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.sampling.guidance import classifier_guidance
from guided_mt.modalities import ImageModality

SHAPE = (3, 2, 2)
N = 2400
PROBABILITIES = (0.5, 0.3, 0.2)
APART = LabelledMixture.make(SHAPE, PROBABILITIES, seed=0, apart=2.5)  # an image shows its class
OVERLAPPING = LabelledMixture.make(SHAPE, PROBABILITIES, seed=0, apart=0.4)  # it does not
LABELS = torch.arange(N) % 3
DETERMINISTIC = [name for name in SAMPLERS if name != "ddpm"]


def full_process(weights: str | None, **options):
    names = {} if weights is None else {"label": weights}
    return create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights=names, **options)


def draw(data, weights, *, steps=80, n=N, model=None, modality=None, sampler="ddpm", **options):
    """n draws from `data` on `steps` timesteps (a number, or the timesteps), by its best network unless a `model` is given."""
    full = full_process(weights)
    kept = space_timesteps(1000, str(steps)) if isinstance(steps, int) else steps
    modalities = {} if weights is None else {"label": modality or data.modality()}
    model = model or data.network(full)
    settings = {"seeds": range(n), "clip_denoised": False, "sampler": sampler, **options}
    return sample(model, full.respace(kept), modalities, (n, *SHAPE), **settings)


def assert_frequencies(labels: torch.Tensor, allowed: float = 0.0) -> None:
    p, n = np.array(PROBABILITIES), len(labels)
    error = np.abs(np.bincount(labels, minlength=3) / n - p)
    assert (error < 4 * np.sqrt(p * (1 - p) / n) + allowed).all(), error


def assert_classes(data, z_0, labels, of_mean: float = 0.0, of_cov: float = 0.0) -> None:
    """The draws of each class have its mean and covariance, up to squared error `of_mean` and Frechet distance `of_cov`."""
    flat = z_0.flatten(1).double()
    for k, (mean, cov) in enumerate(zip(data.means, data.covs.numpy(), strict=True)):
        own = flat[labels == k]
        error = float(((own.mean(0) - mean) ** 2).sum())
        assert error < of_mean + 4 * np.trace(cov) / len(own), (k, error)
        error = frechet(np.cov(own.T.numpy()), cov)
        assert error < of_cov + 2 * finite_sample_error(cov, len(own)), (k, error)


# ---------------------------------------------------------------- label unknown


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_label_unknown(weights, sampler):
    """Image and label drawn together: class frequencies, the law of the image in each class, and the label tells the class that
    the image shows. `paper` loses some of the spread of E(y) in its last step, see below."""
    frame = kept_timesteps(full_process(weights), "solver80")
    drawn = draw(APART, weights, sampler=sampler, steps=frame if sampler in DETERMINISTIC else 100)
    p = drawn.modalities["label"]
    torch.testing.assert_close(p.sum(1), torch.ones(N, dtype=p.dtype))
    reported, shown = p.argmax(1), APART.nearest(drawn.x_start)
    assert (reported == shown).float().mean() > 0.999
    loses = (
        weights == "paper" and sampler in DETERMINISTIC
    )  # ancestral steps forget it, but for 0.02 of the frequencies
    assert_frequencies(shown, allowed=0.03 if weights == "paper" else 0.0)
    assert_classes(APART, drawn.x_start, reported, of_mean=0.06 if loses else 0.0, of_cov=0.05 if loses else 0.006)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_paper_weights_lose_is_their_last_step(sampler):
    """beta_999 = 0.999 takes alpha-tilde from 0.64 to 0.05 in one step, the largest there is: with more steps the error stays.
    From t = 998 on, starting with labels drawn as often as they are, nothing is lost."""
    full = full_process("paper")
    coefficients = full.aggregation.coefficients["label"]
    assert coefficients[998] > 0.6 and coefficients[999] < 0.06
    label = APART.modality()
    ends = torch.tensor(PROBABILITIES).cumsum(0)[:2]
    label.prior = lambda shape, streams: F.one_hot((streams.uniform()[:, None] >= ends).sum(1), 3).float()
    frame = kept_timesteps(full, "solver80")
    steps = [*(frame if sampler in DETERMINISTIC else space_timesteps(1000, "100"))[:-1], 998]
    drawn = draw(APART, "paper", sampler=sampler, steps=steps, modality=label)
    reported = drawn.modalities["label"].argmax(1)
    assert_frequencies(reported)
    assert_classes(APART, drawn.x_start, reported, of_cov=0.006)


def test_an_uncertain_label_is_reported_as_such():
    """Where images don't show their class, the reported probabilities are those of the class given the image, and their mean the
    class frequencies; the label adds nothing to the law of the image."""
    drawn = draw(OVERLAPPING, "bridge", steps=120)
    p = drawn.modalities["label"]
    ones = torch.ones(N, dtype=torch.float64)
    of_image = OVERLAPPING.components(drawn.x_start, ones, 0 * ones)[0].softmax(1)
    assert float((p - of_image).abs().mean()) < 0.02  # reported from z at t = 0, which is not quite clean
    assert float((p.max(1).values < 0.9).float().mean()) > 0.1
    error = (p.mean(0) - torch.tensor(PROBABILITIES)).abs()
    assert (error < 4 * p.std(0) / N**0.5).all()
    mean = (OVERLAPPING.probabilities[:, None] * OVERLAPPING.means).sum(0)
    spread = OVERLAPPING.means - mean
    cov = torch.einsum("k,kde->de", OVERLAPPING.probabilities, OVERLAPPING.covs + spread[:, :, None] * spread[:, None])
    flat = drawn.x_start.flatten(1).double()
    assert float(((flat.mean(0) - mean) ** 2).sum()) < 4 * float(cov.trace()) / N
    assert frechet(np.cov(flat.T.numpy()), cov.numpy()) < 0.006 + 2 * finite_sample_error(cov.numpy(), N)


def test_label_unknown_and_another_modality_given():
    """Form any: x = z_0 + noise is given to the network and leaves the frame, the label stands in it; image and label follow
    their law given x."""
    noise, x = 0.2, OVERLAPPING.means[1] + 0.1
    eye = noise * torch.eye(12, dtype=torch.float64)
    gain = OVERLAPPING.covs @ torch.linalg.inv(OVERLAPPING.covs + eye)
    means = OVERLAPPING.means + torch.einsum("kde,ke->kd", gain, x - OVERLAPPING.means)
    log_p = torch.distributions.MultivariateNormal(OVERLAPPING.means, OVERLAPPING.covs + eye).log_prob(x)
    p = (OVERLAPPING.probabilities * log_p.exp()) / (OVERLAPPING.probabilities * log_p.exp()).sum()
    given_x = LabelledMixture(p, means, OVERLAPPING.covs - gain @ OVERLAPPING.covs, OVERLAPPING.table)
    names = {"label": "bridge", "x": "paper"}
    full = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights=names)
    network, x = given_x.network(full), x.view(1, *SHAPE).expand(N, *SHAPE)

    def model(z_t, t, modalities):
        assert list(modalities) == ["x"] and modalities["x"] is x
        return network(z_t, t, {})

    modalities = {"label": OVERLAPPING.modality(), "x": ImageModality("x")}
    options = {"known": {"x": x}, "conditioning": "network", "seeds": range(N), "clip_denoised": False}
    process = full.respace(space_timesteps(1000, "100"))
    drawn = sample(model, process, modalities, (N, *SHAPE), **options)
    mean = (p[:, None] * means).sum(0)
    flat = drawn.x_start.flatten(1).double()
    assert float(((flat.mean(0) - mean) ** 2).sum()) < 4 * float(flat.var(0).sum()) / N
    reported = drawn.modalities["label"]
    assert ((reported.mean(0) - p).abs() < 4 * reported.std(0) / N**0.5).all()
    assert p.max() < 0.9 and (p - OVERLAPPING.probabilities).abs().max() > 0.1


# ---------------------------------------------------------------- label known


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("data", [APART, OVERLAPPING], ids=["apart", "overlapping"])
def test_label_known_by_own_head(data, sampler):
    """Form U with Bayes' rule at scale 1 draws the image of the class asked for."""
    drawn = draw(data, "paper", sampler=sampler, steps=100, known={"label": LABELS})
    assert torch.equal(drawn.modalities["label"], LABELS)
    assert_classes(data, drawn.x_start, LABELS, of_cov=0.006)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_label_given_to_the_network(sampler):
    """Form X: nothing stands in the frame, and the network's own conditional mean is used as it is."""
    drawn = draw(OVERLAPPING, "bridge", sampler=sampler, steps=100, known={"label": LABELS}, conditioning="network")
    assert_classes(OVERLAPPING, drawn.x_start, LABELS, of_cov=0.006)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_own_head_is_the_network_that_is_given_the_label(weights, sampler):
    """For a label Bayes' rule is exact at every timestep: sample by sample, form U with its head draws what form X draws, with
    any weights, even the literal ones."""
    options = {"sampler": sampler, "steps": 25, "n": 60, "known": {"label": LABELS[:60]}, "eta": 0.5}
    by_head = draw(OVERLAPPING, weights, **options)
    given = draw(OVERLAPPING, weights, **options, conditioning="network")
    torch.testing.assert_close(by_head.x_start, given.x_start, rtol=1e-4, atol=1e-4)


def test_the_printed_rule_for_a_known_label_fails_as_documented():
    """Algorithm 1 without Bayes' rule: with `paper` the class means are off by more than the spread of a class; with `none` the
    label is ignored."""
    drawn = draw(APART, "paper", known={"label": LABELS}, conditioning="algorithm1")
    flat = drawn.x_start.flatten(1)
    errors = [float(((flat[k == LABELS].mean(0) - mean) ** 2).sum()) for k, mean in enumerate(APART.means)]
    assert min(errors) > float(APART.covs[0].trace())
    ignored = draw(APART, "none", known={"label": LABELS}, conditioning="algorithm1")
    for k in range(3):
        assert_frequencies(APART.nearest(ignored.x_start[k == LABELS]))
    unscaled = draw(APART, "none", known={"label": LABELS}, conditioning_scale=0.0)
    assert torch.equal(unscaled.x_start, ignored.x_start)


# ---------------------------------------------------------------- classifier-free guidance


def guided(data, weights, scale):
    """A form-X network whose output is eps_unconditional + scale (eps - eps_unconditional)."""
    network = data.network(full_process(weights))

    def combined(z_t, t, modalities):
        eps, unconditional = (
            network(z_t, t, modalities).output,
            network(z_t, t, modalities, torch.ones(len(z_t)).bool()).output,
        )
        return ModelOutput(unconditional + scale * (eps - unconditional))

    return combined


@pytest.mark.parametrize("conditioning", ["network", "own-head"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_classifier_free_guidance(scale, sampler, conditioning):
    """The sampler's guided draws are those of a network that combines the two predictions itself, whether the label is given to
    it or stands in the frame; scale 0 is the model without any condition."""
    options = {"sampler": sampler, "steps": 25, "n": 60, "known": {"label": LABELS[:60]}}
    ours = draw(OVERLAPPING, "paper", **options, conditioning=conditioning, guidance_scale=scale)
    theirs = draw(OVERLAPPING, "paper", **options, conditioning="network", model=guided(OVERLAPPING, "paper", scale))
    torch.testing.assert_close(ours.x_start, theirs.x_start, rtol=1e-4, atol=1e-4)
    if scale == 0:
        alone = draw(OVERLAPPING, None, **{**options, "known": None})
        torch.testing.assert_close(ours.x_start, alone.x_start, rtol=1e-4, atol=1e-4)


def test_guidance_strengthens_the_condition():
    """Overlapping classes: the larger the scale, the surer the classifier of what was drawn."""
    sure = []
    for scale in (0.0, 1.0, 3.0):
        drawn = draw(
            OVERLAPPING,
            "paper",
            sampler="ddim",
            steps=25,
            n=600,
            known={"label": LABELS[:600]},
            conditioning="network",
            guidance_scale=scale,
        )
        ones = torch.ones(600, dtype=torch.float64)
        log_p = OVERLAPPING.components(drawn.x_start, ones, 0 * ones)[0].log_softmax(1)
        sure.append(float(log_p.gather(1, LABELS[:600, None]).mean()))
    assert sure[0] < sure[1] < sure[2]


def test_scale_1_asks_for_no_second_prediction():
    """A model that knows nothing of `unconditional` can be sampled: its batch isn't doubled either."""
    network, sizes = OVERLAPPING.network(full_process("paper")), set()

    def model(z_t, t, modalities):
        sizes.add(len(z_t))
        return network(z_t, t, modalities)

    options = {"steps": 5, "n": 7, "known": {"label": LABELS[:7]}}
    plain = draw(OVERLAPPING, "paper", **options, model=model)
    assert sizes == {7}
    assert torch.equal(plain.x_start, draw(OVERLAPPING, "paper", **options, guidance_scale=1.0).x_start)
    with pytest.raises(TypeError, match="unconditional"):
        draw(OVERLAPPING, "paper", **options, model=model, guidance_scale=2.0)


# ---------------------------------------------------------------- an outside classifier


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_by_a_classifier(sampler):
    """The exact gradient of log p(label | y_t) on a model of the images alone draws the images of that class. The shift of eps
    is Bayes' rule: sample by sample the draws of form X. The shift of the mean errs by the size of a step."""
    if sampler == "ddpm":
        guide = classifier_guidance(OVERLAPPING.classifier(full_process(None)), LABELS)
        drawn = draw(OVERLAPPING, None, sampler=sampler, steps=200, cond_fn=guide)
        assert_classes(OVERLAPPING, drawn.x_start, LABELS, of_mean=0.002, of_cov=0.006)
        return
    options = {"sampler": sampler, "steps": 25, "n": 60}
    guide = classifier_guidance(OVERLAPPING.classifier(full_process(None)), LABELS[:60])
    drawn = draw(OVERLAPPING, None, **options, cond_fn=guide)
    given = draw(OVERLAPPING, "none", **options, known={"label": LABELS[:60]}, conditioning="network")
    torch.testing.assert_close(drawn.x_start, given.x_start, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("sigma_small", [True, False])
def test_guidance_by_a_classifier_is_adms(sigma_small, sampler, clip, monkeypatch):
    """The same draws as ADM's own loops, from the same random numbers. With clipping that is true of ancestral steps only: the
    other rules clip z_0 after the gradient, not before."""
    process = create_gaussian_diffusion(noise_schedule="cosine", sigma_small=sigma_small, timestep_respacing="8")
    network, n = APART.network(full_process(None)), 20
    guide = classifier_guidance(APART.classifier(full_process(None)), LABELS[:n], scale=2.0)
    ours = sample(network, process, {}, (n, *SHAPE), sampler=sampler, seeds=range(n), cond_fn=guide, clip_denoised=clip)
    streams = SampleStreams(torch.arange(n))
    noise = streams.normal(*SHAPE)
    monkeypatch.setattr(torch, "randn_like", lambda like: streams.normal(*SHAPE).to(like.dtype))
    loop = process.p_sample_loop if sampler == "ddpm" else process.ddim_sample_loop
    theirs = loop(network, noise.shape, noise=noise, cond_fn=guide, clip_denoised=clip)
    equal = torch.allclose(ours.x_start, theirs, rtol=1e-4, atol=1e-4)
    assert equal is not (clip and sampler == "ddim")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_classifiers_small_error_stays_small(sampler):
    """An error of 0.01 in the gradient is one of 200 in z_0 at t = 999 of the cosine schedule; clipping it there keeps the class
    means where they are (ADM's order: off by 10)."""
    data, n = LabelledMixture.make(SHAPE, PROBABILITIES, seed=0, apart=1.2), 900
    exact, rng = data.classifier(full_process(None)), torch.Generator().manual_seed(0)
    wrong = 0.01 * torch.randn(12, 3, dtype=torch.float64, generator=rng)
    guide = classifier_guidance(lambda y_t, t: exact(y_t, t) + y_t.flatten(1).double() @ wrong, LABELS[:n])
    drawn = draw(data, None, sampler=sampler, steps=25, n=n, cond_fn=guide, clip_denoised=True).x_start.flatten(1)
    for k, mean in enumerate(data.means):
        assert float(((drawn[k == LABELS[:n]].mean(0) - mean) ** 2).sum()) < 0.03 * float(mean.norm() ** 2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_classifiers_gradient_is_not_scaled_by_classifier_free_guidance(sampler):
    """Both at once: where the two predictions agree, guidance between them changes nothing, classifier or not."""
    full = full_process(None)
    network = OVERLAPPING.network(full)
    guide = classifier_guidance(OVERLAPPING.classifier(full), LABELS[:20])
    same = lambda z_t, t, modalities, unconditional=None: network(z_t, t, modalities)  # noqa: E731
    options = {"sampler": sampler, "steps": 10, "n": 20, "model": same, "cond_fn": guide}
    plain, scaled = (draw(OVERLAPPING, None, **options, guidance_scale=scale).x_start for scale in (1.0, 4.0))
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-4)
