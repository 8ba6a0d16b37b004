"""More sides than two, or one, per item: computed ones, paired ones that some items lack, and what a cache keeps of them."""

from __future__ import annotations

import io
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_cache import Fake
from test_pairs import aligned_files, camvid_files, colours_of, png, same, stream_of, write

from guided_mt.data import ImageStream, load_images
from guided_mt.data.subset import Subset
from guided_mt.errors import UserError
from latent_mt.data import ImageData, LatentCache, PairData, open_pairs
from latent_mt.data.computed import FILTERS, Computed, blurred, edges, grey
from latent_mt.data.ordered import ordered_batches
from latent_mt.data.pairs import Side, sides_of
from latent_mt.data.validation import val_batches, val_sides
from latent_mt.first_stage.latents import encode_items, write_cache
from latent_mt.first_stage.reconstruction import figure_names, measure

DRIVES = ("0001TP", "0006R0", "Seq05VD")


def drives_files(drives=DRIVES, train: int = 6, val: int = 3) -> dict[str, bytes]:
    """camvid_files by the names of CamVid's drives; validation ends with the last drive, and training has it not."""
    files = camvid_files(train)
    names = {
        f"train/{part}/f{k}.{s}": (part, s, k)
        for part, s in (("images", "jpg"), ("labels", "png"))
        for k in range(train)
    }
    for name, (part, suffix, k) in names.items():
        files[f"train/{part}/{drives[k % (len(drives) - 1)]}_f{k}.{suffix}"] = files.pop(name)
    for part, suffix in (("images", "jpg"), ("labels", "png")):
        for k in range(val):
            files[f"val/{part}/{drives[k]}_f{k}.{suffix}"] = files.pop(f"val/{part}/f{k}.{suffix}")
    return files


def pair_data(path: Path, **settings) -> PairData:
    return PairData(**({"path": str(path), "image_size": 8, "batch_size": 2, "num_workers": 0} | settings))


def photos_and_depth(folder: Path) -> dict[str, str]:
    """{split: folder of photos, split-depth: of depths, of which training lacks two}."""
    rng = np.random.default_rng(7)
    paths = {}
    for split, count in (("train", 6), ("val", 3)):
        photos = {
            f"{'ab'[k % 2]}/{k}.jpg": png(rng.integers(0, 256, (12, 18, 3), np.uint8), "JPEG") for k in range(count)
        }
        depth = {
            f"{'ab'[k % 2]}/{k}.png": png(rng.integers(0, 256, (12, 18), np.uint8))
            for k in range(count)
            if split == "val" or k not in (1, 4)
        }
        paths[split] = str(write("tar", photos, folder, split))
        paths[f"{split}-depth"] = str(write("zip", depth, folder, f"{split}-depth"))
    return paths


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter(name):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), np.uint8)
    made = FILTERS[name](image.copy())
    assert made.shape == image.shape and made.dtype == np.uint8
    assert np.array_equal(made, FILTERS[name](image))
    mirrored = FILTERS[name](
        np.ascontiguousarray(image[:, ::-1])
    )  # the mirrored item of a cache is that of the mirrored photo
    assert np.abs(mirrored[:, ::-1].astype(int) - made).max() <= 1
    flat = FILTERS[name](np.full((16, 16, 3), 90, np.uint8))
    assert (flat == flat[0, 0]).all()


def test_edges_are_white_lines_on_black():
    square = np.full((32, 32, 3), 60, np.uint8)
    square[8:24, 8:24] = 200
    drawn = edges(square)
    assert (drawn == drawn[..., :1]).all()
    assert drawn[16, 7:9, 0].min() > 200 and drawn[7:9, 16, 0].min() > 200
    assert drawn[12:20, 12:20].max() == 0 and drawn[:5].max() == 0 and drawn[:, -5:].max() == 0
    noise = 100 + np.random.default_rng(0).integers(-4, 5, (32, 32, 1)).repeat(3, axis=2)
    assert edges(noise.astype(np.uint8)).mean() < 2
    dark, light = square // 8, square  # an edge in the shadow shows
    assert edges(dark)[16, 7:9].max() > 60 and edges(light)[16, 7:9].max() > 200


def test_blurred_and_grey():
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    assert blurred(image).std() < image.std() / 5 and abs(blurred(image).mean() - image.mean()) < 2
    assert np.array_equal(grey(image)[..., 0], np.asarray(Image.fromarray(image).convert("L")))


# ---------------------------------------------------------------- computed sides


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_computed_sides_come_after_the_two_of_the_layout(direction, tmp_path):
    path = write("tar", camvid_files(), tmp_path)
    data = pair_data(path, direction=direction, computed={"line": "edges", "soft": "blurred"})
    source, plain = data.pixel_source("train"), open_pairs(path, direction=direction)
    first = ("photo", "map") if direction == "AtoB" else ("map", "photo")
    assert source.side_names == (*first, "line", "soft") and source.direction == direction
    assert [side.kind for side in source.sides[2:]] == ["image", "image"]
    assert source.item_shape(8) == (12, 8, 8) and len(source) == 10 and source.name(3) == plain.name(3)
    assert source.class_names == plain.class_names and source.labels is None
    assert np.array_equal(source.label_map(2, 8), plain.label_map(2, 8))
    photo = slice(0, 3) if direction == "AtoB" else slice(3, 6)
    for uniforms in (None, np.array([0.999, 0.7, 0.2])):
        item = source.decode(2, 8, uniforms)
        assert np.array_equal(item[:6], plain.decode(2, 8, uniforms))
        cropped = np.ascontiguousarray(item[photo].transpose(1, 2, 0))
        assert np.array_equal(item[6:9], edges(cropped).transpose(2, 0, 1))  # of the photo as it was cropped
        assert np.array_equal(item[9:], blurred(cropped).transpose(2, 0, 1))
    batches = stream_of(source)
    assert batches[0].images.shape == (4, 12, 8, 8)
    assert same(batches, stream_of(pickle.loads(pickle.dumps(source)), num_workers=2))


def test_computed_sides_of_aligned_pairs(tmp_path):
    path = write("zip", aligned_files(), tmp_path)
    source = pair_data(path, sides=["day", "night"], computed={"grey": "grey"}).pixel_source("val")
    item = source.decode(1, 24)
    assert source.side_names == ("day", "night", "grey") and len(colours_of(item[:3])) > len(colours_of(item[6:]))
    assert np.array_equal(item[6], np.asarray(Image.fromarray(item[:3].transpose(1, 2, 0).copy()).convert("L")))
    with pytest.raises(UserError, match="day and night are images; there are no label maps"):
        source.label_map(0, 8)


def test_what_is_refused_of_computed_sides(tmp_path):
    path = write("tar", camvid_files(), tmp_path)
    for computed, message in (
        ({"line": "egdes"}, r"computed\.line 'egdes': must be one of edges, blurred, grey \(did you mean edges\?\)"),
        (["edges"], r"data\.params\.computed \['edges'\]: must be names with a value each, such as \{edges: edges\}"),
        ({"line": 3}, "must be names with a value each"),
    ):
        with pytest.raises(UserError, match=message):
            pair_data(path, computed=computed)
    with pytest.raises(UserError, match=r"set\.tar has a side map already; give another name"):
        pair_data(path, computed={"map": "edges"}).open()


# ---------------------------------------------------------------- classes of pairs


def test_classes_from_prefixes(tmp_path, caplog):
    path = write("tar", drives_files(), tmp_path)
    data = pair_data(path, labels="prefix", val_split="val", computed={"line": "edges"})
    with caplog.at_level(logging.INFO, "latent_mt"):
        train, val = data.source, data.val_source
    assert train.class_names == val.class_names == ["0001TP", "0006R0"]
    assert [train.name(k).split("/")[-1][:6] for k in (0, 5)] == ["0001TP", "0006R0"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 1, -1]  # training has not the last drive
    assert caplog.messages == [f"{path}: 1 of 3 items have no class (Seq05VD: not in training)"]
    with data.stream(seed=0, total_steps=3) as stream:
        for batch in stream:
            assert torch.equal(batch.labels, torch.from_numpy(train.labels)[batch.indices])
    (batch,) = ordered_batches(val, 8, 4)
    assert batch.labels.tolist() == [0, 1, -1]
    few = pair_data(path, labels="prefix", limit=2).source  # the ids don't change with the limit
    assert few.class_names == ["0001TP", "0006R0"] and few.labels.tolist() == [0, 0]
    assert pair_data(path).source.labels is None


def test_classes_from_folders(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"train/{city}/{k}.png" for city in ("ulm", "bonn") for k in range(2)] + ["train/0.png", "val/bonn/0.png"]
    files = {name: png(rng.integers(0, 256, (8, 16, 3), np.uint8)) for name in names}
    data = pair_data(write("zip", files, tmp_path), labels="folder", val_split="val")
    assert data.source.class_names == ["bonn", "train", "ulm"]  # the folder that a file lies in, whatever it is
    assert data.val_source.labels.tolist() == [0]


def test_what_is_refused_of_classes(tmp_path):
    path = write("tar", camvid_files(), tmp_path)
    with pytest.raises(
        UserError, match=r"data\.params\.labels 'prefx': must be one of prefix, folder \(did you mean pre"
    ):
        pair_data(path, labels="prefx")
    with pytest.raises(UserError, match=r"labels prefix the files \(.*f0\.jpg, \.\.\.\) have no class; try folder, or"):
        pair_data(path, labels="prefix").open()
    with pytest.raises(UserError, match=r"labels folder the files .* have no class; try prefix, or leave out"):
        pair_data(path, labels="folder").open()


# ---------------------------------------------------------------- paired images


def test_paired_images(tmp_path):
    paths = photos_and_depth(tmp_path)
    data = ImageData(
        paths["train"],
        8,
        2,
        val_path=paths["val"],
        num_workers=0,
        paired={"depth": paths["train-depth"]},
        val_paired={"depth": paths["val-depth"]},
    ).open()
    assert data.source.side_names == data.val_source.side_names == ("image", "depth")
    assert data.source.class_names == data.val_source.class_names == ["a", "b"]
    lacking = [data.source.name(k) for k in np.flatnonzero(~data.source.present["depth"])]
    assert lacking == ["a/4.jpg", "b/1.jpg"] and not data.val_source.present
    assert sides_of(data.source) == (Side("image"), Side("depth"))
    sides, labels = val_sides(data, 2)
    assert [side.shape for side in sides] == [(2, 3, 8, 8)] * 2 and labels.tolist() == [0, 0]
    assert [batch.images.shape[1] for batch in val_batches(data)] == [6, 6]
    assert figure_names(data.source) == ["val_psnr_image", "val_ssim_image", "val_psnr_depth", "val_ssim_depth"]
    images = load_images(data.source, 16).images
    assert measure(images, images, data.source)[0, 0] / 6 > 75

    alone = ImageData(paths["train"], 8, 2, paired={"depth": paths["train-depth"]}, limit=3)
    assert isinstance(alone.source, Subset) and alone.source.present["depth"].tolist() == [True, True, False]
    (batch, *_) = val_batches(alone)
    assert batch.present["depth"].tolist() == [True, True] and len(list(ordered_batches(alone.source, 8, 2))) == 2
    last = list(ordered_batches(alone.source, 8, 2))[-1]
    assert last.present["depth"].tolist() == [False]


def test_the_main_side_has_a_name_of_its_own(tmp_path):
    paths = photos_and_depth(tmp_path)
    settings = {"paired": {"depth": paths["train-depth"]}, "side": "photo", "num_workers": 0}
    data = ImageData(paths["train"], 8, 2, **settings)
    assert data.source.side_names == ("photo", "depth")
    write_cache(data.pixel_source("train"), Fake(), 8, tmp_path / "out" / "train", num_workers=0)
    cached = ImageData(paths["train"], 8, 2, **settings, latents=str(tmp_path / "out")).open()
    assert cached.source.side_names == ("photo", "depth")
    with pytest.raises(UserError, match=r"are photo and depth, but data\.params\.paired gives image and depth"):
        ImageData(paths["train"], 8, 2, paired=settings["paired"], latents=str(tmp_path / "out")).open()
    assert ImageData(paths["train"], 8, 2, side="photo").source.side_names == ()  # items of one image have no sides
    for side in ("depth", "", None):
        with pytest.raises(UserError, match=rf"data\.params\.side {side!r}: must be a name that no side of data"):
            ImageData(paths["train"], 8, 2, **(settings | {"side": side}))


def test_what_the_data_lack_is_said_once(tmp_path, caplog):
    paths = photos_and_depth(tmp_path)
    plain = write("folder", {"x.png": png(np.zeros((8, 8, 3), np.uint8))}, tmp_path, "plain")
    data = ImageData(f"{paths['train']},{plain}", 8, 2, val_path=paths["val"], num_workers=0)
    pairs = pair_data(write("tar", drives_files(), tmp_path), labels="prefix", val_split="val")
    paired = ImageData(paths["train"], 8, 2, paired={"depth": paths["train-depth"]})
    with caplog.at_level(logging.INFO):
        for opened in (data, pairs, paired):
            for _ in range(3):  # as each preview does it
                val_sides(opened.open(), 2)
    assert [message.partition(": ")[2][:30] for message in caplog.messages] == [
        "1 of 7 items have no class",
        "1 of 3 items have no class (Se",
        "2 of 6 items have no depth in ",
    ]


def test_several_folders_of_images(tmp_path):
    paths = photos_and_depth(tmp_path)
    data = ImageData(f"{paths['train']},builtin:digits-test", 8, 2, val_path=paths["val"])
    assert len(data.source) == 366 and data.source.class_names == [*"0123456789", "a", "b"]
    assert data.val_source.labels.tolist() == [10, 10, 11]


def test_what_is_refused_of_paired_images(tmp_path):
    paths = photos_and_depth(tmp_path)
    with pytest.raises(UserError, match=r"val_paired has the sides none, but paired depth; name the same sides"):
        ImageData(paths["train"], 8, 2, val_path=paths["val"], paired={"depth": "x"})
    with pytest.raises(UserError, match=r"data\.params\.paired 'x\.zip': must be names with a value each"):
        ImageData(paths["train"], 8, 2, paired="x.zip")
    with pytest.raises(UserError, match=r"side 'image': must be a name that no side of data\.params\.paired has"):
        ImageData(paths["train"], 8, 2, paired={"image": paths["val"]})


# ---------------------------------------------------------------- caches


def test_a_cache_of_three_sides(tmp_path, monkeypatch):
    path = write("tar", drives_files(), tmp_path)
    settings = {"computed": {"line": "edges"}, "labels": "prefix", "val_split": "val"}
    pixels = pair_data(path, **settings)
    for split in ("train", "val"):
        write_cache(pixels.pixel_source(split), Fake(), 8, tmp_path / "out" / split, batch_size=4, num_workers=1)
    cache = LatentCache(tmp_path / "out" / "val")
    assert cache.side_names == ("photo", "map", "line") and sides_of(cache) == pixels.source.sides
    assert cache.labels.tolist() == [0, 1, -1] and cache.class_names == ["0001TP", "0006R0"]
    assert cache.beside == {"line": "edges"} and not cache.present
    data = pair_data(path, **settings, latents=str(tmp_path / "out")).open()
    assert data.source.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.val_source.labels.tolist() == [0, 1, -1]
    sides, labels = val_sides(data, 2)
    assert [side.shape for side in sides] == [(2, 3, 8, 8)] * 3 and labels.tolist() == [0, 1]
    mean, logvar = data.source.unpack(load_images(data.source, 8).images)
    assert mean.shape == logvar.shape == (6, 3, 2, 2, 4, 4)
    expected = encode_items(Fake(), load_images(pixels.source, 8).images, 3)
    torch.testing.assert_close(mean, expected[:, :, :, 0])
    with data.stream(seed=1, total_steps=3) as latents, pixels.stream(seed=1, total_steps=3) as images:
        for one, other in zip(latents, images, strict=True):
            assert torch.equal(one.indices, other.indices) and torch.equal(one.labels, other.labels)
    # written again: the same cache
    write_cache(pixels.pixel_source("val"), Fake(), 8, tmp_path / "out" / "val")
    for change, message in (
        (
            {"computed": None},
            r"its sides are photo and map and line, not photo and map \(data\.params\.sides, computed\)",
        ),
        ({"computed": {"soft": "blurred"}}, "its sides are photo and map and line, not photo and map and soft"),
        ({"computed": {"line": "grey"}}, r"its computed sides are \{'line': 'edges'\}, but data\.params\.computed is"),
    ):
        with pytest.raises(UserError, match=message):
            pair_data(path, **(settings | change), latents=str(tmp_path / "out")).open()
    with pytest.raises(UserError, match="a cache is there already, with another beside; remove it"):
        write_cache(
            pair_data(path, **(settings | {"computed": {"line": "grey"}})).source, Fake(), 8, tmp_path / "out" / "train"
        )
    assert pair_data(path, computed={"line": "edges"}, latents=str(tmp_path / "out")).source.labels is None


def test_a_cache_keeps_what_items_lack(tmp_path):
    paths = photos_and_depth(tmp_path)
    settings = {"image_size": 8, "batch_size": 2, "num_workers": 0, "paired": {"depth": paths["train-depth"]}}
    pixels = ImageData(paths["train"], **settings, limit=5)
    write_cache(pixels.pixel_source("train"), Fake(), 8, tmp_path / "out" / "train", num_workers=0)
    data = ImageData(paths["train"], **settings, latents=str(tmp_path / "out")).open()
    assert data.source.side_names == ("image", "depth")
    assert (
        data.source.present["depth"].tolist()
        == pixels.source.present["depth"].tolist()
        == [True, True, False, False, True]
    )
    assert data.source.labels.tolist() == [0, 0, 0, 1, 1] and data.source.beside == {"depth": paths["train-depth"]}
    with data.stream(seed=0, total_steps=4) as stream:
        for batch in stream:
            assert torch.equal(batch.present["depth"], torch.from_numpy(data.source.present["depth"])[batch.indices])
    assert LatentCache(tmp_path / "out" / "train", limit=3).present["depth"].tolist() == [True, True, False]
    with pytest.raises(UserError, match=r"holds latents of pairs, not of single images.*or name the other sides"):
        ImageData(paths["train"], 8, 2, latents=str(tmp_path / "out")).open()
    with pytest.raises(
        UserError, match=r"its sides are image and depth, but data\.params\.paired gives image and normals"
    ):
        ImageData(paths["train"], 8, 2, latents=str(tmp_path / "out"), paired={"normals": "x"}).open()


def test_classes_that_items_lack_stay_in_a_cache(tmp_path):
    plain = write("folder", {"x.png": png(np.zeros((8, 8, 3), np.uint8))}, tmp_path)
    source = ImageData(f"{plain},builtin:digits-test", 8, 2, limit=4).source
    cache = write_cache(source, Fake(), 8, tmp_path / "out", num_workers=0)
    assert cache.labels.tolist() == source.labels.tolist() and cache.labels[0] == -1
    assert cache.side_names == () and [side.name for side in cache.sides] == ["image"]
    (batch,) = ImageStream(cache, 8, seed=0, global_batch=4, total_steps=1)
    assert batch.labels.tolist().count(-1) == 1


def test_caches_of_earlier_versions_load(tmp_path):
    pairs = open_pairs(write("tar", camvid_files(), tmp_path))
    folder = tmp_path / "out" / "train"
    write_cache(pairs, Fake(), 8, folder, num_workers=0)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["beside"], meta["present"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert len(write_cache(pairs, Fake(), 8, folder)) == 10  # it is still the cache of these pairs
    data = pair_data(Path(pairs.path), latents=str(tmp_path / "out")).open()
    assert data.source.present == {} and data.source.beside == {} and data.source.side_names == ("photo", "map")
    (folder / "meta.json").write_text(json.dumps(meta | {"present": {"map": [True]}}))
    with pytest.raises(UserError, match=r"not a whole cache of latents \(1 values of `present` for 10 items\)"):
        LatentCache(folder)


def test_pairs_of_one_side_and_of_three_read_alike(tmp_path):
    """The base class asks for no number of sides."""
    from latent_mt.data.pairs import PairSource

    class Several(PairSource):
        def __len__(self) -> int:
            return 4

        def name(self, index: int) -> str:
            return f"{index}.png"

        def read_sides(self, index: int) -> list:
            return [
                Image.open(io.BytesIO(png(np.full((8, 8, 3), index + k, np.uint8)))) for k in range(len(self.sides))
            ]

    for count in (1, 3):
        source = Several("made", [Side(name) for name in "abc"[:count]])
        images = load_images(source, 8).images
        assert images.shape == (4, 3 * count, 8, 8) and images[2, ::3, 0, 0].tolist() == list(range(2, 2 + count))
        assert len(write_cache(source, Fake(), 8, tmp_path / str(count), num_workers=0).sides) == count
    assert isinstance(Computed(Several("made", [Side("a")]), {"g": "grey"}), PairSource)
