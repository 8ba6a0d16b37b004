"""Class names out of folders and file names, class ids, and how they meet those that a model was saved with."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from test_data import png, write

from guided_mt.commands import console
from guided_mt.data import UnknownClassError, open_source
from guided_mt.data.sources.classes import class_ids, first_without_class, guess, ordered

IMAGE = png(np.zeros((4, 4, 3), np.uint8))
CONTAINERS = ("folder", "tar", "zip")
TINY = [f"n0{k}/images/n0{k}_{i}.JPEG" for k in (1, 2, 3) for i in range(2)]


def opened(container: str, names: list[str], folder, class_names=None, inside: str = ""):
    folder.mkdir(exist_ok=True)
    path = write(container, dict.fromkeys(names, IMAGE), folder)
    return open_source(path / inside if inside else path, class_names)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "guided_mt.data"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_tiny_imagenet(container, tmp_path, caplog):
    names = [f"train/{name}" for name in TINY] + ["val/images/val_0.JPEG", "val/images/val_1.JPEG"]
    caplog.set_level(logging.INFO)
    train = opened(container, names, tmp_path / "data", inside="train")
    assert train.class_names == ["n01", "n02", "n03"] and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(said(caplog)) == 1 and "the folders images are no classes, but those above them are" in said(caplog)[0]
    for known in (None, train.class_names):
        val = opened(container, names, tmp_path / "data", known, inside="val")
        assert val.labels is None and len(val) == 2
        assert (
            "images/val_0.JPEG (whose folder names no class; lists such as val_annotations.txt" in val.without_class()
        )
    whole = opened(container, names, tmp_path / "data")
    assert whole.labels is None and whole.without_class().startswith("val/images/val_0.JPEG")


@pytest.mark.parametrize(
    ("names", "classes", "note"),
    [
        (
            ["indoor/chair/1.png", "outdoor/chair/1.png"],
            ["indoor/chair", "outdoor/chair"],
            "named by their paths: indoor/chair",
        ),
        (
            ["all/indoor/chair/1.png", "all/outdoor/chair/1.png", "all/outdoor/dog/1.png"],
            ["indoor/chair", "outdoor/chair", "outdoor/dog"],
            "paths",
        ),
        (["animals/cat/1.png", "vehicles/car/1.png"], ["cat", "car"], ""),
        (
            ["train/cat/1.png", "val/cat/1.png", "train/dog/1.png"],
            ["cat", "cat", "dog"],
            "train and val are read together",
        ),
        (["train/cat/images/1.png", "val/images/1.png"], None, ""),
        (["train/images/dog_1.png", "train/images/cat_1.png"], ["dog", "cat"], ""),
        (["train/dog_1.png", "val/cat_1.png"], ["dog", "cat"], ""),
        (["n01/images/x.png"], ["n01"], "the folders images are no classes"),
        (["images/x.png"], None, ""),
        (["cats/x.png"], ["cats"], ""),
        (["a/frames/x.png", "b/frames/x.png"], ["a", "b"], "the folders frames"),
        (["a/left/x.png", "b/left/x.png"], ["a/left", "b/left"], "named by their paths: a/left, b/left"),
        (["class_0001.png", "other_2.png"], ["class", "other"], ""),
        (["val_1.png", "val_2.png"], None, ""),
        (["test_1.png", "train_2.png"], ["test", "train"], ""),
        (["a/x.png", "y.png"], None, ""),
    ],
)
def test_what_names_say(names, classes, note):
    naming = guess(names)
    assert (naming.classes if naming else None) == classes
    if naming:
        assert note in naming.note and bool(note) == bool(naming.note)
    else:
        assert first_without_class(names).split(" ")[0] in names


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", ["{}/x.png", "{}_x.png"])
def test_numbers_are_ordered_as_numbers(container, form, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = [form.format(k) for k in range(12)]
    source = opened(container, names, tmp_path / "a")
    assert source.class_names == [str(k) for k in range(12)] and not said(caplog)
    assert all(source.labels[k] == int(source.name(k).replace("/", "_").split("_")[0]) for k in range(12))
    source = opened(container, names[1:], tmp_path / "b")
    assert source.class_names == [str(k) for k in range(1, 12)]
    assert (
        "the 11 classes are numbers from 1 to 11, not 0 to 10, so that ids are their ranks: id 0 is class 1"
        in said(caplog)[0]
    )


def test_order():
    assert ordered(["10", "9", "01", "1"]) == ["01", "1", "9", "10"]
    assert ordered(["10", "9", "b"]) == ["10", "9", "b"] and ordered(["²", "10"]) == ["10", "²"]


# ---------------------------------------------------------------- saved classes


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("names", "saved", "labels"),
    [
        ([f"{k}/x.png" for k in (10, 2, 9)], ["1", "10", "2", "9"], [1, 2, 3]),  # ranks of sorted words
        (TINY, ["images"], [0] * 6),
        (["indoor/chair/1.png", "outdoor/chair/1.png", "outdoor/dog/1.png"], ["chair", "dog"], [0, 0, 1]),
    ],
)
def test_runs_of_earlier_versions_keep_their_ids(container, names, saved, labels, tmp_path, caplog):
    source = opened(container, names, tmp_path / "a", saved)
    assert source.class_names == saved and source.labels.tolist() == labels
    again = opened(container, names, tmp_path / "a", source.class_names)
    assert again.labels.tolist() == labels


def test_a_part_of_the_data_meets_the_names_of_the_whole(caplog):
    caplog.set_level(logging.INFO)
    known = ["indoor/chair", "outdoor/chair"]
    labels, _ = class_ids("val", ["outdoor/chair/1.png"], known)
    assert labels.tolist() == [1] and said(caplog) == [
        "val: the saved classes are found by the whole paths of the folders"
    ]
    assert class_ids("val", ["n02/x.png", "n01/y.png"], ["n01", "n02"])[0].tolist() == [
        1,
        0,
    ]  # another layout than train's
    assert class_ids("val", ["val/2_x.png"], ["1", "2"])[0].tolist() == [1]
    assert class_ids("val", ["02/x.png"], ["1", "2"])[0].tolist() == [1]
    with pytest.raises(
        UnknownClassError, match=r"class 'chai' is not one of the 2 saved classes \(did you mean chair\?"
    ):
        class_ids("val", ["chai/x.png"], ["chair", "x"])


# ---------------------------------------------------------------- .npz


def labelled(folder, labels) -> str:
    np.savez(folder / "x.npz", np.zeros((len(labels), 4, 4, 3), np.uint8), np.array(labels))
    return str(folder / "x.npz")


@pytest.mark.parametrize(
    ("saved", "labels", "ids", "note"),
    [
        ([str(k) for k in range(12)], [2, 10, -1], [2, 10, -1], ""),
        ([f"{k:02d}" for k in range(12)], [2, 10], [2, 10], ""),
        (["cat", "dog"], [1, 0], [1, 0], ""),
        (["0", "1", "10", "11", "2"], [2, 10, -1], [4, 2, -1], "arr_1 is taken for the names of classes"),
        (["1", "2", "3"], [1, 3], [0, 2], "class 1 has the id 0"),
        (["1", "2", "3"], [0, 2], [0, 2], "no class is called 0, so that arr_1 is taken for ids"),
        (["0", "1", "00", "01"], [1, 3], [1, 3], ""),  # of folders beside an .npz, as they were joined once
    ],
)
def test_numbers_of_an_npz_meet_names(saved, labels, ids, note, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = open_source(labelled(tmp_path, labels), saved)
    assert source.labels.tolist() == ids and source.class_names == saved
    assert [note in text for text in said(caplog)] == ([True] if note else [])


def test_numbers_that_no_class_has(tmp_path):
    with pytest.raises(UnknownClassError, match="class id 7 in arr_1, but there are 3 saved classes"):
        open_source(labelled(tmp_path, [1, 7]), ["1", "2", "3"])


def test_folders_of_numbers_beside_an_npz(tmp_path):
    folder = write("folder", {f"{k}/x.png": IMAGE for k in (2, 11, 12)}, tmp_path)
    source = open_source(f"{folder},{labelled(tmp_path, list(range(12)))}")
    assert source.class_names == [*(f"{k:02d}" for k in range(12)), "12"]
    assert source.labels.tolist() == [11, 12, 2, *range(12)]
    assert open_source(source.path, source.class_names).labels.tolist() == source.labels.tolist()
    two = open_source(f"{folder},{write('zip', {'10/x.png': IMAGE}, tmp_path)}")
    assert two.class_names == ["2", "10", "11", "12"] and two.labels.tolist() == [2, 3, 0, 1]


@pytest.fixture
def loggers():
    both = [logging.getLogger(name) for name in ("guided_mt.data", "latent_mt.data")]
    yield both
    for logger in both:
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_says_it(rank, loggers, tmp_path, caplog, monkeypatch):
    path = write("folder", {"1/x.png": IMAGE, "3/x.png": IMAGE, "3/y.heic": IMAGE}, tmp_path)
    monkeypatch.setattr(console, "rank_of_launcher", lambda: rank)
    console.run(lambda argv: open_source(path), [])
    assert ("y.heic" in caplog.text) == (rank == 0)
    assert [logger.isEnabledFor(logging.WARNING) for logger in loggers] == [rank == 0] * 2
