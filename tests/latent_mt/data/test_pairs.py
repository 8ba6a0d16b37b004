"""Pairs: layouts, exact label maps, the same window for both sides, the stream, and what the data section builds."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from evaluations.files.palettes import CITYSCAPES
from guided_mt.data import ImageStream, load_images
from guided_mt.data.subset import spread
from guided_mt.data.transforms import center_crop_arr, random_crop_arr
from guided_mt.errors import UserError
from latent_mt.data import ImageData, PairData, open_pairs
from latent_mt.data.label_maps import CITYSCAPES_VOID_COLOURS
from latent_mt.data.ordered import ordered_batches

SHARED = ROOT.parent / "shared" / "data"
CONTAINERS = ("folder", "tar", "zip")
CLASSES = "# index name R G B\n0 Sky 128 128 128\n1 Road 128 64 128\n2 Car 64 0 128\n9 Unlabelled 0 0 0\n"
COLOURS = {0: (128, 128, 128), 1: (128, 64, 128), 2: (64, 0, 128), 9: (0, 0, 0)}
GROUND_COLOUR = {label: CITYSCAPES_VOID_COLOURS[k] for label, k in ((0, 0), (5, 1), (6, 2), (9, 3), (29, 8))}


def png(array: np.ndarray, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, suffix)
    return buffer.getvalue()


def write(container: str, files: dict[str, bytes], folder: Path, name: str = "set") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if container == "folder":
        for file, content in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_bytes(content)
        return folder / name
    path = folder / f"{name}.{container}"
    if container == "tar":
        with tarfile.open(path, "w") as archive:
            for file, content in files.items():
                info = tarfile.TarInfo(file)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


def blocks(rng: np.random.Generator, height: int, width: int, values) -> np.ndarray:
    """A label map of 3 x 3 pixel blocks, so that smoothing would show."""
    coarse = rng.choice(np.array(values, dtype=np.uint8), (height // 3 + 1, width // 3 + 1))
    return coarse.repeat(3, axis=0).repeat(3, axis=1)[:height, :width]


def camvid_files(count: int = 10, height: int = 24, width: int = 36) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {"classes.txt": CLASSES.encode(), "README.txt": b"hello"}
    for split in ("train", "val"):
        for k in range(count if split == "train" else 3):
            files[f"{split}/images/f{k}.jpg"] = png(rng.integers(0, 256, (height, width, 3), np.uint8), "JPEG")
            files[f"{split}/labels/f{k}.png"] = png(blocks(rng, height, width, list(COLOURS)))
    return files


def cityscapes_files(kinds=("labelIds", "color"), height: int = 16, width: int = 32) -> dict[str, bytes]:
    """Five pairs; the map of kind color is what cityscapesScripts would paint for labelIds."""
    rng = np.random.default_rng(1)
    paint = {7: 0, 8: 1, 11: 2, 23: 10, 26: 13}  # label id: training id
    files = {"README": b"", "license.txt": b""}
    for k, city in enumerate(("aachen", "aachen", "bochum", "ulm", "zurich")):
        name = f"train/{city}/{city}_{k:06d}_000019"
        ids = blocks(rng, height, width, [*paint, *GROUND_COLOUR])
        colour = np.zeros((height, width, 4), dtype=np.uint8)
        colour[..., 3] = 255
        for label in np.unique(ids).tolist():
            colour[ids == label, :3] = CITYSCAPES[paint[label]].colour if label in paint else GROUND_COLOUR[label]
        train_ids = np.vectorize(lambda label: paint.get(label, 255))(ids).astype(np.uint8)
        files[f"leftImg8bit/{name}_leftImg8bit.png"] = png(rng.integers(0, 256, (height, width, 3), np.uint8))
        arrays = {"labelIds": ids, "color": colour, "labelTrainIds": train_ids, "instanceIds": ids}
        for kind in (*kinds, "instanceIds"):
            files[f"gtFine/{name}_gtFine_{kind}.png"] = png(arrays[kind])
    return files


def aligned_files(width: int = 48, height: int = 24) -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    names = [f"train/p{k}.png" for k in range(10)] + ["val/p0.png", "val/p1.png"]
    return {name: png(rng.integers(0, 256, (height, width, 3), np.uint8)) for name in names}


FILES = {"camvid": camvid_files, "cityscapes": cityscapes_files, "aligned": aligned_files}


def items_of(source, size: int = 8) -> np.ndarray:
    return load_images(source, size).images.numpy()


def colours_of(image: np.ndarray) -> set[tuple[int, ...]]:
    """Of uint8 [3, s, s]."""
    return set(map(tuple, image.reshape(3, -1).T.tolist()))


def stream_of(source, **kwargs) -> list:
    settings = {"seed": 3, "global_batch": 4, "total_steps": 8, "num_workers": 0, "random_crop": True} | kwargs
    with ImageStream(source, 8, **settings) as stream:
        return list(stream)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.positions, y.positions) for x, y in zip(a, b, strict=True)
    )


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("above", ["", "Download/"])
def test_each_container_gives_the_same_pairs(layout, above, tmp_path):
    files = {above + name: content for name, content in FILES[layout]().items()} | {"NOTES.txt": b"by me"}
    sources = [open_pairs(write(c, files, tmp_path / c)) for c in CONTAINERS]
    first = items_of(sources[0])
    assert first.shape == (len(sources[0]), 6, 8, 8) and first.dtype == np.uint8
    for source in sources:
        copy = pickle.loads(pickle.dumps(source))
        assert np.array_equal(items_of(source), first) and np.array_equal(items_of(copy), first)
        assert [source.name(k) for k in range(len(source))] == [sources[0].name(k) for k in range(len(source))]
        assert source.labels is None and [side.name for side in source.sides] == [
            side.name for side in sources[0].sides
        ]
    inside = open_pairs(tmp_path / "zip" / "set.zip" / above) if above else sources[0]
    assert np.array_equal(items_of(inside), first)
    named = open_pairs(tmp_path / "tar" / "set.tar", layout=layout, limit=2)
    assert len(named) == 2 and np.array_equal(items_of(named), first[:2])


def test_aligned_sides_and_directions(tmp_path):
    path = write("zip", aligned_files(), tmp_path)
    whole = np.asarray(Image.open(io.BytesIO(aligned_files()["train/p3.png"])))
    left, right = (
        center_crop_arr(np.ascontiguousarray(half), 24).transpose(2, 0, 1) for half in np.split(whole, 2, axis=1)
    )
    a_to_b = open_pairs(path, sides=("day", "night"))
    b_to_a = open_pairs(path, sides=("day", "night"), direction="BtoA")
    assert np.array_equal(a_to_b.decode(3, 24), np.concatenate([left, right]))
    assert np.array_equal(b_to_a.decode(3, 24), np.concatenate([right, left]))
    assert [s.name for s in a_to_b.sides] == ["day", "night"] and [s.name for s in b_to_a.sides] == ["night", "day"]
    assert [s.name for s in open_pairs(path, split="val").sides] == ["A", "B"] and len(
        open_pairs(path, split="val")
    ) == 2
    with pytest.raises(UserError, match="day and night are images; there are no label maps"):
        a_to_b.label_map(0, 8)


def test_a_photo_and_a_map_in_both_directions(tmp_path):
    path = write("tar", camvid_files(), tmp_path)
    first, second = open_pairs(path), open_pairs(path, direction="BtoA")
    assert [(s.name, s.kind) for s in first.sides] == [("photo", "image"), ("map", "labels")]
    assert [s.name for s in second.sides] == ["map", "photo"] and second.direction == "BtoA"
    assert np.array_equal(first.decode(2, 8), np.roll(second.decode(2, 8), 3, axis=0))
    assert np.array_equal(first.label_map(2, 8), second.label_map(2, 8))
    assert first.class_names == ["Sky", "Road", "Car"]
    assert [entry.name for entry in first.sides[1].palette.void] == ["Unlabelled"]


def test_all_kinds_of_cityscapes_maps_are_the_same(tmp_path):
    found = [
        open_pairs(write("folder", cityscapes_files((kind,)), tmp_path / kind))
        for kind in ("labelIds", "labelTrainIds", "color")
    ]
    assert found[0].class_names == [entry.name for entry in CITYSCAPES[:19]]
    for source in found:
        assert len(source) == 5 and source.name(0).endswith("train/aachen/aachen_000000_000019_leftImg8bit.png")
        assert np.array_equal(items_of(source, 16), items_of(found[0], 16))
        assert np.array_equal(source.label_map(1, 16), found[0].label_map(1, 16))
    assert set(np.unique(found[0].label_map(0, 16))) <= {0, 1, 2, 10, 13, 255}
    black = found[0].decode(0, 16)[3:, found[0].label_map(0, 16) == 255]
    assert black.size and not black.any()


def test_the_two_zips_of_cityscapes(tmp_path):
    files = cityscapes_files()
    one = open_pairs(write("tar", files, tmp_path))
    folder = tmp_path / "zips"
    for part in ("leftImg8bit", "gtFine"):
        chosen = {name: content for name, content in files.items() if name.startswith(part) or "/" not in name}
        write("zip", chosen, folder, f"{part}_trainvaltest")
    two = open_pairs(folder)
    assert np.array_equal(items_of(one), items_of(two)) and two.name(0) == one.name(0)
    with pytest.raises(UserError, match="no label maps gtFine"):
        open_pairs(folder / "leftImg8bit_trainvaltest.zip")
    (folder / "gtFine_trainvaltest.zip").unlink()
    with pytest.raises(UserError, match=r"no gtFine_trainvaltest\.zip"):
        open_pairs(folder)


@pytest.mark.parametrize(("name", "counts"), [("camvid-256", (367, 101, 233)), ("daynight-128", (354, 51))])
def test_shared_archives(name, counts):
    path = SHARED / f"{name}.tar"
    if not path.exists():
        pytest.skip(f"the shared archive {name} is not here")
    for split, count in zip(("train", "val", "test"), counts, strict=False):
        source = open_pairs(path, split=split)
        assert len(source) == count and source.decode(count - 1, 16).shape == (6, 16, 16)
    if name == "camvid-256":
        allowed = {entry.colour for entry in source.sides[1].palette.classes + source.sides[1].palette.void}
        assert all(colours_of(source.decode(k, 40)[3:]) <= allowed for k in range(0, 200, 40))


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("size", [1, 7, 8, 20, 24, 31])
@pytest.mark.parametrize("scale", [1, 4])
def test_maps_keep_their_colours_and_their_place(size, scale, tmp_path):
    """At any size and crop the map side has palette colours alone; a photo that shows the map lies where the map does."""
    rng = np.random.default_rng(3)
    classes = blocks(rng, 24, 36, [0, 1, 2, 9])
    painted = np.array([COLOURS.get(k, (0, 0, 0)) for k in range(10)], dtype=np.uint8)[classes]
    files = {
        "classes.txt": CLASSES.encode(),
        "train/images/x.png": png(painted),
        "train/labels/x.png": png(classes.repeat(scale, 0).repeat(scale, 1)),  # maps may be larger than photos
    }
    source = open_pairs(write("tar", files, tmp_path))
    for uniforms in (None, np.array([0.0, 0.0, 0.999]), np.array([0.999, 0.999, 0.2])):
        item = source.decode(0, size, uniforms)
        assert item.shape == (6, size, size) and colours_of(item[3:]) <= set(COLOURS.values())
        crop = center_crop_arr if uniforms is None else random_crop_arr
        options = {} if uniforms is None else {"uniforms": uniforms}
        expected = crop(Image.fromarray(painted), size, **options)
        assert np.array_equal(item[:3], expected.transpose(2, 0, 1))  # photos as ADM crops them
        if size >= 20:
            off = np.abs(item[:3].astype(int) - item[3:]).max(axis=0) > 64
            assert off.mean() < 0.35  # only edges differ; another window has over 0.6 off
    true = source.label_map(0, size)
    assert true.dtype == np.uint8 and true.shape == (size, size)
    repainted = np.array([COLOURS.get(k, (0, 0, 0)) for k in range(10)], dtype=np.uint8)[true]
    assert np.array_equal(repainted.transpose(2, 0, 1), source.decode(0, size)[3:])
    if size == 24:
        assert np.array_equal(true, classes[:, 6:30])  # nothing to resize: the middle, exactly


def test_a_map_may_be_smaller_with_rounded_sides(tmp_path):
    rng = np.random.default_rng(4)
    files = camvid_files(count=1, height=99, width=150)
    files["train/labels/f0.png"] = png(blocks(rng, 33, 50, [0, 1]))
    assert open_pairs(write("tar", files, tmp_path)).label_map(0, 8).shape == (8, 8)


@pytest.mark.parametrize("mode", ["L", "P", "1", "2 bits", "4 bits", "I;16", "RGB", "RGBA", "painted P"])
def test_label_files_of_any_mode(mode, tmp_path):
    rng = np.random.default_rng(5)
    classes = blocks(rng, 24, 24, [0, 1] if mode == "1" else [0, 1, 2])
    painted = np.array([COLOURS[k] for k in range(3)], dtype=np.uint8)[classes]
    if mode.endswith("bits"):
        content = grey_png(classes, int(mode[0]))
    else:
        image = {
            "L": lambda: Image.fromarray(classes),
            "P": lambda: with_table(classes, [(9, 9, 9), (1, 2, 3), (7, 7, 7)]),
            "1": lambda: Image.fromarray(classes * 255).convert("1"),
            "I;16": lambda: Image.fromarray(classes.astype(np.uint16)),
            "RGB": lambda: Image.fromarray(painted),
            "RGBA": lambda: Image.fromarray(painted).convert("RGBA"),
            "painted P": lambda: with_table((classes + 1) % 3, [COLOURS[2], COLOURS[0], COLOURS[1]]),
        }[mode]()
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
    files = camvid_files(1, 24, 24) | {"train/labels/f0.png": content}
    assert np.array_equal(open_pairs(write("tar", files, tmp_path)).label_map(0, 24), classes)


def with_table(indices: np.ndarray, colours) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def grey_png(indices: np.ndarray, bits: int) -> bytes:
    """A greyscale PNG of 2 or 4 bits, which Pillow cannot write."""
    import struct
    import zlib

    height, width = indices.shape
    per_byte = 8 // bits
    shifts = np.arange(per_byte - 1, -1, -1) * bits
    packed = (indices.reshape(height, width // per_byte, per_byte) << shifts).sum(-1).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- the stream


def test_stream_does_not_depend_on_workers_or_world_size(tmp_path):
    source = open_pairs(write("tar", camvid_files(), tmp_path))
    one = stream_of(source)
    assert one[0].images.shape == (4, 6, 8, 8) and one[0].labels is None
    assert same(one, stream_of(source, num_workers=2))
    for world_size in (2, 4):
        ranks = [stream_of(source, rank=r, world_size=world_size) for r in range(world_size)]
        for whole, *parts in zip(one, *ranks, strict=True):
            assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
            assert torch.equal(whole.positions, torch.cat([part.positions for part in parts]))
    allowed = set(COLOURS.values())
    assert all(colours_of(item[3:].numpy()) <= allowed for batch in one for item in batch.images)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_is_starting_at_a_step(num_workers, tmp_path):
    source = open_pairs(write("zip", aligned_files(), tmp_path))
    whole = stream_of(source)
    assert same(whole[3:], stream_of(source, start_step=3, num_workers=num_workers))


def test_one_broken_pair_is_replaced(tmp_path, caplog):
    files = camvid_files()
    files["train/labels/f4.png"] = files["train/labels/f4.png"][:60]
    source = open_pairs(write("folder", files, tmp_path))
    batches = stream_of(source, random_crop=False, num_workers=2)
    assert 4 not in torch.cat([batch.indices for batch in batches])
    assert "f4.png" in caplog.text and "images/f4.jpg" in caplog.text
    assert len(load_images(source, 8).images) == 9
    assert len(spread(source, 3)) == 3 and load_images(spread(source, 3), 8).images.shape == (3, 6, 8, 8)


# ---------------------------------------------------------------- bad input


def refuses(message: str, path: Path, **kwargs) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_pairs(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_messages_for_settings(tmp_path):
    path = write("tar", camvid_files(), tmp_path)
    refuses(
        r"layout 'camvod': must be one of auto, cityscapes, aligned, camvid, folders \(did you mean camvid\?\)",
        path,
        layout="camvod",
    )
    refuses(r"direction 'AtoC': must be one of AtoB, BtoA", path, direction="AtoC")
    refuses(r"no split vall \(did you mean val\?\); there is train, val", path, split="vall")
    refuses("limit 0: must be at least 1", path, limit=0)
    refuses("two different names", path, sides=("a", "a"))
    refuses("two different names", path, sides="ab")
    refuses(r"none\.txt: cannot be read \(No such file", path, classes=tmp_path / "none.txt")
    aligned = write("tar", aligned_files(), tmp_path, "pix")
    refuses("only the layout camvid takes a class file", aligned, classes="x.txt")
    refuses("no split test; there is train, val", aligned, split="test")
    refuses("no such file or folder", tmp_path / "absent")


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("container", ["tar", "zip"])
def test_truncated_archives(layout, container, tmp_path):
    path = write(container, FILES[layout](), tmp_path)
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    refuses(r"set\.\w+: not a whole", path)


def test_what_was_looked_for(tmp_path):
    flat = {f"x{k}.png": png(np.zeros((4, 4, 3), np.uint8)) for k in range(3)}
    message = r"none of the layouts .*cityscapes.*camvid.*aligned.*the first file is x0\.png"
    refuses(message, write("tar", flat, tmp_path))
    refuses("no folders", tmp_path / "set.tar", layout="aligned")
    refuses("no photos leftImg8bit|no label maps gtFine", tmp_path / "set.tar", layout="cityscapes")


def test_photos_and_maps_that_do_not_match(tmp_path):
    files = camvid_files()
    for k in (1, 2, 3, 5, 7, 8):
        del files[f"train/labels/f{k}.png"]
    five = r"f1\.jpg, train/images/f2\.jpg, train/images/f3\.jpg, train/images/f5\.jpg, train/images/f7\.jpg, \.\.\."
    refuses(
        f"10 photos and 4 label maps; 6 without a label map: train/images/{five}", write("tar", files, tmp_path, "a")
    )
    files = camvid_files()
    files["train/labels/g.png"] = files.pop("train/labels/f9.png")
    del files["train/images/f9.jpg"]
    refuses(r"9 photos and 10 label maps; 1 without a photo: train/labels/g\.png$", write("tar", files, tmp_path, "b"))
    files = camvid_files()
    files["train/images/f1.png"] = files["train/images/f1.jpg"]
    refuses(r"f1\.\w+ and .*f1\.\w+ differ only in their suffix", write("tar", files, tmp_path, "c"))
    files = camvid_files()
    files["train/labels/f1.jpg"] = files.pop("train/labels/f1.png")
    refuses(r"labels/f1\.jpg: label maps must be PNG", write("tar", files, tmp_path, "d"))
    files = cityscapes_files()
    del files["gtFine/train/ulm/ulm_000003_000019_gtFine_labelIds.png"]
    del files["gtFine/train/ulm/ulm_000003_000019_gtFine_color.png"]
    refuses(r"1 without a label map: leftImg8bit/train/ulm/ulm_000003_000019_left", write("tar", files, tmp_path, "e"))


def test_class_files(tmp_path):
    files = camvid_files()
    del files["classes.txt"]
    path = write("tar", files, tmp_path)
    refuses(r"no classes\.txt \(one line per class: index name R G B\)", path)
    (tmp_path / "own.txt").write_text(CLASSES)
    assert open_pairs(path, classes=tmp_path / "own.txt").class_names == ["Sky", "Road", "Car"]
    for content, message in (
        ("0 Sky 1 2\n", r"classes\.txt, line 1: expected"),
        ("0 Sky 1 2 3\n300 Far 4 5 6\n", "class index 300: label maps here have indices 0 to 255"),
        ("0 void 0 0 0\n", "no class to score"),
    ):
        refuses(message, write("zip", files | {"classes.txt": content.encode()}, tmp_path))


def broken_item(files: dict[str, bytes], folder: Path) -> str:
    """What the first item is refused with, which has to be the same from a worker process."""
    source = open_pairs(write("tar", files, folder))
    with pytest.raises(UserError) as caught:
        source.decode(0, 8)
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=re.escape(str(caught.value))):
            stream_of(source, global_batch=len(source), num_workers=num_workers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_maps_that_are_not_of_their_classes(tmp_path):
    files = camvid_files(2, 24, 36)
    wrong = np.zeros((24, 36), np.uint8)
    wrong[3, :5] = 7
    message = broken_item(files | {"train/labels/f0.png": png(wrong)}, tmp_path)
    assert (
        "train/labels/f0.png: index 7 (5 pixels) is none of the classes" in message and "they are 0, 1, 2, 9" in message
    )
    message = broken_item(files | {"train/labels/f0.png": png(wrong.astype(np.uint16) * 100)}, tmp_path)
    assert "index 700 (5 pixels)" in message
    colours = np.full((24, 36, 3), COLOURS[2], np.uint8)
    colours[0, 0], colours[0, 1] = (64, 0, 129), (64, 3, 132)
    message = broken_item(files | {"train/labels/f0.png": png(colours)}, tmp_path)
    assert "f0.png: 2 of 864 pixels have no colour of" in message and "the nearest is 1.0 to 5.0 away in RGB" in message
    city = cityscapes_files(("labelIds",))
    name = next(name for name in city if name.endswith("labelIds.png"))
    assert "index 34 (" in broken_item(city | {name: png(np.full((16, 32), 34, np.uint8))}, tmp_path)


def test_sizes_that_do_not_fit(tmp_path):
    files = camvid_files(1)
    files["train/labels/f0.png"] = png(np.zeros((24, 35), np.uint8))
    message = broken_item(files, tmp_path)
    assert "f0.jpg has 36x24 pixels and its map train/labels/f0.png 35x24: not the same aspect ratio" in message
    files["train/labels/f0.png"] = png(np.zeros((48, 48), np.uint8))
    assert "not the same aspect ratio" in broken_item(files, tmp_path)
    odd = {"train/p0.png": aligned_files(width=49)["train/p0.png"]}
    assert "train/p0.png is 49 pixels wide" in broken_item(odd, tmp_path)


# ---------------------------------------------------------------- the data section


def test_pair_data(tmp_path):
    path = write("tar", camvid_files(), tmp_path)
    data = PairData(str(path), 8, 2, val_split="val", random_flip=True, num_workers=0)
    assert len(data.source) == 10 and len(data.val_source) == 3 and data.random_flip
    with data.stream(seed=1, total_steps=4, accumulate=2) as stream:
        whole = list(stream)
    assert [batch.positions.tolist() for batch in whole] == [[2 * k, 2 * k + 1] for k in range(8)]
    with data.stream(seed=1, start_step=1, total_steps=4, accumulate=2) as stream:
        assert same(whole[2:], list(stream))
    parts = []
    for rank in range(2):
        with data.stream(seed=1, rank=rank, world_size=2, total_steps=4) as stream:
            parts.append(list(stream))
    # two processes see at each step what one process sees in two passes
    assert same(whole, [batch for step in zip(*parts, strict=True) for batch in step])
    assert len(PairData(str(path), 8, 2, limit=4).open().source) == 4 and PairData(str(path), 8, 2).val_source is None
    batches = list(ordered_batches(data.val_source, 8, 2, num_workers=1))
    assert [batch.positions.tolist() for batch in batches] == [[0, 1], [2]]
    assert torch.equal(torch.cat([batch.images for batch in batches]), load_images(data.val_source, 8).images)


def test_nothing_is_opened_before_it_is_needed():
    data = PairData("absent.tar", 8, 2)
    with pytest.raises(UserError, match=r"absent\.tar: no such file"):
        data.open()
    ImageData("absent.tar", 8, 2)


def test_image_data(tmp_path):
    data = ImageData("builtin:digits", 8, 16, val_path="builtin:digits-test", limit=50, num_workers=0).open()
    assert len(data.source) == 50 and len(data.val_source) == 50
    assert data.source.class_names == data.val_source.class_names == [str(k) for k in range(10)]
    with data.stream(seed=0, total_steps=1) as stream:
        (batch,) = stream
    assert batch.images.shape == (16, 3, 8, 8) and batch.labels.shape == (16,)
    with pytest.raises(
        UserError, match=r"50 items are fewer than 4 process.* data\.params\.batch_size 16; lower batch_size"
    ):
        data.stream(seed=0, world_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, r"data\.params\.image_size 0: must be at least 1"),
        ({"batch_size": 0}, r"data\.params\.batch_size 0: must be at least 1"),
        ({"num_workers": -1}, r"data\.params\.num_workers -1: must be at least 0"),
        ({"direction": "up"}, r"data\.params\.direction 'up': must be one of AtoB, BtoA"),
        ({"layout": "pix2pix"}, r"data\.params\.layout 'pix2pix'"),
        ({"latents": "x", "random_crop": True}, "cached latents are of centre crops"),
    ],
)
def test_messages_for_data_settings(settings, message):
    with pytest.raises(UserError, match=message):
        PairData(**({"path": "x", "image_size": 8, "batch_size": 2} | settings))
