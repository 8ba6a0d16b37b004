"""Other images of the same thing in pixel space: `--mt_task paired --paired_dir masks.zip`, several of them, and any as z_0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import column, flags, negatives, words

from guided_mt.commands import nll, sample, train
from guided_mt.data import open_source
from guided_mt.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paired")


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """Digits with their negatives and themselves, any of the three z_0."""
    settings = {
        "mt_task": "negative:paired,same:paired,label", "paired_dir": f"negative={negatives(folder)},same=builtin:digits",
        "mt_variant": "any", "mt_swap_prob": "negative=0.3,same=0.3", "num_classes": 10, "log_dir": folder / "run",
        "mt_weights": "negative=bridge", "total_steps": 2, "sample_interval": 2,
    }  # fmt: skip
    train.main(flags(**settings))
    return folder / "run"


def drawn(run: Path, out: Path, **values) -> dict[str, np.ndarray]:
    sample.main(words(model_path=run, out=out, num_samples=3, steps=2, device="cpu", **values))
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


def test_everything_else_is_drawn(run, tmp_path):
    assert all(np.isfinite(column(run, f"{name}")).any() for name in ("negative", "same", "label"))
    found = drawn(run, tmp_path / "a.npz")
    assert list(found) == ["arr_0", "negative", "same", "arr_1", "label_probabilities"]
    assert found["negative"].shape == (3, 8, 8, 3) and found["negative"].dtype == np.uint8


def test_each_image_can_be_given_and_each_can_be_z_0(run, folder, tmp_path):
    given = drawn(run, tmp_path / "a.npz", given=f"negative={negatives(folder)}")
    with np.load(negatives(folder)) as file:
        np.testing.assert_array_equal(given["negative"], file["arr_0"][:3])  # as it was read
    swapped = drawn(run, tmp_path / "b.npz", given="image=builtin:digits,label=3")
    assert set(swapped) == {"arr_0", "image", "same", "arr_1"}  # arr_0 is the negative
    source = open_source("builtin:digits")
    np.testing.assert_array_equal(swapped["image"], np.stack([source.read(i) for i in range(3)]))
    same = drawn(run, tmp_path / "c.npz", target="same")
    assert list(same) == ["arr_0", "negative", "image", "arr_1", "label_probabilities"]


def test_the_bound_knows_the_other_images(run, tmp_path):
    given = {"data_dir": "builtin:digits", "num_samples": 2, "timestep_respacing": 3}
    nll.main(words(model_path=run, out=tmp_path / "n.npz", device="cpu", **given))
    with np.load(tmp_path / "n.npz") as file:
        assert {"L2_negative", "L2_same", "L2_label"} <= set(file.files)


BAD = [
    ({"mt_task": "masked", "mt_swap_prob": "0.5"}, r"--mt_swap_prob 0.5: there is no paired image .--mt_task paired. to be z_0"),
    ({"mt_task": "paired"}, r"--paired_dir is missing: the folder or archive with the images of --mt_task paired"),
    ({"mt_task": "a:paired,b:paired", "paired_dir": "a=nowhere"}, r"nowhere: no such file or folder"),
    ({"mt_task": "a:paired,b:paired", "paired_dir": "a=builtin:digits"}, r"--paired_dir is missing: .* of --mt_task b"),
    ({"mt_task": "a:pared"}, r"--mt_task: unknown 'pared' .did you mean paired"),
    ({"mt_task": "a:paired,a:masked"}, r"names a twice"),
    ({"mt_task": "image:paired", "paired_dir": "builtin:digits"}, r"the sides image, image need different names"),
    ({"mt_task": "paired", "paired_dir": "builtin:digits", "mt_swap_prob": "1.5"}, r"must be between 0 and 1.*not 1.5"),
    ({"mt_task": "paired", "paired_dir": "builtin:digits", "mt_swap_prob": "often"}, r"--mt_swap_prob must be a number"),
    ({"mt_task": "paired,label", "paired_dir": "builtin:digits", "mt_swap_prob": "label=0.5"}, r"has no 'label'|names label but"),
    (
        {"mt_task": "paired", "paired_dir": "builtin:digits", "mt_swap_prob": "0.5", "class_cond": True, "num_classes": 10},
        r"the network's class tells which image is z_0 .--mt_swap_prob.",
    ),
]  # fmt: skip


@pytest.mark.parametrize("values, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_flags(values, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        train.main(flags(**{**values, "log_dir": tmp_path / "run"}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_what_can_not_be_drawn_is_said(run, folder, tmp_path):
    with pytest.raises(UserError, match=r"'negative' is given, so it can't be drawn"):
        drawn(run, tmp_path / "a.npz", given=f"negative={negatives(folder)}", target="negative")
    with pytest.raises(UserError, match=r"no image of this model .did you mean same"):
        drawn(run, tmp_path / "a.npz", target="sme")
    alone = folder / "alone"
    train.main(flags(mt_task="paired", paired_dir=negatives(folder), log_dir=alone, total_steps=1, mt_variant="U"))
    with pytest.raises(
        UserError, match=r"was not trained to generate paired from image: z_0 was always image .mt_swap_prob 0."
    ):
        drawn(alone, tmp_path / "a.npz", given="image=builtin:digits")
