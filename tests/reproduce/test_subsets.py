"""The picture of every subset, for runs of both packages: the rows that a model was trained for, and the items asked for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny import flags
from tiny_latent import write_pairs, write_run

from guided_mt.commands import train
from guided_mt.data import open_source
from guided_mt.errors import UserError
from guided_mt.runs.config import parse
from reproduce import subsets
from reproduce.subsets.items import SubsetsConfig, choose

FEW = ["--num_samples", "3", "--steps", "2", "--device", "cpu"]


def rows(printed: str) -> list[tuple[str, str]]:
    """(drawn, given) of each line of the table."""
    table = printed[printed.index("drawn  ") :].splitlines()[1:-1]
    return [(line[:12].strip(), line[13:41].strip()) for line in table]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A run in pixels of form X, which is always given the masked image."""
    run = tmp_path_factory.mktemp("pixels")
    train.main(flags(mt_variant="X", log_dir=run, total_steps=1))
    return run


def test_pixels(pixels, capsys):
    subsets.main(["--model_path", str(pixels), "--data_dir", "builtin:digits-test", "--mask", "half", *FEW])
    assert rows(capsys.readouterr().out) == [("image", "masked")]
    with Image.open(pixels / "samples" / "subsets.png") as picture:
        image, masked = np.asarray(picture)[16 + 2 : 16 + 66], np.asarray(picture)[16 + 68 + 2 : 16 + 68 + 66]
    right = slice(150 + 2 + 32, 150 + 2 + 64)  # of the first item, behind the title
    assert (masked[:, right] == 127).all() and (masked[:, 152:184] == image[:, 152:184]).all()


def test_latents_with_a_masked_image(tmp_path, capsys):
    run = write_run(tmp_path / "run", write_pairs(tmp_path / "pairs"), mt_variant="any", mt_tasks={"masked": {}})
    subsets.main(["--model_path", str(run), *FEW])
    found = rows(capsys.readouterr().out)
    assert found[:4] == [("day", given) for given in ("nothing", "night", "masked", "night, masked")]
    assert found[4:] == [("night", given) for given in ("nothing", "day", "masked", "day, masked")]
    assert (run / "samples" / "subsets.png").exists()


def test_items_are_spread_or_of_each_class():
    source = open_source("builtin:digits-test")
    config = lambda *words: parse(words, (SubsetsConfig,), description="")  # noqa: E731
    spread = choose(config("--num_samples", "10"), source)
    assert spread[0] == 0 and spread[-1] == len(source) - 1
    each = choose(config("--num_samples", "12", "--each_class", "True"), source)
    assert source.labels[each].tolist() == [*range(10), 0, 1] and len(set(each.tolist())) == 12
    with pytest.raises(UserError, match="lower --num_samples 1000"):
        choose(config("--num_samples", "1000"), source)


def test_split_is_of_latent_models(pixels):
    with pytest.raises(UserError, match="--split val: is of latent models"):
        subsets.main(["--model_path", str(pixels), "--split", "val", *FEW])


def test_a_model_of_images_alone_has_nothing_to_give(tmp_path):
    train.main(flags(mt_task="none", log_dir=tmp_path, total_steps=1))
    with pytest.raises(UserError, match="knows of images alone"):
        subsets.main(["--model_path", str(tmp_path), *FEW])
