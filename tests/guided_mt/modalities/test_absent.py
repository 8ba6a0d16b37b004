"""Samples that lack a modality: a third state beside given and open, for the frame, the loss, the network and sampling."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mixture import APART, LABELS, SHAPE, N, assert_classes, assert_frequencies, draw, full_process
from test_samplers import SOUND_WEIGHTS
from tiny import DIGITS, flags, negatives, progress, words

from guided_mt.commands import nll, sample, train
from guided_mt.data import open_source
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.errors import UserError
from guided_mt.modalities import ImageModality, Images, VectorModality
from guided_mt.networks.heads import ImageHead, PooledHead
from guided_mt.networks.model import VARIANTS, MTModel
from guided_mt.training.objective import multi_task_losses


class Known(ImageModality):
    """x = -x_start, which some samples lack."""

    def from_batch(self, images, streams):
        return -images.x_start

    def present(self, images):
        return images.present.get(self.name)


class Recorder:
    """Keeps what the network is shown, and predicts zeros."""

    def __call__(self, z_t, t, modalities, **options):
        self.z_t, self.t, self.data, self.options = z_t, t, modalities, options
        return ModelOutput(torch.zeros_like(z_t), dict.fromkeys(("a", "b"), torch.zeros_like(z_t)))


def losses_of(variant: str, lacking: dict[str, torch.Tensor], **options):
    """(losses, what the network saw, process, x_start, noise) of 16 samples with two modalities."""
    rng = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(16, *SHAPE, generator=rng, dtype=torch.float64) for _ in range(2))
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", mt_weights={"a": "bridge", "b": "constant"})
    modalities, model = {name: Known(name) for name in "ab"}, Recorder()
    images = Images(x_start, present={name: ~mask for name, mask in lacking.items()})
    t, streams = torch.arange(16) * 60 + 20, SampleStreams(torch.arange(16))
    found = multi_task_losses(model, diffusion, modalities, images, t, noise, streams, variant=variant, **options)
    return found, model, diffusion, x_start, noise


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_absent_is_in_no_frame_has_no_loss_and_is_told(variant):
    lacking = {"a": torch.arange(16) % 2 == 0, "b": torch.arange(16) % 3 == 0}
    found, model, diffusion, x_start, noise = losses_of(variant, lacking)
    y_t = diffusion.q_sample(x_start, model.t, noise)
    frame = torch.zeros_like(y_t)
    given = model.options.get("given", dict.fromkeys("ab", torch.zeros(16, dtype=torch.bool)))
    for name, missing in lacking.items():
        inside = torch.zeros_like(missing) if variant == "X" else ~missing & ~given[name]
        shift = diffusion.aggregation.shift({name: -x_start}, model.t)
        frame = frame + torch.where(inside.view(-1, 1, 1, 1), shift, 0.0)
        assert not (given[name] & missing).any()
        assert torch.equal(model.options["absent"][name], missing)
        assert torch.equal(found.taught[name], (~missing).double())
        assert not (found.predicted[name].bool() & missing).any()
    torch.testing.assert_close(model.z_t, y_t + frame)
    of_each = torch.stack([found.taught[name] * found.terms[name] for name in "ab"]).sum(0)
    torch.testing.assert_close(found.loss, found.denoising + 0.1 * of_each)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_is_trained_as_if_all_were_like_it(variant):
    """In every combination of what is there, each sample sees and loses what it would in data that all lack the same."""
    lacks = list(product([False, True], repeat=2)) * 4
    mixed = {name: torch.tensor([row[k] for row in lacks]) for k, name in enumerate("ab")}
    found, model, *_ = losses_of(variant, mixed)
    for row in set(lacks):
        alike, other, *_ = losses_of(variant, {name: torch.full((16,), row[k]) for k, name in enumerate("ab")})
        same = torch.tensor([lack == row for lack in lacks])
        assert torch.equal(found.loss[same], alike.loss[same]) and torch.equal(model.z_t[same], other.z_t[same])


# ---------------------------------------------------------------- the exact network


@pytest.mark.parametrize("weights", SOUND_WEIGHTS)
def test_what_is_drawn_without_a_label_has_the_law_of_all_images(weights):
    drawn = draw(APART, weights, steps=100, absent=["label"])
    assert drawn.modalities == {}
    shown = APART.nearest(drawn.x_start)
    assert_frequencies(shown)
    assert_classes(APART, drawn.x_start, shown, of_cov=0.006)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_network_has_to_be_told(share):
    """A random part of the samples lacks its label. Told which, the best network of each part is the best of both; the best for
    samples with a label, not told, is wrong for the others, whose z_t stand in another frame."""
    full, rng = full_process("bridge"), torch.Generator().manual_seed(0)
    normal = torch.randn(N, 12, generator=rng, dtype=torch.float64)
    roots = torch.linalg.cholesky(APART.covs)
    x_start = (APART.means[LABELS] + torch.einsum("nde,ne->nd", roots[LABELS], normal)).view(N, *SHAPE)
    noise, t = torch.randn(N, *SHAPE, generator=rng, dtype=torch.float64), torch.arange(N) % 1000
    missing = torch.rand(N, generator=rng) < share
    label, exact = APART.modality(), APART.network(full)
    label.partly = True

    def eps_loss(model, labels):
        images, streams = Images(x_start, labels), SampleStreams(torch.arange(N))
        return multi_task_losses(model, full, {"label": label}, images, t, noise, streams).denoising

    told = eps_loss(exact, LABELS.where(~missing, -1))
    with_label, without = eps_loss(exact, LABELS), eps_loss(exact, torch.full_like(LABELS, -1))
    torch.testing.assert_close(told, torch.where(missing, without, with_label))
    not_told = eps_loss(lambda z, t, given, absent=None: exact(z, t, given), LABELS.where(~missing, -1))
    assert float(not_told[missing].mean()) > 1.5 * float(told[missing].mean())
    assert torch.equal(not_told[~missing], told[~missing])


# ---------------------------------------------------------------- the network


def network(variant: str, lacking=("photo",)) -> MTModel:
    torch.manual_seed(0)
    made = MTModel(
        image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(1,),
        channel_mult=(1,), num_heads=2, use_scale_shift_norm=True, context_dim=16,
        heads={"photo": lambda backbone: ImageHead(backbone), "label": lambda backbone: PooledHead(backbone, 4)},
        image_inputs={"photo": 3},
        token_inputs={"label": lambda width: torch.nn.Sequential(torch.nn.Embedding(4, width), torch.nn.Unflatten(1, (1, width)))},
        variant=variant,
        lacking=lacking,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return made.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_is_a_state_of_its_own_for_each_sample(variant):
    """Open, given and absent give three outputs; a batch of mixed samples gives what each gives alone."""
    model, rng = network(variant), torch.Generator().manual_seed(1)
    z, t = torch.randn(4, 3, 8, 8, generator=rng), torch.tensor([3, 300, 600, 900])
    data = {"photo": torch.randn(4, 3, 8, 8, generator=rng), "label": torch.arange(4)} if variant != "U" else {}
    for name in ("photo", "label"):
        shown = model(z, t, data).output
        hidden = model(z, t, data, absent={name: torch.ones(4, dtype=torch.bool)}).output
        assert not torch.isclose(shown, hidden).flatten(1).all(1).any()
        if variant == "any":
            given = {name: torch.zeros(4, dtype=torch.bool)}
            left_open = model(z, t, data, given=given).output
            assert not torch.isclose(left_open, hidden).flatten(1).all(1).any()
        some = torch.tensor([True, False, False, True])
        mixed = model(z, t, data, absent={name: some}).output
        torch.testing.assert_close(mixed, torch.where(some.view(-1, 1, 1, 1), hidden, shown), rtol=1e-4, atol=1e-5)


def test_a_network_that_can_not_be_told_says_so():
    model = network("U", lacking=())
    with pytest.raises(ValueError, match=r"can't be told that photo is absent; it can of label"):
        model(torch.zeros(1, 3, 8, 8), torch.tensor([3]), {}, absent={"photo": torch.ones(1, dtype=torch.bool)})


def test_without_absent_data_the_entries_are_those_of_before():
    for variant, channels in (("U", 0), ("X", 3), ("any", 4)):
        plain, told = network(variant, lacking=()), network(variant)
        assert plain.condition_channels == channels
        assert told.condition_channels == (channels if variant == "any" else channels + 1)


# ---------------------------------------------------------------- real runs


def test_vectors_that_are_missing(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    vectors[2] = np.nan
    np.savez(tmp_path / "v.npz", v=vectors)
    modality = VectorModality("v", 5, str(tmp_path / "v.npz"))
    source = open_source("builtin:digits")
    with pytest.raises(UserError, match=r"has 4 vectors for the 1437 images"):
        modality.prepare(source)
    images = Images(torch.zeros(4, 3, 8, 8), loaded={"v": torch.from_numpy(vectors)})
    modality.partly = True
    assert modality.present(images).tolist() == [True, True, False, True]
    assert modality.from_batch(images, SampleStreams(torch.arange(4))).isfinite().all()
    vectors[3, 1] = np.nan
    np.savez(tmp_path / "v.npz", v=vectors)
    with pytest.raises(UserError, match=r"not finite, first in row 3; a vector that is missing is a row of NaN"):
        modality.prepare(source)


@pytest.fixture(scope="module")
def partly(tmp_path_factory) -> Path:
    """Digits of which a third has no class and another part no negative."""
    folder = tmp_path_factory.mktemp("partly")
    source = open_source("builtin:digits")
    images = np.stack([source.read(i) for i in range(DIGITS)])
    labels = np.where(np.arange(DIGITS) % 3 == 0, -1, source.labels)
    np.savez(folder / "digits.npz", arr_0=images[labels >= 0], arr_1=labels[labels >= 0])
    np.savez(folder / "more.npz", arr_0=images[labels < 0])
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_data_with_different_annotations_train_one_model(variant, partly, tmp_path, capsys):
    """Two --data_dir, one of them without classes, and a --paired_dir that lacks some: what each image has is learned."""
    settings = {
        "mt_task": "label,paired", "mt_variant": variant, "num_classes": 10, "log_dir": tmp_path / "run",
        "data_dir": f"{partly / 'digits.npz'},{partly / 'more.npz'}", "paired_dir": negatives(partly, left_out=300),
        "total_steps": 3, "save_interval": 3, "sample_interval": 3,
    }  # fmt: skip
    train.main(flags(**settings))
    assert "# mt_absent label,paired: some of the images have none" in capsys.readouterr().out
    assert all(np.isfinite(float(row["loss"])) for row in progress(tmp_path / "run"))
    source = f"{partly / 'digits.npz'},{partly / 'more.npz'}"
    bound = words(model_path=tmp_path / "run", data_dir=source, num_samples=1437, timestep_respacing=1, batch_size=512)
    nll.main([*bound, "--out", str(tmp_path / "nll.npz"), "--device", "cpu"])
    with np.load(tmp_path / "nll.npz") as file:
        assert np.isnan(file["L2_label"]).sum() == 479 and np.isfinite(file["total_bpd"]).all()
        assert 0 < np.isnan(file["L2_paired"]).sum() < 1437
    out = tmp_path / "out.npz"
    drawn = words(model_path=tmp_path / "run", out=out, num_samples=3, steps=2, device="cpu", absent="paired,label")
    if variant != "X":
        sample.main(drawn)
        with np.load(out) as file:
            assert file.files == ["arr_0"]
    with pytest.raises(UserError, match=r"--absent labl: this model has no such modality .did you mean label"):
        sample.main([*drawn[:-1], "labl"])


def test_what_was_declared_has_to_hold(partly, tmp_path):
    settings = {"mt_task": "label", "num_classes": 10, "log_dir": tmp_path / "run", "mt_absent": "masked"}
    with pytest.raises(UserError, match=r"--mt_absent masked: --mt_task label has no 'masked'"):
        train.main(flags(**settings))
