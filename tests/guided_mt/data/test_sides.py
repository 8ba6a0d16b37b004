"""Several images per item: which files belong together, the same window on all sides, and items that lack one."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import png, same, stream_of, write

from guided_mt.data import Sides, load_images, open_sides, open_source
from guided_mt.data.loader import Batch
from guided_mt.data.sides import ABSENT
from guided_mt.data.subset import Subset, spread
from guided_mt.data.transforms import center_crop_arr, random_crop_arr
from guided_mt.errors import UserError

PHOTOS = ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg", "dog/2.jpg")


def picture(seed: int, height: int = 24, width: int = 36) -> np.ndarray:
    """Blocks of 3 x 3 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 3, width // 3, 3), np.uint8)
    return coarse.repeat(3, axis=0).repeat(3, axis=1)


def folder_of(names, folder: Path, name: str, first_seed: int = 0) -> Path:
    """A folder of PNG content under these names (a decoder looks at the content, not at the suffix)."""
    (folder / name).mkdir()
    write("folder", {n: png(picture(first_seed + k)) for k, n in enumerate(names)}, folder / name)
    return folder / name / "set"


def refuses(message: str, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_sides(*args, **kwargs)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- which files belong together


@pytest.mark.parametrize(
    ("others", "partners"),
    [
        (("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png"), [0, 1, 2, 3, 4]),  # by path
        (("cat/1.png", "dog/0.png", "rat/7.png"), [-1, 0, 1, -1, -1]),
        (("maps/cat/1.png", "maps/dog/2.png"), [-1, 0, -1, -1, 1]),  # below the folder that all lie in
        (("maps/cat/1.png", "maps/eel/x.png", "maps/dog/2.png"), [-1, 0, -1, -1, 2]),
    ],
)
def test_partners_have_the_same_path(others, partners, tmp_path):
    photos, depth = folder_of(PHOTOS, tmp_path, "photos"), folder_of(others, tmp_path, "depth", 10)
    source = open_sides(photos, {"depth": depth})
    found = [source.others["depth"].name(k) if k >= 0 else None for k in source.partners["depth"]]
    assert found == [others[k] if k >= 0 else None for k in partners]
    assert source.side_names == ("image", "depth") and len(source) == 5
    if -1 in partners:
        assert source.present["depth"].tolist() == [k >= 0 for k in partners]
    else:
        assert not source.present
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1, 1, 1]
    assert source.name(3) == "dog/1.jpg"


def test_partners_by_their_stem_where_stems_are_unique(tmp_path):
    photos = folder_of(("day/a.jpg", "night/b.jpg"), tmp_path, "photos")
    source = open_sides(photos, {"depth": folder_of(("b.png", "c.png"), tmp_path, "flat")})
    assert source.partners["depth"].tolist() == [-1, 0]
    many = folder_of(("x/b.png", "y/b.png"), tmp_path, "many")
    refuses(r"x/b\.png and y/b\.png of .*many.* match the same file of the other; rename one", photos, {"depth": many})


def test_what_is_alone_is_said_once(tmp_path, caplog):
    photos = folder_of(PHOTOS, tmp_path, "photos")
    others = {
        "depth": folder_of(("cat/1.png", "dog/0.png", "rat/7.png"), tmp_path, "depth"),
        "edges": folder_of([name.replace("jpg", "png") for name in PHOTOS], tmp_path, "edges"),
    }
    with caplog.at_level(logging.INFO, "guided_mt"):
        source = open_sides(photos, others)
        load_images(source, 8)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        f"3 of 5 items have no depth in {others['depth']}, and 1 of its 3 files no item"
    )


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("uniforms", [None, np.array([0.0, 0.3, 0.999]), np.array([0.999, 0.999, 0.2])])
@pytest.mark.parametrize("size", [8, 20, 24])
def test_all_sides_show_the_same_window(size, uniforms, tmp_path):
    pattern = picture(1)
    large = Image.fromarray(pattern).resize((36 * 5, 24 * 5), Image.Resampling.NEAREST)
    for name, image in (("photos", Image.fromarray(pattern)), ("large", large), ("same", Image.fromarray(pattern))):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "x.png")
    source = open_sides(
        tmp_path / "photos", {"large": tmp_path / "large", "same": tmp_path / "same"}, main_name="photo"
    )
    assert source.side_names == ("photo", "large", "same") and source.item_shape(size) == (9, size, size)
    item = source.decode(0, size, uniforms)
    crop = center_crop_arr if uniforms is None else random_crop_arr
    expected = crop(Image.fromarray(pattern), size, **({} if uniforms is None else {"uniforms": uniforms}))
    assert np.array_equal(item[:3], expected.transpose(2, 0, 1))  # the main image as it is cropped alone
    assert np.array_equal(item[6:], item[:3])
    if size >= 20:

        def apart(rows: int, columns: int) -> float:
            moved = np.roll(item[:3], (rows, columns), axis=(1, 2)).astype(int)
            return np.abs(item[3:6] - moved)[:, 1:-1, 1:-1].mean()

        assert all(apart(0, 0) < apart(y, x) / 2 for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


def test_a_size_that_rounds_differently_ends_at_the_same_pixels(tmp_path):
    for name, size in (("photos", (150, 99)), ("small", (50, 33))):
        (tmp_path / name).mkdir()
        Image.fromarray(picture(2, 99, 150)).resize(size).save(tmp_path / name / "x.png")
    source = open_sides(tmp_path / "photos", {"small": tmp_path / "small"})
    for size in range(1, 34):
        assert source.decode(0, size, np.array([0.5, 0.5, 0.5])).shape == (6, size, size)


def test_another_aspect_ratio_is_refused(tmp_path):
    photos, depth = folder_of(PHOTOS, tmp_path, "photos"), folder_of(("dog/1.png",), tmp_path, "depth")
    Image.fromarray(picture(0, 24, 24)).save(depth / "dog" / "1.png")
    source = open_sides(photos, {"depth": depth})
    with pytest.raises(UserError, match=r"dog/1\.jpg has 36x24 pixels and its depth dog/1\.png in .* 24x24: not the"):
        source.decode(3, 8)
    for num_workers in (0, 1):
        with pytest.raises(UserError, match="not the same aspect ratio"):
            stream_of(source, num_workers=num_workers)


# ---------------------------------------------------------------- absent ones, and the stream


@pytest.fixture
def source(tmp_path: Path) -> Sides:
    photos = folder_of(PHOTOS, tmp_path, "photos")
    depth = folder_of(("cat/1.png", "dog/0.png", "dog/2.png"), tmp_path, "depth", 10)
    edges = folder_of([name.replace("jpg", "png") for name in PHOTOS], tmp_path, "edges", 20)
    return open_sides(photos, {"depth": depth, "edges": edges})


def test_an_absent_side_is_grey(source):
    loaded = load_images(source, 8)
    assert loaded.images.shape == (5, 9, 8, 8)
    assert set(loaded.present) == {"depth"} and loaded.present["depth"].tolist() == [False, True, True, False, True]
    grey = (loaded.images[:, 3:6] == ABSENT).flatten(1).all(dim=1)
    assert torch.equal(~grey, loaded.present["depth"])
    assert load_images(source, 8, limit=2, offset=2).present["depth"].tolist() == [True, False]


@pytest.mark.parametrize("random_crop", [False, True])
def test_the_stream_tells_what_is_there(random_crop, source):
    batches = stream_of(source, random_crop=random_crop)
    for batch in batches:
        assert torch.equal(batch.present["depth"], torch.from_numpy(source.present["depth"])[batch.indices])
        grey = (batch.images[:, 3:6] == ABSENT).flatten(1).all(dim=1)
        assert torch.equal(~grey, batch.present["depth"]) and set(batch.present) == {"depth"}
    assert same(batches, stream_of(source, random_crop=random_crop, num_workers=2))
    assert same(batches, stream_of(pickle.loads(pickle.dumps(source)), random_crop=random_crop))
    moved = batches[0].to("meta")
    assert moved.present["depth"].device.type == "meta" and moved.images.device.type == "meta"
    numbers = torch.arange(2)
    assert Batch(numbers, None, numbers, numbers).present == {}


def test_subsets_keep_sides_and_presence(source):
    part = Subset(source, np.array([3, 2]))
    assert part.side_names == source.side_names and part.present["depth"].tolist() == [False, True]
    assert load_images(part, 8).images.shape == (2, 9, 8, 8)
    assert spread(source, 2).present["depth"].tolist() == [False, True]


def test_a_broken_partner_leaves_its_item_out(source, caplog):
    file = Path(source.others["depth"].folder, "dog", "0.png")
    file.write_bytes(file.read_bytes()[:60])
    loaded = load_images(source, 8)
    assert loaded.indices.tolist() == [0, 1, 3, 4] and loaded.present["depth"].tolist() == [False, True, False, True]
    assert "dog/0.jpg is broken" in caplog.text and "its depth dog/0.png" in caplog.text


def test_arrays_as_sides(tmp_path):
    rng = np.random.default_rng(0)
    photos, maps = (rng.integers(0, 256, (6, 8, 8, 3), np.uint8) for _ in range(2))
    np.savez(tmp_path / "photos.npz", photos, np.arange(6) % 2)
    np.savez(tmp_path / "maps.npz", maps)
    source = open_sides(tmp_path / "photos.npz", {"map": tmp_path / "maps.npz"})
    assert source.is_array and not source.present and source.labels.tolist() == [0, 1] * 3
    expected = np.concatenate([photos, maps], axis=-1).transpose(0, 3, 1, 2)
    assert np.array_equal(load_images(source, 8).images.numpy(), expected)


def test_arrays_match_by_number_whatever_their_classes(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "photos.npz", images, np.array([0, -1, 1, 0]))
    for name, arrays in (
        ("plain", (images,)),
        ("other", (images, np.array([0, 0, 0, 1]))),
        ("short", (images[:3], np.array([1, -1, 1]))),
        ("long", (np.repeat(images, 2, axis=0),)),
    ):
        np.savez(tmp_path / f"{name}.npz", *arrays)
        source = open_sides(tmp_path / "photos.npz", {"map": tmp_path / f"{name}.npz"})
        assert source.partners["map"].tolist() == ([0, 1, 2, -1] if name == "short" else [0, 1, 2, 3])
        assert source.labels.tolist() == [0, -1, 1, 0] and bool(source.present) == (name == "short")


# ---------------------------------------------------------------- bad input


def test_messages(tmp_path):
    photos, depth = folder_of(PHOTOS, tmp_path, "photos"), folder_of(("cat/0_depth.png",), tmp_path, "depth")
    refuses(
        r"depth/set: no file has the name of one in .*photos/set; .* first are cat/0\.jpg there and cat/0_depth\.png here",
        photos,
        {"depth": depth},
    )
    twice = folder_of(("cat/0.png", "cat/0.webp"), tmp_path, "twice")
    refuses(r"cat/0\.png and cat/0\.webp of .*twice.* match the same file", photos, {"depth": twice})
    refuses(r"cat/0\.png and cat/0\.webp of .*twice.* match the same file", twice, {"photo": photos})
    refuses("photos/set: a side named image, as the main one is", photos, {"image": photos})
    refuses("no such file or folder", photos, {"depth": tmp_path / "none"})
    both = open_sides(photos, {"copy": photos})
    with pytest.raises(UserError, match="its items are not single images"):
        Sides(open_source(photos), {"both": both})
