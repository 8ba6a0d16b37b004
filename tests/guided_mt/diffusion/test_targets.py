"""What the network predicts, and how its errors are weighted: every target is the same process seen through another output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gaussian import JointGaussian

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.targets import TARGETS, ModelMeanType
from guided_mt.diffusion.weighting import TIMESTEP_WEIGHTS, timestep_weights
from guided_mt.modalities import ImageModality

SHAPE = (3, 2, 2)
FLAGS = {"eps": {}, "x0": {"predict_xstart": True}, "v": {"predict_v": True}}  # ADM's
BY_NAME = {
    name: {"prediction": name} for name, row in TARGETS.items() if row.eps_error is not None and name not in FLAGS
}
OPTIONS = {**FLAGS, **BY_NAME}


def process(target: str, **options) -> GaussianDiffusion:
    return create_gaussian_diffusion(noise_schedule="cosine", **OPTIONS[target], **options)


def predicting(network: Callable, full: GaussianDiffusion) -> Callable:
    """A network that predicts eps, made to predict what `full` wants: the same knowledge through another output."""
    a, b = (torch.from_numpy(c) for c in full.xstart_coefficients())
    abar = torch.from_numpy(full.alphas_cumprod)

    def model(z_t, t, modalities, **options):
        result = network(z_t, t, modalities, **options)
        in_frame = {n: x for n, x in result.predictions.items() if n not in modalities}
        y = z_t - full.aggregation.shift(in_frame, t)
        column = lambda c: c[t].view(-1, 1, 1, 1)  # noqa: E731
        x_start = (y - (1 - column(abar)).sqrt() * result.output) / column(abar).sqrt()
        return ModelOutput((x_start - column(a) * y) / column(b), result.predictions)

    return model


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_wanted_gives_back_z_0(target):
    """xstart(wanted(z_0, eps)) = z_0 at every timestep, by the function and by its coefficients."""
    diffusion = GaussianDiffusion(betas=process("eps", steps=50).betas[:-1], model_mean_type=target)
    t = torch.arange(
        1, diffusion.num_timesteps
    )  # y_{-1} = z_0 holds no noise: at t = 0 ADM's target says nothing of eps
    x_start, noise = torch.randn(2, len(t), *SHAPE, dtype=torch.float64)
    y_t, row = diffusion.q_sample(x_start, t, noise), TARGETS[target]
    wanted = row.wanted(diffusion, x_start, noise, y_t, t)
    torch.testing.assert_close(diffusion.predict_xstart(wanted, y_t, t), x_start, rtol=1e-9, atol=1e-9)
    a, b = (torch.from_numpy(np.asarray(c))[t].view(-1, 1, 1, 1) for c in diffusion.xstart_coefficients())
    torch.testing.assert_close(a * y_t + b * wanted, x_start, rtol=1e-9, atol=1e-9)


def test_the_squared_error_of_eps_is_that_of_the_prediction_times_its_factor():
    full = process("eps", steps=50)
    snr = full.alphas_cumprod / (1 - full.alphas_cumprod)
    for name, row in TARGETS.items():
        if row.eps_error is not None:
            _, b = row.xstart_coefficients(full)
            np.testing.assert_allclose(row.eps_error(snr), snr * np.asarray(b) ** 2, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("target", FLAGS)
def test_a_target_by_its_name_or_by_adms_flags(target):
    assert create_gaussian_diffusion(prediction=target).target is process(target).target is TARGETS[target]
    assert create_gaussian_diffusion(**FLAGS[target], prediction=target).target is TARGETS[target]


def test_names_of_targets_that_contradict_each_other():
    with pytest.raises(ValueError, match="prediction v contradicts predict_xstart"):
        create_gaussian_diffusion(prediction="v", predict_xstart=True)
    with pytest.raises(ValueError, match="unknown prediction 'score'; choose from eps, x0, v, velocity"):
        create_gaussian_diffusion(prediction="score")


def test_v_is_salimans_and_hos():
    diffusion = process("v", steps=50)
    t = torch.arange(50)
    x_start, noise = torch.randn(2, 50, *SHAPE, dtype=torch.float64)
    abar = torch.from_numpy(diffusion.alphas_cumprod).view(-1, 1, 1, 1)
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x_start
    y_t = diffusion.q_sample(x_start, t, noise)
    terms = diffusion.training_losses(lambda x, t: v, x_start, t, noise=noise)
    assert float(terms["loss"].abs().max()) < 1e-20
    eps = diffusion.predict_eps_from_xstart(y_t, t, diffusion.predict_xstart(v, y_t, t))
    torch.testing.assert_close(eps, abar.sqrt() * v + (1 - abar).sqrt() * y_t, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="exclude each other"):
        create_gaussian_diffusion(predict_v=True, predict_xstart=True)


@pytest.mark.parametrize("target", OPTIONS)
def test_losses_in_the_frame_are_those_of_the_target(target):
    """The frame adds nothing to what is wanted: a network that knows the shift has the same loss with it and without."""
    diffusion = process(target, steps=20, mt_weights={"x": "bridge"})
    t, (x_start, noise, encoding) = torch.arange(20), torch.randn(3, 20, *SHAPE, dtype=torch.float64)
    shift = diffusion.aggregation.shift({"x": encoding}, t)
    network = lambda z, t: torch.tanh(z)  # noqa: E731
    inside = diffusion.training_losses(
        lambda z, t: network(z - shift, t), x_start, t, noise=noise, encodings={"x": encoding}
    )
    torch.testing.assert_close(inside["loss"], diffusion.training_losses(network, x_start, t, noise=noise)["loss"])


# ---------------------------------------------------------------- samplers, conditioning, guidance, likelihood


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("target", [name for name in OPTIONS if name != "eps"])
@pytest.mark.parametrize("case", ["unknown", "own-head", "network", "guidance", "classifier"])
def test_every_target_draws_the_same_samples(case, target, sampler):
    """The same knowledge gives the same samples to rounding, with the modality unknown, given, guided and with a classifier."""
    data, drawn = JointGaussian.make(12, seed=2), []
    x = torch.from_numpy(data.draw_x(3, np.random.default_rng(0))).view(3, *SHAPE)
    for name in ("eps", target):
        full = process(name, sigma_small=True, mt_weights={"x": "bridge"})
        given = case in ("network", "guidance")
        eps = process("eps", sigma_small=True, mt_weights={"x": "bridge"})
        best = (data.network_x if given else data.network_u)(eps)
        alone = data.network_u(process("eps", sigma_small=True, mt_weights={"x": "none"}))

        def network(z, t, modalities, unconditional=None, best=best, alone=alone):
            if unconditional is None:
                return best(z, t, modalities)
            output = torch.where(unconditional.view(-1, 1, 1, 1), alone(z, t, {}).output, best(z, t, modalities).output)
            return ModelOutput(output, {"x": modalities["x"]})

        drawn.append(
            sample(
                predicting(network, full),
                full.respace(kept_timesteps(full, "solver12")),
                {"x": ImageModality("x", variance=np.full(1000, 0.3))},
                (3, *SHAPE),
                known={"x": x} if given or case == "own-head" else {},
                sampler=sampler,
                conditioning="network" if given else "own-head",
                guidance_scale=2.0 if case == "guidance" else 1.0,
                cond_fn=(lambda y, t: -0.1 * y) if case == "classifier" else None,
                seeds=range(3),
                clip_denoised=False,
            )
        )
    scale = float(drawn[0].x_start.abs().max())
    torch.testing.assert_close(drawn[1].x_start, drawn[0].x_start, rtol=0, atol=3e-4 * max(1.0, scale))
    torch.testing.assert_close(drawn[1].modalities["x"], drawn[0].modalities["x"], rtol=0, atol=3e-4 * max(1.0, scale))


@pytest.mark.parametrize("target", [name for name in OPTIONS if name != "eps"])
def test_every_target_has_the_same_likelihood(target):
    data, found = JointGaussian.make(12, seed=3), []
    x_start = torch.randn(2, *SHAPE, dtype=torch.float64).clamp(-1, 1)
    for name in ("eps", target):
        full = process(name, sigma_small=True, mt_weights={"x": "none"})
        eps = process("eps", sigma_small=True, mt_weights={"x": "none"})
        network = predicting(data.network_u(eps), full)
        process_of = full.respace(kept_timesteps(full, "20"))
        noise = lambda step: torch.full_like(x_start, 0.1 * (step % 7) - 0.3)  # noqa: E731
        found.append(
            process_of.calc_bpd_loop(
                network, x_start, clip_denoised=False, model_kwargs={"modalities": {}}, noise_fn=noise
            )
        )
    for key, values in found[0].items():
        torch.testing.assert_close(found[1][key], values, rtol=1e-6, atol=1e-9, msg=key)


# ---------------------------------------------------------------- timestep weights


def test_timestep_weights_are_the_published_formulas():
    abar = process("eps").alphas_cumprod
    snr = abar / (1 - abar)
    least = np.minimum(snr, 5)
    for prediction, expected in {"eps": least / snr, "x0": least, "v": least / (snr + 1)}.items():
        np.testing.assert_allclose(timestep_weights("min-snr", abar, prediction), expected, rtol=1e-12)
        np.testing.assert_array_equal(timestep_weights("uniform", abar, prediction), np.ones(1000))
    np.testing.assert_allclose(timestep_weights("p2", abar), 1 / (1 + snr), rtol=1e-12)
    assert timestep_weights("min-snr", np.array([0.5, 0.0]), "v").tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="unknown timestep weights 'p3'"):
        timestep_weights("p3", abar)
    with pytest.raises(ValueError, match="unknown prediction 'score'"):
        timestep_weights("p2", abar, "score")


@pytest.mark.parametrize("name", TIMESTEP_WEIGHTS)
def test_the_same_weighting_whatever_is_predicted(name):
    """Weighted errors of one network are equal through every output; uniform weights mean each output's own error."""
    x_start, noise = torch.randn(2, 20, *SHAPE, dtype=torch.float64)
    t, losses = torch.arange(20), {}
    for target in OPTIONS:
        full = process(target, steps=20, timestep_weights=name)
        network = predicting(lambda z, t, m: ModelOutput(0.3 * z), full)
        terms = full.training_losses(network, x_start, t, noise=noise)
        np.testing.assert_allclose(
            terms["loss"] / terms["mse"], timestep_weights(name, full.alphas_cumprod, target), rtol=1e-9
        )
        losses[target] = terms["loss"]
    if TIMESTEP_WEIGHTS[name] is not None:
        for target in OPTIONS:
            torch.testing.assert_close(losses[target], losses["eps"], rtol=1e-6, atol=1e-12)


def test_weights_multiply_the_image_term_alone_and_uniform_is_today():
    t, (x_start, noise) = torch.arange(20), torch.randn(2, 20, *SHAPE)
    model = lambda z, t: torch.cat([torch.tanh(z), 0.1 * z], dim=1)  # noqa: E731
    plain = process("eps", steps=20, learn_sigma=True).training_losses(model, x_start, t, noise=noise)
    assert torch.equal(plain["loss"], plain["mse"] + plain["vb"])
    weighted = process("eps", steps=20, learn_sigma=True, timestep_weights="p2").training_losses(
        model, x_start, t, noise=noise
    )
    assert torch.equal(weighted["mse"], plain["mse"]) and torch.equal(weighted["vb"], plain["vb"])
    factor = torch.from_numpy(timestep_weights("p2", process("eps", steps=20).alphas_cumprod)).float()
    torch.testing.assert_close(weighted["loss"], factor * plain["mse"] + plain["vb"])
    for options in ({"use_kl": True}, {"timestep_weights": "snr"}):
        with pytest.raises(ValueError, match="timestep weights"):
            process("eps", steps=20, **{"timestep_weights": "p2", **options})
    with pytest.raises(ValueError, match="timestep weights 'p2'"):
        GaussianDiffusion(betas=np.full(3, 0.1), model_mean_type=ModelMeanType.PREVIOUS_X, timestep_weights="p2")
