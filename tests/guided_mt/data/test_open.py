"""The registry of sources, several of them as one, and items without a class."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import make_files, png, same, stream_of, write

from guided_mt.data import SOURCES, ImageSource, SourceKind, load_images, open_source
from guided_mt.data.open import _split
from guided_mt.data.sources.joined import Joined
from guided_mt.data.subset import Subset, spread
from guided_mt.errors import UserError

# ---------------------------------------------------------------- the registry


class Stripes(ImageSource):
    """stripes:N, N images of one grey each."""

    labels = None

    def __init__(self, path: str):
        self.path, self.class_names = path, []

    def __len__(self) -> int:
        return int(self.path.partition(":")[2])

    def read(self, index: int) -> np.ndarray:
        return np.full((8, 8, 3), index, dtype=np.uint8)

    def name(self, index: int) -> str:
        return f"{index}.png"


def test_a_row_from_outside_is_read_everywhere(monkeypatch, tmp_path):
    row = SourceKind(lambda text, path: text.startswith("stripes:"), lambda text, path, names, suffixes: Stripes(text))
    monkeypatch.setitem(SOURCES, "stripes", row)
    assert load_images(open_source("stripes:5"), 8).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    images = load_images(open_source(f"stripes:3,{write('zip', make_files(), tmp_path)}"), 8).images
    assert len(images) == 24 and images[2].eq(2).all()


def test_a_new_row_wins_over_those_before_it(monkeypatch, tmp_path):
    path = write("zip", make_files(), tmp_path)
    seen = []
    row = SourceKind(
        lambda text, path: path.suffix == ".zip",
        lambda text, path, names, suffixes: seen.append((text, path)) or Stripes("stripes:2"),
    )
    monkeypatch.setitem(SOURCES, "own zip", row)
    assert len(open_source(path)) == 2 and len(open_source(path / "inner")) == 2
    assert seen == [(str(path), path), (str(path / "inner"), path)]  # the file that a path leads into


def test_rows_do_not_change_what_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"\x1f\x8b\x08\x00rest")
    np.savez(tmp_path / "x.npz", np.zeros((2, 4, 4, 3), np.uint8))
    for path, message in (
        (tmp_path / "x.zip", r"x\.zip: is compressed, .*gunzip"),
        (tmp_path / "x.npz" / "train", r"x\.npz/train: an \.npz has no folders; give .*x\.npz$"),
        ("builtin:nothing", "no such built-in data"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(path)


# ---------------------------------------------------------------- several sources


def test_two_archives_and_a_folder(tmp_path):
    files = make_files()
    chosen = [
        write(kind, {name: files[name] for name in names}, folder)
        for kind, names, folder in (
            ("zip", list(files)[:7], tmp_path),
            ("tar", list(files)[14:], tmp_path),
            ("folder", list(files)[7:14], tmp_path),
        )
    ]
    source = open_source(",".join(map(str, chosen)))
    assert len(source) == 21 and source.class_names == ["cat", "dog", "emu"]
    assert source.labels.tolist() == [0] * 7 + [2] * 7 + [1] * 7
    parts = [load_images(open_source(path), 12).images for path in chosen]
    assert torch.equal(load_images(source, 12).images, torch.cat(parts))
    assert [source.name(k) for k in (0, 7, 20)] == ["cat/0000.png", "emu/0002.png", "dog/0019.png"]
    copy = pickle.loads(pickle.dumps(source))
    batches = stream_of(source, random_crop=True)
    assert same(batches, stream_of(copy, random_crop=True, num_workers=2))
    assert open_source(source.path, ["emu", "dog", "cat"]).labels.tolist() == [2] * 7 + [0] * 7 + [1] * 7
    with pytest.raises(UserError, match="class 'emu' is not one of the 2 saved classes"):
        open_source(source.path, ["cat", "dog"])


def test_a_source_without_classes_has_none_among_others(tmp_path, caplog):
    labelled = write("zip", make_files(), tmp_path)
    (tmp_path / "plain").mkdir()
    plain = write("folder", {f"{k}.png": png(np.full((12, 12, 3), k, np.uint8)) for k in range(4)}, tmp_path / "plain")
    with caplog.at_level(logging.INFO, "guided_mt"):
        source = open_source(f"{plain},{labelled}")
    assert [r.getMessage() for r in caplog.records] == [f"{source.path}: 4 of 25 items have no class"]
    assert source.labels.tolist() == [-1] * 4 + open_source(labelled).labels.tolist()
    assert load_images(source, 8, limit=5).labels.tolist() == [-1] * 4 + [0]
    for batch in stream_of(source):
        assert torch.equal(batch.labels, torch.from_numpy(source.labels)[batch.indices])
    assert Subset(source, np.array([3, 24])).labels.tolist() == [-1, 2] and len(spread(source, 5).labels) == 5
    neither = open_source(f"{plain},{plain}")
    assert neither.labels is None and neither.class_names == [] and neither.without_class() == "0.png"


def test_arrays_and_digits_together(tmp_path):
    np.savez(tmp_path / "own.npz", np.zeros((3, 8, 8, 3), np.uint8), np.array([1, -1, 0]))
    source = open_source(f"builtin:digits-test,{tmp_path / 'own.npz'}")
    assert source.is_array and len(source) == 363 and source.labels[360:].tolist() == [1, -1, 0]
    assert source.name(361) == "00000001.png" and source.name(360) == "1/00000000.png"
    assert len(source.class_names) == 10


def test_ids_of_npz_files_stay_in_several(tmp_path):
    for name, ids in (("many", np.arange(12)), ("few", np.arange(3))):
        np.savez(tmp_path / f"{name}.npz", np.zeros((len(ids), 8, 8, 3), np.uint8), ids)
    own = write("folder", {"1_own/x.png": png(np.zeros((8, 8, 3), np.uint8))}, tmp_path)
    path = f"{own},{tmp_path / 'few.npz'},{tmp_path / 'many.npz'}"
    source = open_source(path)
    assert source.class_names == [*(f"{k:02d}" for k in range(12)), "1_own"]
    assert source.labels.tolist() == [12, 0, 1, 2, *range(12)]
    for part, count in ((path, 16), (tmp_path / "few.npz", 3), (own, 1)):  # as training goes on, or validates
        again = open_source(part, source.class_names)
        assert again.class_names == source.class_names and len(again) == count
        assert set(again.labels) <= set(source.labels)
    assert np.array_equal(open_source(path, source.class_names).labels, source.labels)
    assert open_source(own, source.class_names).labels.tolist() == [12]


def test_more_names_than_a_file_may_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{'long' * 10}_{k}.npz" for k in range(20)]
    for k, name in enumerate(names):
        np.savez(name, np.full((1, 8, 8, 3), k, np.uint8))
    assert load_images(open_source(",".join(names)), 8).images[:, 0, 0, 0].tolist() == list(range(20))
    for text in ("x" * 300, f"{'x' * 300}/train"):
        with pytest.raises(UserError, match=r"xxx.*: no such file or folder"):
            open_source(text)


def test_ids_of_an_npz_may_be_minus_one(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "none.npz", images, np.full(3, -1))
    assert open_source(tmp_path / "none.npz").labels is None
    np.savez(tmp_path / "wrong.npz", images, np.full(3, -2))
    with pytest.raises(UserError, match=r"or -1 for an image without a class \(it is int64, from -2 to -2\)"):
        open_source(tmp_path / "wrong.npz")


def test_where_commas_split(tmp_path):
    named = write("folder", make_files(3), tmp_path).rename(tmp_path / "cats,dogs")
    assert len(open_source(named)) == 3 and len(open_source(f"{named}/")) == 3
    assert _split("gs://a/b,c/d") == ["gs://a/b,c/d"]
    assert _split("gs://a/b,gs://c/d") == ["gs://a/b", "gs://c/d"]
    assert _split("a.zip,gs://c/d,b") == ["a.zip", "gs://c/d", "b"]
    for text, message in (
        (f"builtin:digits,{tmp_path / 'cats'}", r"cats: no such file or folder \(did you mean cats,dogs\?\)"),
        ("builtin:digits,", "nothing stands before or after a comma"),
        (",builtin:digits", "nothing stands before or after a comma"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(text)


def test_items_of_another_kind_are_not_joined():
    other = Stripes("stripes:2")
    other.side_names = ("a", "b")
    with pytest.raises(UserError, match=r"both: items of stripes:2 are not of the same kind as those of stripes:1"):
        Joined("both", [Stripes("stripes:1"), other])


def test_presence_of_joined_sides():
    sources = [Stripes(f"stripes:{k}") for k in (1, 2, 3)]
    for source in sources:
        source.side_names = ("a", "b")
    sources[1].present = {"b": np.array([False, True])}
    joined = Joined("all", sources)
    assert set(joined.present) == {"b"} and joined.present["b"].tolist() == [True, False, True, True, True, True]
    assert Path(joined.name(5)) == Path("2.png")
