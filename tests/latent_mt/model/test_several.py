"""One latent model of three sides, a label and a masked image: every subset given, every side as z_0, what the network is told."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tiny_latent import DIT, LATENT, random_model
from tiny_tasks import SIDES
from torch import nn

from guided_mt.diffusion.network import ModelOutput
from guided_mt.errors import UserError
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig

B, CLASSES, STEPS = 2, 3, 2
LATENTS = (B, 4, LATENT, LATENT)
NAMES = [*SIDES, "label", "masked"]
SEVERAL = {
    "mt_sides": SIDES,
    "mt_tasks": {"label": {"num_classes": CLASSES}, "masked": {}},
    "mt_swap_prob": 0.5,
    "mt_weights": "bridge",
}
SUBSETS = [names for count in range(len(NAMES) + 1) for names in combinations(NAMES, count) if not {*SIDES} <= {*names}]


class Recorder(nn.Module):
    """A model's network that keeps the calls of it: (modalities, options)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.diffusion_model, self.calls = inner, inner.diffusion_model, []

    def forward(self, z_t, timesteps, modalities, **options) -> ModelOutput:
        self.calls.append((dict(modalities), options))
        return self.inner(z_t, timesteps, modalities, **options)


def recorded(**params) -> tuple[LatentGenerator, Recorder]:
    model = random_model(**{**SEVERAL, **params})
    model.requires_grad_(False)
    model.model = recorder = Recorder(model.model)
    return LatentGenerator(model), recorder


@pytest.fixture(scope="module", params=["any", "U", "any of a DiT", "U of a DiT"])
def several(request) -> tuple[LatentGenerator, Recorder]:
    network = {"unet_config": {"target": "models.DiT", "params": DIT}} if "DiT" in request.param else {}
    return recorded(mt_variant=request.param.split()[0], **network)


def values(names) -> dict[str, torch.Tensor]:
    """{name: what can be given} of these."""
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randn(LATENTS, generator=draw) for name in NAMES}
    made["label"] = torch.tensor([2, 0])
    return {name: made[name] for name in names}


def make(generator: LatentGenerator, given, target: str = "", absent=()) -> dict[str, torch.Tensor]:
    settings = LatentSampleConfig(steps=STEPS)
    return generator.made_from(values(given), range(B), settings, target=target, absent=absent)


def complaint(generator: LatentGenerator, given, target: str = "", absent=()) -> str:
    with pytest.raises(UserError) as caught:
        make(generator, given, target, absent)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400
    return text


@pytest.mark.parametrize("given", SUBSETS, ids=lambda names: "+".join(names) or "nothing")
def test_every_subset_given_and_every_side_as_z_0(several, given):
    generator, recorder = several
    open_sides = [side for side in SIDES if side not in given]
    for target in ["", *open_sides]:
        recorder.calls.clear()
        made, known = make(generator, given, target), values(given)
        assert made.keys() == {*NAMES}
        for name, x in made.items():
            if name in known:
                assert torch.equal(x, known[name]), name
            else:
                assert x.shape == ((B, CLASSES) if name == "label" else LATENTS) and torch.isfinite(x).all(), name
                assert name != "label" or torch.allclose(x.sum(1), torch.ones(B))

        role = SIDES.index(target or open_sides[0])
        # In role k the photo stands in the place of side k.
        places = {side: SIDES[role] if side == "photo" else side for side in given}
        assert len(recorder.calls) == STEPS
        for modalities, options in recorder.calls:
            assert set(options["y"].tolist()) == {role} and options.keys() == {"y"}
            assert modalities.keys() == ({*places.values()} if generator.gives else set())
            for name, place in places.items():
                assert not generator.gives or torch.equal(modalities[place], known[name])


def test_what_is_given_counts(several):
    """z_0 of one seed is another for each subset given, and the same again for the same."""
    generator, _ = several
    drawn = [make(generator, given, "photo")["photo"] for given in SUBSETS if "photo" not in given]
    assert all(not torch.equal(a, b) for a, b in combinations(drawn, 2))
    assert torch.equal(make(generator, ["map", "label"])["photo"], make(generator, ["label", "map"])["photo"])


def test_training_tells_the_role_and_gives_by_place():
    """Each role occurs as often as mt_swap_prob says, the sides being alike; the modality in its place holds the photo."""
    roles = recorded(mt_swap_prob={"map": 0.1, "edges": 0.4})[0].roles
    assert roles.sides == tuple(SIDES) and roles.slots == ("map", "edges")
    assert roles.shares == (0.1, 0.4) and recorded()[0].roles.shares == (0.25, 0.25)
    assert [roles.names(k) for k in range(3)] == [
        {"map": "map", "edges": "edges"},
        {"map": "photo", "edges": "edges"},
        {"map": "map", "edges": "photo"},
    ]


# ---------------------------------------------------------------- what is refused


def test_what_cant_be_made(several):
    generator, _ = several
    assert "nothing is left to draw: photo, map, edges are all given; leave one" in complaint(generator, SIDES)
    assert "'map' is given, so it can't be drawn" in complaint(generator, ["map"], "map")
    assert "'mpa' is no image of this model (did you mean map?)" in complaint(generator, [], "mpa")
    assert "'label' is no image of this model; it has photo, map, edges" in complaint(generator, [], "label")


@pytest.mark.parametrize(("swap", "trained"), [(0.0, ["photo"]), ({"map": 0.5}, ["photo", "map"]), (1.0, SIDES[1:])])
def test_what_was_never_z_0(swap, trained):
    generator, _ = recorded(mt_swap_prob=swap, mt_variant="any")
    for target in SIDES:
        given = [side for side in SIDES if side != target]
        if target in trained:
            assert make(generator, given).keys() == {*NAMES}
        else:
            text = complaint(generator, given)
            assert f"to generate {target} from {', '.join(given)}: z_0 was always {', '.join(trained)} (mt_swap" in text
            assert complaint(generator, [], target).startswith("this model was not trained to generate")


def test_form_x_is_given_every_side():
    generator, recorder = recorded(mt_variant="X")
    assert make(generator, ["map", "edges", "masked"]).keys() == {*NAMES}  # a label at random
    assert all(modalities.keys() == {*NAMES} - {"photo"} for modalities, _ in recorder.calls)
    assert "this form-X model was always given edges: name it with --given" in complaint(generator, ["map"])
    assert "this form-X model was always given photo" in complaint(generator, ["map"], "edges")


# ---------------------------------------------------------------- absent ones


ABSENT = {"mt_sides": SIDES, "mt_tasks": {"map": {"absent": True}, "label": {"num_classes": CLASSES, "absent": True}}}


@pytest.mark.parametrize("variant", ["any", "U"])
def test_absent_ones_are_told_and_not_made(variant):
    generator, recorder = recorded(mt_variant=variant, **ABSENT)
    made = make(generator, ["photo"], absent=["map", "label"])  # so that it is the edges that are made
    assert made.keys() == {"photo", "edges"}
    for _, options in recorder.calls:
        assert set(options["y"].tolist()) == {2}
        assert {name: mask.tolist() for name, mask in options["absent"].items()} == {
            name: [True] * B for name in ("map", "label")
        }
    assert make(generator, ["edges"], "photo", absent=["map"]).keys() == {*SIDES, "label"} - {"map"}
    assert "'map' is to be absent, so it can't be drawn" in complaint(generator, [], "map", absent=["map"])
    assert "'map' is to be absent, so it can't be given" in complaint(generator, ["map"], absent=["map"])
    assert "photo, map, edges are all given or absent; leave one" in complaint(
        generator, ["photo", "edges"], absent=["map"]
    )


# ---------------------------------------------------------------- checkpoints


def keys(**params) -> set[str]:
    return {name.removeprefix("model.diffusion_model.") for name in random_model(**params).state_dict()}


@pytest.mark.parametrize("variant", ["any", "U", "X"])
def test_a_pair_has_the_entries_it_always_had(variant):
    """So that its checkpoints of every version load."""
    own = keys(mt_sides=["photo", "map"], mt_variant=variant) - keys(mt_sides=[], mt_swap_prob=0.0)
    tracked = ["paired", "paired_swapped"] if variant == "U" else ["paired"]
    assert own == {
        "label_emb.weight",
        *(f"heads.paired.out.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
        *(f"head_variance.{name}.error_{part}" for name in tracked for part in ("sum", "count")),
        *(["condition_in.weight"] if variant != "U" else []),
    }
