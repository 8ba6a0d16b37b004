"""Three images of the same thing in one latent model: every one of them as z_0, any of the others given, against the exact law."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from gaussian import SeveralGaussians, frechet
from test_latent_model import IDENTITY, PIXEL_UNET, build, unet
from test_samplers import finite_sample_error
from torch import nn

from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.modalities import Roles
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig

SIDES = ("photo", "map", "edges")
SHAPE, D, N = (3, 2, 2), 12, 1500
DATA = SeveralGaussians.make(3, D, seed=3)


class Exact(nn.Module):
    def __init__(self, network: nn.Module, best):
        super().__init__()
        self.diffusion_model, self.best = network, best

    def forward(self, z_t, t, modalities, y):
        return self.best(z_t, t, modalities, y)


@pytest.fixture(scope="module")
def generator() -> LatentGenerator:
    small = {**PIXEL_UNET, "image_size": 2, "channel_mult": [1], "attention_resolutions": []}
    model = build(
        timesteps=1000, linear_start=0.0015, linear_end=0.0195, image_size=2, channels=3, first_stage_config=IDENTITY,
        unet_config=unet(**small), mt_variant="any", mt_sides=list(SIDES), mt_swap_prob={"map": 0.3, "edges": 0.3},
        mt_tasks={"map": {"weights": "bridge"}, "edges": {"weights": "late"}},
    )  # fmt: skip
    slots = [{name: SIDES.index(side) for name, side in model.roles.names(role).items()} for role in range(3)]
    model.model = Exact(model.network, DATA.network(model.diffusion, slots))
    return LatentGenerator(model)


GIVEN = [known for count in range(3) for known in combinations(SIDES, count)]
CASES = [(target, known) for target in SIDES for known in GIVEN if target not in known]


@pytest.mark.parametrize("target, known", CASES, ids=[f"{target}-of-{'-'.join(known)}" for target, known in CASES])
def test_every_side_from_any_others(generator, target, known):
    """Mean and covariance of the drawn side given the known ones; a side that is neither is estimated from all that is there."""
    given = [SIDES.index(name) for name in known]
    values = [torch.from_numpy(x).float().view(N, *SHAPE) for x in DATA.draw(N, seed=0)]
    made = generator.made_from(
        {SIDES[k]: values[k] for k in given}, range(N), LatentSampleConfig(steps=60), target=target
    )
    assert set(made) == set(SIDES) and all(torch.equal(made[SIDES[k]], values[k]) for k in given)
    gain, cov = DATA.given(SIDES.index(target), given)
    z = made[target].flatten(1).double().numpy()
    seen = np.concatenate([values[k].flatten(1).numpy() for k in given] or [np.zeros((N, 0))], axis=1).astype(float)
    fitted = np.linalg.lstsq(seen, z, rcond=None)[0].T if given else gain
    off = (fitted - gain) @ DATA.block(given, given) @ (fitted - gain).T if given else np.zeros((1, 1))
    assert np.trace(off) - np.trace(cov) * D * len(given) / N < 0.02
    residual = z - seen @ fitted.T
    assert frechet(residual.T @ residual / N, cov) - finite_sample_error(cov, N) < 0.03
    for name in set(SIDES) - {target, *known}:
        all_seen = [SIDES.index(target), *given]
        estimate = np.concatenate([z, seen], axis=1) @ DATA.given(SIDES.index(name), all_seen)[0].T
        error = made[name].flatten(1).double().numpy() - estimate
        assert (error**2).sum(1).mean() < 0.02 * np.trace(DATA.block([0], [0]))


def test_without_a_target_the_first_open_side_is_drawn(generator):
    assert (
        generator.role_for([]) == 0 and generator.role_for(["photo"]) == 1 and generator.role_for(["photo", "map"]) == 2
    )
    with pytest.raises(UserError, match=r"nothing is left to draw: photo, map, edges are all given"):
        generator.role_for(SIDES)
    with pytest.raises(UserError, match=r"'map' is given, so it can't be drawn"):
        generator.role_for(["map"], "map")
    with pytest.raises(UserError, match=r"'mpa' is no image of this model .did you mean map"):
        generator.role_for([], "mpa")


# ---------------------------------------------------------------- roles


def test_roles_are_drawn_as_often_as_they_are_to_be():
    roles = Roles(SIDES, ("map", "edges"), (0.2, 0.5))
    drawn = roles.draw(SampleStreams(torch.arange(20_000)))
    shares = np.bincount(drawn, minlength=3) / 20_000
    np.testing.assert_allclose(shares, [0.3, 0.2, 0.5], atol=0.015)
    assert roles.trained == (0, 1, 2) and roles.told
    assert Roles(SIDES, ("map", "edges"), (0.0, 1.0)).trained == (2,)
    assert not Roles(SIDES, ("map", "edges"), (0.0, 1.0)).told and Roles().trained == (0,)


def test_a_role_exchanges_the_image_with_a_side():
    roles, role = Roles(SIDES, ("map", "edges"), (0.3, 0.3)), torch.tensor([0, 1, 2, 2])
    photo, maps, edges = (torch.full((4, 1, 1, 1), value) for value in (1.0, 2.0, 3.0))
    z_0, data = roles.exchange(photo, {"map": maps, "edges": edges, "label": role}, role)
    assert z_0.flatten().tolist() == [1, 2, 3, 3]
    assert data["map"].flatten().tolist() == [2, 1, 2, 2] and data["edges"].flatten().tolist() == [3, 3, 1, 1]
    assert data["label"] is role
    lacking = {"edges": torch.tensor([True, True, False, True])}
    assert roles.possible(role, lacking).tolist() == [0, 1, 0, 2]
