"""Sources, crops, the order of the training stream, and broken images."""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from guided_mt.data import ImageStream, StreamOrder, center_crop_arr, load_images, open_source, random_crop_arr
from guided_mt.data.sources.folders import CloudFolderSource
from guided_mt.errors import UserError

SHARED = ROOT.parent / "shared" / "data"
CONTAINERS = ("folder", "tar", "zip", "zip-deflated", "npz", "npz-compressed")
CLASSES = ("cat", "dog", "emu")


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def make_files(count: int = 21, size: int = 12) -> dict[str, bytes]:
    """{CLASS/NNNN.png: PNG bytes}, in the order of their names."""
    rng = np.random.default_rng(0)
    files = {
        f"{CLASSES[i % 3]}/{i:04d}.png": png(rng.integers(0, 256, (size, size, 3), np.uint8)) for i in range(count)
    }
    return dict(sorted(files.items()))


def write(container: str, files: dict[str, bytes], folder: Path) -> Path:
    """The same files as a folder, archive or .npz."""
    if container == "folder":
        for name, content in files.items():
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).write_bytes(content)
        return folder / "set"
    if container == "tar":
        with tarfile.open(folder / "set.tar", "w") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo("./" + name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return folder / "set.tar"
    if container.startswith("zip"):
        method = zipfile.ZIP_DEFLATED if container == "zip-deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "set.zip", "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return folder / "set.zip"
    arrays = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files.values()])
    labels = [CLASSES.index(name.split("/")[0]) for name in files]
    save = np.savez_compressed if container == "npz-compressed" else np.savez
    save(folder / "set.npz", arrays, np.array(labels))
    return folder / "set.npz"


def stream_of(source, **kwargs) -> list:
    """All batches of a finite stream."""
    settings = {"seed": 3, "global_batch": 4, "total_steps": 12, "num_workers": 0} | kwargs
    with ImageStream(source, 8, **settings) as stream:
        return list(stream)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and torch.equal(x.positions, y.positions)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write("folder", make_files(), tmp_path)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_container_gives_the_same_images_and_labels(container, tmp_path, folder):
    (tmp_path / "other").mkdir()
    expected = load_images(open_source(folder), 12)
    source = open_source(write(container, make_files(), tmp_path / "other"))
    loaded = load_images(source, 12)
    assert loaded.images.shape == (21, 3, 12, 12) and loaded.images.dtype == torch.uint8
    assert torch.equal(loaded.images, expected.images)
    assert torch.equal(loaded.labels, expected.labels)
    assert source.class_names == (["0", "1", "2"] if "npz" in container else list(CLASSES))
    assert same(stream_of(source), stream_of(open_source(folder)))


@pytest.mark.parametrize("container", CONTAINERS)
def test_sources_are_picklable_and_small(container, tmp_path):
    source = open_source(write(container, make_files(), tmp_path))
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(load_images(copy, 12).images, load_images(source, 12).images)
    assert copy.class_names == source.class_names


@pytest.mark.parametrize("container", ["tar", "zip"])
def test_a_folder_inside_an_archive(container, tmp_path):
    files = make_files()
    inner = {f"{part}/{name}": content for part in ("train", "val", "validation") for name, content in files.items()}
    path = write(container, inner, tmp_path)
    assert len(open_source(path)) == 63
    source = open_source(path / "val")
    assert len(source) == 21 and source.name(0) == "cat/0000.png" and source.class_names == list(CLASSES)
    with pytest.raises(UserError, match=r"no folder trian .*did you mean train\?"):
        open_source(path / "trian")


def test_cloud_folders_through_blobfile(folder):
    source = CloudFolderSource(str(folder), None)
    assert torch.equal(load_images(source, 12).images, load_images(open_source(folder), 12).images)


def test_names_that_are_left_out_and_suffixes(tmp_path):
    content = next(iter(make_files().values()))
    good = ("a/x.PNG", "a/y.JpEg", "b/z.webp")
    bad = ("a/.hidden.png", ".thumbs/x.png", "__MACOSX/a/._x.png", "a/notes.txt")
    path = write("folder", dict.fromkeys(good + bad, content), tmp_path)
    assert list(open_source(path).names) == list(good)
    path = write("tar", dict.fromkeys(good + bad, content), tmp_path)
    assert list(open_source(path).names) == list(good)


def test_the_later_of_two_tar_members_counts(tmp_path):
    first, second = list(make_files().values())[:2]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (first, second):
            info = tarfile.TarInfo("a.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = open_source(tmp_path / "x.tar")
    assert len(source) == 1 and source.read_bytes(0) == second


def test_links_that_lead_back_up_end(folder):
    os.symlink(folder, folder / "cat" / "loop")
    os.symlink(folder / "dog", folder / "hound")  # a linked class folder counts
    assert open_source(folder).class_names == ["cat", "dog", "emu", "hound"]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("dog_1.png", "cat_2.png"), ["cat", "dog"]),
        (("dog_1.png", "cat.png"), []),
        (("a/dog_1.png", "b/cat.png"), ["a", "b"]),
        (("a/dog_1.png", "cat.png"), []),
    ],
)
def test_classes_from_folders_or_prefixes(names, classes, tmp_path):
    content = next(iter(make_files().values()))
    source = open_source(write("folder", dict.fromkeys(names, content), tmp_path))
    assert source.class_names == classes
    assert (source.labels is None) == (not classes)


def test_class_ids_from_saved_names(folder, tmp_path):
    source = open_source(folder, class_names=["emu", "ant", "dog", "cat"])
    assert source.class_names == ["emu", "ant", "dog", "cat"]
    assert [source.labels[i] for i in (0, 7, 20)] == [3, 2, 0]
    with pytest.raises(UserError, match=r"class 'dog' is not one of the 3 saved classes \(did you mean dogs\?\)"):
        open_source(folder, class_names=["cat", "dogs", "emu"])
    npz = write("npz", make_files(), tmp_path)
    assert open_source(npz, class_names=CLASSES).class_names == list(CLASSES)
    with pytest.raises(UserError, match="class id 2 in arr_1, but there are 2 saved classes"):
        open_source(npz, class_names=["a", "b"])


def test_digits_are_split_disjointly():
    train, test = open_source("builtin:digits"), open_source("builtin:digits-test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == test.class_names == [str(i) for i in range(10)]
    kept, held = ({s.read(i).tobytes() for i in range(len(s))} for s in (train, test))
    assert not kept & held
    images, labels, names, indices, present = load_images(train, 16, limit=5)
    assert not present
    assert indices.tolist() == list(range(5))
    assert images.shape == (5, 3, 16, 16) and names[0] == f"{labels[0]}/00000000.png"
    assert train.images.max() == 255 and train.images.min() == 0


def test_cifar10_straight_from_the_tar():
    if not (SHARED / "cifar10-train.tar").exists():
        pytest.skip("the shared CIFAR-10 archive is not here")
    source = open_source(SHARED / "cifar10-train.tar")
    assert len(source) == 50_000 and np.bincount(source.labels).tolist() == [5000] * 10
    assert source.class_names[0] == "airplane" and source.class_names[9] == "truck"
    with ImageStream(source, 32, seed=0, global_batch=16, num_workers=1) as stream:
        assert next(iter(stream)).images.shape == (16, 3, 32, 32)


def test_imagenette_folder_inside_the_tar():
    if not (SHARED / "imagenette-64.tar").exists():
        pytest.skip("the shared Imagenette archive is not here")
    train = open_source(SHARED / "imagenette-64.tar" / "train")
    assert len(train) == 2371 and len(train.class_names) == 10 and train.class_names[0] == "n01440764"
    assert len(open_source(SHARED / "imagenette-64.tar" / "val", class_names=train.class_names)) == 986


# ---------------------------------------------------------------- bad input


def test_messages_for_paths(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b\x08\x00rest")
    image = next(iter(make_files().values()))
    (tmp_path / "one.png").write_bytes(image)
    for path, message in (
        ("sett", r"sett: no such file or folder \(did you mean set"),
        ("empty", "no images in this folder"),
        ("notes.txt", "not a folder, .tar, .zip or .npz"),
        ("set.tar.gz", "compressed, .*gunzip"),
        ("one.png", "is one image; give the folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / path)
    with pytest.raises(UserError, match=r"did you mean digits\?"):
        open_source("builtin:digit")


@pytest.mark.parametrize("container", ["tar", "zip", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_truncated_archives(container, share, tmp_path):
    path = write(container, make_files(), tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"set\.\w+: not a whole"):
        open_source(path)


def test_tar_cut_between_two_members_or_damaged_in_a_header(tmp_path):
    path = write("tar", make_files(), tmp_path)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[10].offset
    path.write_bytes(content[:offset])
    with pytest.raises(UserError, match="not a whole tar"):
        open_source(path)
    path.write_bytes(content[:offset] + b"x" * 512 + content[offset + 512 :])
    with pytest.raises(UserError, match="not a whole tar"):
        open_source(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, r"no array arr_0 \(it has images\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "arr_0 is float32; images must be uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"channels first; save images.transpose\(0, 2, 3, 1\)"),
        ({"arr_0": np.zeros((4, 4, 3), np.uint8)}, "images must be"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "no images"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "arr_0 holds pickled objects, which are never loaded"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, r"arr_1 is \[3\] for 2 images"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "arr_1 must be class ids"),
    ],
)
def test_messages_for_npz(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x.npz")


# ---------------------------------------------------------------- crops


def test_center_crop_is_adms():
    array = np.random.default_rng(1).integers(0, 256, (70, 101, 3), np.uint8)
    image = Image.fromarray(array)
    halved = image.resize((50, 35), Image.Resampling.BOX)  # 35 >= 2 * 16: once more
    halved = halved.resize((25, 17), Image.Resampling.BOX)
    resized = np.asarray(halved.resize((round(25 * 16 / 17), 16), Image.Resampling.BICUBIC))
    left = (resized.shape[1] - 16) // 2
    assert np.array_equal(center_crop_arr(image, 16), resized[:, left : left + 16])
    assert np.array_equal(center_crop_arr(array, 70), array[:, 15:85])
    up = np.asarray(Image.fromarray(array[:8, :8]).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop_arr(array[:8, :8], 16), up)


def test_random_crop_covers_adms_range():
    array = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 60, 3))
    crops = [random_crop_arr(array, 16, uniforms=(s, y, 0.5)) for s in (0.0, 0.999) for y in (0.0, 0.999)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert np.array_equal(crops[0], crops[1])  # scale 1: the whole height
    assert crops[2].max() < 33 and crops[3].min() > 6  # scale 0.8: top and bottom differ


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_image_modes_become_rgb(mode, tmp_path):
    grey = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    name = "x.jpg" if mode == "CMYK" else "x.png"
    image.save(tmp_path / name)
    array = center_crop_arr(open_source(tmp_path).read(0), 16)
    assert array.shape == (16, 16, 3) and array.dtype == np.uint8
    if mode in ("L", "LA", "RGBA", "I;16"):
        assert np.array_equal(array[..., 0], grey)


# ---------------------------------------------------------------- the stream


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("count", [17, 20, 23])
def test_every_image_exactly_once_per_epoch(world_size, count, tmp_path):
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))
    np.savez(tmp_path / "x.npz", images)
    source = open_source(tmp_path / "x.npz")
    steps = 3 * count  # 12 epochs of batches of 4
    ranks = [stream_of(source, rank=r, world_size=world_size, total_steps=steps) for r in range(world_size)]
    seen = torch.cat([b.images[:, 0, 0, 0] for step in zip(*ranks, strict=True) for b in step]).reshape(12, count)
    assert torch.equal(seen.sort(dim=1).values, torch.arange(count, dtype=torch.uint8).expand(12, count))
    assert not torch.equal(seen[0], seen[1])
    assert ranks[0][0].labels is None


def test_order_is_a_pure_function_of_the_position():
    order = StreamOrder(10, seed=-5)
    positions = np.random.default_rng(0).integers(0, 100, 200)
    expected = np.concatenate([StreamOrder(10, -5).indices(np.arange(e * 10, e * 10 + 10)) for e in range(10)])
    assert np.array_equal(order.indices(positions), expected[positions])
    assert not np.array_equal(StreamOrder(10, 6).indices(np.arange(10)), expected[:10])
    # guards the data order of every saved run
    assert StreamOrder(8, 0).indices(np.arange(8)).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("random_crop", [False, True])
def test_stream_does_not_depend_on_workers_or_world_size(random_crop, folder):
    source = open_source(folder)
    one = stream_of(source, random_crop=random_crop)
    assert same(one, stream_of(source, random_crop=random_crop, num_workers=2))
    halves = [stream_of(source, random_crop=random_crop, rank=r, world_size=2) for r in range(2)]
    for whole, first, second in zip(one, *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
        assert torch.equal(whole.labels, torch.cat([first.labels, second.labels]))
        assert torch.equal(whole.positions, torch.cat([first.positions, second.positions]))
    assert one[0].images.is_contiguous()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_is_starting_at_a_step(num_workers, folder):
    source = open_source(folder)
    whole = stream_of(source)
    assert same(whole[5:], stream_of(source, start_step=5, num_workers=num_workers))
    assert stream_of(source, start_step=12, num_workers=num_workers) == []
    assert whole[5].positions.tolist() == [20, 21, 22, 23]


def test_stream_leaves_the_global_random_state_alone(folder):
    state = torch.get_rng_state()
    stream_of(open_source(folder), num_workers=1)
    assert torch.equal(state, torch.get_rng_state())


def test_messages_for_batches(folder):
    source = open_source(folder)
    with pytest.raises(UserError, match="global batch of 10 does not divide by 4 processes"):
        ImageStream(source, 8, seed=0, global_batch=10, world_size=4)
    with pytest.raises(UserError, match="21 images are fewer than a global batch of 22"):
        ImageStream(source, 8, seed=0, global_batch=22)


END_EARLY = """
import os, signal, sys
from guided_mt.data import ImageStream, open_source

stream = ImageStream(open_source(sys.argv[1]), 8, seed=0, global_batch=4, num_workers=2)
batches = iter(stream)
next(batches)
assert [w.is_alive() for i in stream._iterators for w in i._workers] == [True, True]
if sys.argv[2] == "group":  # as a launcher does: everyone gets the signal, and the main process goes on
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: print("asked", flush=True))
        os.killpg(0, number)
    for _ in range(20):
        next(batches)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", "group", "kill"])
def test_no_worker_outlives_the_process(how, folder):
    command = [sys.executable, "-c", END_EARLY, str(folder), how]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )
    output, _ = process.communicate(timeout=120)  # ends only when the workers, who hold the pipe too, have ended
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 0), output
    assert output.count("asked") == (3 if how == "group" else 0)


# ---------------------------------------------------------------- broken images


def break_files(folder: Path, numbers: list[int]) -> list[str]:
    names = sorted(p for p in folder.rglob("*.png"))
    for number in numbers:
        names[number].write_bytes(names[number].read_bytes()[:100])
    return [names[number].relative_to(folder).as_posix() for number in numbers]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_broken_image_is_replaced_by_the_next(num_workers, folder, caplog):
    whole = load_images(open_source(folder), 8)
    (name,) = break_files(folder, [6])
    with caplog.at_level(logging.WARNING, "guided_mt"):
        batches = stream_of(open_source(folder), num_workers=num_workers, total_steps=21)
    warnings = [r.getMessage() for r in caplog.records if r.name == "guided_mt"]
    assert len(warnings) == 1 and name in warnings[0]
    order = StreamOrder(21, 3).indices(np.arange(84))
    images, labels = (torch.cat([getattr(b, key) for b in batches]) for key in ("images", "labels"))
    expected = np.where(order == 6, 7, order)
    assert torch.equal(images, whole.images[expected]) and torch.equal(labels, whole.labels[expected])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_over_one_percent_broken_ends_the_stream(num_workers, folder, caplog):
    break_files(folder, [6, 7])
    with pytest.raises(UserError, match=r"2 of 21 images are broken, over 1 %"):
        stream_of(open_source(folder), num_workers=num_workers, total_steps=21)


def test_a_single_broken_image_alone_ends_the_stream(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="1 of 1 images are broken"):
        stream_of(open_source(tmp_path), global_batch=1)


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path):
    path = write("zip", make_files(), tmp_path)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(bytes(content))
    assert len(load_images(open_source(path), 8).images) == 20


def test_load_images_leaves_broken_ones_out(folder):
    (name,) = break_files(folder, [2])
    loaded = load_images(open_source(folder), 8, limit=4, offset=1)
    assert len(loaded.images) == len(loaded.labels) == len(loaded.names) == 3 and name not in loaded.names
    with pytest.raises(UserError, match="no image from number 21 on"):
        load_images(open_source(folder), 8, offset=21)
