"""Classes of latent data: what folders say, validation of another layout, ids that a run or a cache was begun with."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from test_data import png
from test_data import write as write_images
from test_latent_cache import Fake

from guided_mt.data import open_source
from guided_mt.errors import UserError
from latent_mt.commands.training import _check_each_has_class, reads_labels
from latent_mt.data import ImageData, LatentCache
from latent_mt.data.pair_classes import class_names_of, classes_of
from latent_mt.first_stage.latents import write_cache

IMAGE = png(np.zeros((8, 8, 3), np.uint8))
BY_WORDS = ["0", "1", "10", "11", *"23456789"]  # the order of earlier versions


def numbered(folder, count: int = 12):
    folder.mkdir()
    return write_images("folder", {f"{k}/{k}.png": IMAGE for k in range(count)}, folder)


def test_classes_of_pairs_by_folder():
    names = [f"leftImg8bit/train/{city}/{city}_1.png" for city in ("aachen", "bochum")]
    assert classes_of(names, "folder") == ["aachen", "bochum"] == class_names_of("x", names, "folder")
    names = [f"train/{place}/chair/1.jpg" for place in ("indoor", "outdoor")]
    assert classes_of(names, "folder") == ["indoor/chair", "outdoor/chair"]
    known = class_names_of("x", names, "folder")
    assert classes_of(["outdoor/chair/2.jpg", "indoor/sofa/3.jpg"], "folder", known) == ["outdoor/chair", "indoor/sofa"]
    assert classes_of(["train/n01/images/x.jpg", "train/n02/images/x.jpg"], "folder") == ["n01", "n02"]
    assert class_names_of("x", [f"train/{k}/x.jpg" for k in (10, 9, 2)], "folder") == ["2", "9", "10"]
    assert class_names_of("x", [f"train/{k}_x.jpg" for k in (10, 9, 2)], "prefix") == ["2", "9", "10"]
    assert classes_of(["x.jpg", "a/y.jpg"], "folder") == [None, "a"]


def test_validation_without_classes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "tiny").mkdir()
    names = ["train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "val/images/val_0.JPEG"]
    path = write_images("folder", dict.fromkeys(names, IMAGE), tmp_path / "tiny")
    data = ImageData(str(path / "train"), 8, 1, val_path=str(path / "val"))
    assert data.source.labels.tolist() == [0, 1] and data.val_source.labels.tolist() == [-1]
    assert data.val_source.class_names == ["n01", "n02"]
    assert (
        "val: has no classes, unlike" in caplog.text and "images/val_0.JPEG (whose folder names no class" in caplog.text
    )


def test_a_run_goes_on_with_its_ids(tmp_path):
    path = numbered(tmp_path / "train")
    new, old = (ImageData(str(path), 8, 1, val_path=str(path)) for _ in range(2))
    old.use_classes(BY_WORDS)
    for split in ("train", "val"):
        names = [new.pixel_source(split).name(k).partition("/")[0] for k in range(12)]
        assert new.pixel_source(split).labels.tolist() == [int(name) for name in names]
        assert old.pixel_source(split).labels.tolist() == [BY_WORDS.index(name) for name in names]


@pytest.mark.parametrize("saved", [None, BY_WORDS, [str(k) for k in range(12)]])
def test_caches_keep_their_ids_and_follow_those_of_the_run(saved, tmp_path):
    path, latents = numbered(tmp_path / "train"), tmp_path / "latents"
    for split in ("train", "val"):  # as an earlier version wrote it
        write_cache(open_source(path, BY_WORDS), Fake(), 8, latents / split, num_workers=0)
    again = write_cache(open_source(path), Fake(), 8, latents / "train", num_workers=0)  # the same command again
    assert isinstance(again, LatentCache) and again.class_names == BY_WORDS
    data = ImageData(str(path), 8, 1, val_path=str(path), latents=str(latents))
    data.use_classes(saved)
    order = saved or BY_WORDS
    for source in (data.source, data.val_source, data.pixel_source("train"), data.pixel_source("val")):
        assert source.class_names == order
        assert [order[label] for label in source.labels] == [source.name(k).partition("/")[0] for k in range(12)]
    assert json.loads((latents / "train" / "meta.json").read_text())["class_names"] == BY_WORDS


def test_which_models_read_labels():
    class Model:
        cond_stage_key = "class_label"

    assert reads_labels(Model()) and not reads_labels(object())


def test_class_conditional_models_need_a_class_of_each_item(tmp_path):
    (tmp_path / "val").mkdir()
    plain = write_images("folder", {"images/val_0.JPEG": IMAGE}, tmp_path / "val")
    data = ImageData(str(numbered(tmp_path / "train")), 8, 1, val_path=str(plain))
    with pytest.raises(
        UserError, match=r"1 of 1 items have no class, which model\.params.cond_stage_key class_label needs"
    ):
        _check_each_has_class(data)
    _check_each_has_class(ImageData(data.path, 8, 1))
    with pytest.raises(UserError, match="1 of 1 items have no class"):
        _check_each_has_class(ImageData(str(plain), 8, 1))
