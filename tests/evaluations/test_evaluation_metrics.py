"""The formulas of scores/metrics.py: reference values, definitions written out, and what must not change the numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluations.errors import EvaluationError
from evaluations.evaluator import frechet_distance, inception_score, precision_recall
from evaluations.features.moments import Moments, statistics
from evaluations.scores import manifolds


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) / np.sqrt(width)
    return (rng.standard_normal((count, width)) @ mix + shift).astype(np.float32)


def fid(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(*statistics(a), *statistics(b))


@pytest.fixture(scope="module")
def oracle():
    from conftest import GOLDEN

    with np.load(GOLDEN / "evaluator_metrics.npz") as arrays:
        return json.loads((GOLDEN / "evaluator_metrics.json").read_text())["values"], dict(arrays)


def test_frechet_distances_are_adms(oracle):
    values, arrays = oracle
    assert fid(arrays["ref"], arrays["sample"]) == pytest.approx(values["fid"], rel=1e-7)
    assert fid(arrays["ref_spatial"], arrays["sample_spatial"]) == pytest.approx(values["sfid"], rel=1e-7)


def test_inception_score_is_adms(oracle):
    values, arrays = oracle
    score = inception_score(arrays["sample"], arrays["softmax_weight"], split_size=values["inception_split"])
    assert score == pytest.approx(values["inception_score"], rel=1e-6)


@pytest.mark.parametrize("block", [64, 333, 4096])
def test_precision_and_recall_are_adms(oracle, block):
    values, arrays = oracle
    found = precision_recall(arrays["ref"], arrays["sample"], block=block)
    assert tuple(found) == (values["precision"], values["recall"])
    assert tuple(found) == (values["precision_fp16_original"], values["recall_fp16_original"])


def test_frechet_distance_of_gaussians_that_commute():
    mu, a, b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.0, 1.0])
    expected = mu @ mu + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, abs=1e-12)


def test_frechet_distance_equals_the_matrix_root():
    (mu1, s1), (mu2, s2) = statistics(features(300, 20, 0)), statistics(features(200, 20, 1, shift=0.3))
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(root).real
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("decades", [0, 2, 4, 6, 9, 14])
def test_frechet_distance_keeps_its_digits_whatever_the_condition(decades):
    """Covariances in one basis, so the distance is known, with eigenvalues over many powers of ten."""
    rng = np.random.default_rng(decades)
    basis = np.linalg.qr(rng.standard_normal((150, 150)))[0]
    a, b = (np.logspace(0, -decades, 150) * rng.uniform(0.5, 2, 150) for _ in range(2))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(np.zeros(150), basis * a @ basis.T, np.zeros(150), basis * b @ basis.T)
    assert found == pytest.approx(expected, abs=1e-11 * (a.sum() + b.sum()))


@pytest.mark.parametrize("count", [20, 400])  # fewer and more images than features
def test_frechet_distance_is_a_distance(count):
    a, b = features(count, 40, 2), features(count + 7, 40, 3, shift=0.2)
    scale = np.trace(statistics(a).sigma)
    assert fid(a, a) < 1e-10 * scale
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-10)
    order = np.random.default_rng(0).permutation(count)
    assert fid(a[order], b) == pytest.approx(fid(a, b), rel=1e-9)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert fid(wide_a @ turn, wide_b @ turn) == pytest.approx(fid(wide_a, wide_b), rel=1e-9)
    assert fid(a, b) > 1e-3 * scale


def test_inception_score_of_certain_and_of_ignorant_networks():
    classes = 10
    certain = np.eye(classes, dtype=np.float32)[np.arange(200) % classes]
    assert inception_score(certain, 1e4 * np.eye(classes)) == pytest.approx(classes)  # probabilities underflow to 0
    assert inception_score(certain, np.zeros((classes, classes))) == pytest.approx(1)


def test_inception_score_averages_consecutive_splits():
    x, weight = features(250, 16, 4), features(16, 12, 5)
    splits = [inception_score(x[i : i + 100], weight) for i in (0, 100, 200)]
    assert inception_score(x, weight, split_size=100) == pytest.approx(np.mean(splits), rel=1e-12)


def slow_precision_recall(reference, samples, k):
    """The definition, by full distance matrices."""

    def distances(a, b):
        return np.linalg.norm(a[:, None].astype(np.float64) - b[None].astype(np.float64), axis=-1)

    def covered(points, members):
        radii = np.sort(distances(members, members), axis=1)[:, k]  # column 0 is the point itself
        return (distances(points, members) <= radii).any(axis=1).mean()

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_definition(k):
    a, b = features(150, 6, 6), features(90, 6, 7, shift=0.5)
    found = precision_recall(a, b, k=k, block=32)
    assert tuple(found) == slow_precision_recall(a, b, k)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1


def test_precision_and_recall_swap_with_the_sets_and_are_one_for_a_set_itself():
    a, b = features(200, 8, 8), features(170, 8, 9, shift=0.4)
    there, back = precision_recall(a, b, block=64), precision_recall(b, a, block=64)
    assert tuple(there) == tuple(back)[::-1]
    assert tuple(precision_recall(a, a)) == (1.0, 1.0)


def test_copies_of_one_image_are_at_distance_zero():
    """Five copies of each point: every radius is zero, so nothing but a copy is covered, far from the origin too."""
    points = features(40, 2048, 10, shift=30.0)
    copies, others = np.repeat(points[:30], 5, axis=0), np.repeat(points[20:], 5, axis=0)
    for block in (7, 64, 4096):
        assert tuple(precision_recall(copies, others, block=block)) == (0.5, pytest.approx(1 / 3))


@pytest.mark.parametrize("size", [2, 12, 60])
def test_points_too_close_for_float32_are_told_apart(size):
    """Tight clusters far from each other, of more members than there are candidates: float32 products see only noise."""
    rng = np.random.default_rng(size)
    centres = 100 * rng.standard_normal((240 // size, 32))
    a, b = (np.repeat(centres, size, axis=0) + 1e-3 * rng.standard_normal((240, 32)) for _ in range(2))
    found = precision_recall(a, b, k=2, block=50)
    assert tuple(found) == slow_precision_recall(a, b, 2)
    assert size == 2 or 0 < found.recall < 1


@pytest.mark.parametrize("against", ["others", "themselves"])
def test_samples_that_are_all_alike(against, monkeypatch):
    """A collapsed model: float32 leaves all pairs open, so the work must go to float64 products, not to pairs of differences."""
    rng = np.random.default_rng(0)
    alike = (5 * rng.standard_normal(64) + 0.002 * rng.standard_normal((500, 64))).astype(np.float32)
    other = alike[::-1] + 0.0005 * rng.standard_normal((500, 64)).astype(np.float32)
    reference = rng.standard_normal((300, 64)).astype(np.float32) if against == "others" else other
    pairs = []
    exact = manifolds.Points.exact
    monkeypatch.setattr(manifolds.Points, "exact", lambda *args: pairs.append(len(args[1])) or exact(*args))
    monkeypatch.setattr(manifolds, "MOST_OPEN", 1000)
    found = precision_recall(reference, alike, block=200)
    assert tuple(found) == slow_precision_recall(reference, alike, 3)
    assert sum(pairs) < 60 * 500  # of 250,000


def test_a_sample_that_is_a_neighbour_lies_on_the_sphere_itself():
    """The radius of x is the distance to its neighbour; a sample equal to that neighbour is within it, exactly."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((400, 64)).astype(np.float32)
    distances = np.linalg.norm(reference[:, None] - reference[None], axis=-1)
    third = np.argsort(distances, axis=1)[:, 3]
    assert precision_recall(reference, reference[third], block=100).precision == 1


def test_moments_are_numpys_whatever_the_batches():
    x = features(700, 9, 11, shift=100.0)
    for chunk in (64, 2048):
        results = []
        for batch in (1, 7, 64, 700):
            moments = Moments(chunk)
            for start in range(0, len(x), batch):
                moments.update(x[start : start + batch])
            results.append(moments.statistics())
        for mu, sigma in results:
            np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-13)
            np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(sigma, results[0].sigma)


def test_features_may_be_tensors_or_arrays():
    a, b = features(30, 4, 12), features(30, 4, 13)
    assert precision_recall(torch.as_tensor(a), torch.as_tensor(b)) == precision_recall(a, b)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda x: precision_recall(x[:3], x), "at least 4 images"),
        (lambda x: precision_recall(x, x[:, :2]), r"\[50, 4\] and \[50, 2\]"),
        (lambda x: precision_recall(x * np.nan, x), "not finite"),
        (lambda x: inception_score(x, np.zeros((3, 5))), "weights"),
        (lambda x: frechet_distance(np.zeros(4), np.eye(3), np.zeros(4), np.eye(3)), r"\[3, 3\]"),
        (lambda x: frechet_distance(np.zeros(2), np.eye(2) / 0.0, np.zeros(2), np.eye(2)), "not finite"),
        (lambda x: statistics(x[:1]), "at least two"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_what_cannot_be_computed_is_said(call, hint):
    with pytest.raises(EvaluationError, match=hint):
        call(features(50, 4, 14))
