"""Pairs in two folders, CycleGAN's data sets that look the same and are no pairs, and single photos taken for pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_pairs import aligned_files, items_of, png, refuses, write

from guided_mt.data import load_images, open_source
from guided_mt.errors import UserError
from latent_mt.data import open_pairs
from latent_mt.data.layouts import DIRECTIONS


def two_folders(folder: Path, b: str = "abcd", width: int = 16) -> Path:
    """trainA, trainB, testA and testB; A has a.jpg to d.jpg of 16 pixels."""
    rng = np.random.default_rng(0)
    files = {
        f"{split}{side}/{name}.jpg": png(rng.integers(0, 255, (16, wide, 3), np.uint8), "JPEG")
        for split in ("train", "test")
        for side, names, wide in (("A", "abcd", 16), ("B", b, width))
        for name in names
    }
    return write("folder", files, folder)


def test_cyclegans_folders_are_no_pairs(tmp_path):
    path = two_folders(tmp_path)
    message = r"trainA and trainB are two sets of single photos, .* ask for layout: folders and split: train$"
    for settings in ({}, {"split": "trainA"}, {"split": "trainB", "layout": "aligned"}):
        refuses(message, path, **settings)
    refuses("no split val; there is testA, testB, trainA, trainB", path, split="val")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_folders_are_pairs_where_that_is_said(direction, tmp_path):
    path = two_folders(tmp_path)
    source = open_pairs(path, layout="folders", direction=direction, sides=["night", "day"], limit=3)
    order, sides = ("AB", ("night", "day")) if direction == "AtoB" else ("BA", ("day", "night"))
    assert len(source) == 3 and source.name(0) == f"train{order[0]}/a.jpg" and source.side_names == sides
    photos = [load_images(open_source(path / f"train{side}"), 8, limit=3).images for side in order]
    assert np.array_equal(items_of(source), np.concatenate(photos, axis=1))


def test_two_folders_that_do_not_match(tmp_path):
    path = two_folders(tmp_path / "names", b="abcx")
    refuses("1 files have no partner of their name in trainB: trainA/d.jpg", path, layout="folders")
    refuses("no split val; there is test, train", path, layout="folders", split="val")
    source = open_pairs(two_folders(tmp_path / "sizes", width=20), layout="folders")
    with pytest.raises(UserError, match=r"trainA/a.jpg has 16x16 pixels and its partner trainB/a.jpg 20x16; make them"):
        source.decode(0, 8)


def test_halves_of_single_photos_are_said(tmp_path, caplog):
    path = write("folder", {"train/a.jpg": png(np.zeros((16, 16, 3), np.uint8), "JPEG")}, tmp_path)
    open_pairs(path)
    assert "A its left half and B its right one, 8 x 16 pixels each in the first; if these are single" in caplog.text
    caplog.clear()
    open_pairs(path, layout="aligned")
    open_pairs(write("folder", aligned_files(48, 24), tmp_path / "square"))
    assert not caplog.records
