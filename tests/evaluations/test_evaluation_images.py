"""evaluations/files/images.py: one set of images through every kind of file, in little memory; bad input is one clear line."""

from __future__ import annotations

import builtins
import io
import os
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from evaluations.errors import EvaluationError
from evaluations.files.image_files import ImageFile, decode, image_files
from evaluations.files.images import open_images

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 6, 10, 3), np.uint8)
KINDS = ("npz", "packed.npz", "npy", "folder", "zip", "packed.zip", "tar", "parquet", "parquet folder")


def encode(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_npz(path: Path, *args: np.ndarray, **arrays: np.ndarray) -> Path:
    np.savez(path, *args, **arrays)
    return path


def write_parquet(path: Path, column: pa.Array, name: str = "image") -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"label": list(range(len(column))), name: column}), path, row_group_size=4)
    return path


def structs(files: dict[str, bytes]) -> pa.Array:
    return pa.array([{"bytes": data, "path": name} for name, data in files.items()])


def write(folder: Path, kind: str, images: np.ndarray = IMAGES) -> Path:
    """The images as one kind of input; in archives in another order than that of their names."""
    files = {f"{'ab'[i // 6]}/{i:02d}.png": encode(image) for i, image in enumerate(images)}
    shuffled = dict(sorted(files.items(), key=lambda item: item[0][::-1], reverse=True))
    match kind:
        case "npz":
            return write_npz(folder / "a.npz", images, np.arange(len(images)), mask=np.ones(3))
        case "packed.npz":
            np.savez_compressed(folder / "b.npz", images)
            return folder / "b.npz"
        case "npy":
            np.save(folder / "a.npy", images)
            return folder / "a.npy"
        case "folder":
            return write_files(folder / "images", shuffled)
        case "zip":
            return write_zip(folder / "a.zip", shuffled)
        case "packed.zip":
            return write_zip(folder / "b.zip", shuffled, zipfile.ZIP_DEFLATED)
        case "tar":
            return write_tar(folder / "a.tar", {f"./{name}": data for name, data in shuffled.items()})
        case "parquet":
            return write_parquet(folder / "a.parquet", pa.array(list(files.values())), "png")
        case "parquet folder":
            first = dict(list(files.items())[:5])
            second = dict(list(files.items())[5:])
            write_parquet(folder / "hf" / "train-1.parquet", structs(second))
            return write_parquet(folder / "hf" / "train-0.parquet", structs(first)).parent
    raise ValueError(kind)


# what comes out


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    return {kind: write(folder, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_every_kind_gives_the_same_images_in_order(kind, workers, batch_size, written):
    images = open_images(written[kind])
    assert (images.count, images.height, images.width, images.statistics) == (11, 6, 10, {})
    batches = list(images.batches(batch_size, workers))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    got = np.concatenate(batches)
    assert got.dtype == np.uint8 and np.array_equal(got, IMAGES)
    assert np.array_equal(np.concatenate(list(images.batches(batch_size, workers))), IMAGES)  # a second pass


@pytest.mark.parametrize("kind", KINDS)
def test_content_hash_follows_the_content(kind, written, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    again, other = write(tmp_path / "again", kind), write(tmp_path / "other", kind, IMAGES[::-1])
    digest = open_images(again).content_hash()
    assert len(bytes.fromhex(digest)) == 32
    if "zip" not in kind and kind not in ("npz", "packed.npz"):  # a zip holds the time of writing
        assert digest == open_images(written[kind]).content_hash()
    assert digest == open_images(again).content_hash() != open_images(other).content_hash()


def test_content_hash_of_a_folder_covers_names(tmp_path):
    folder = write(tmp_path, "folder")
    before = open_images(folder).content_hash()
    (folder / "a" / "00.png").rename(folder / "a" / "0.png")
    assert open_images(folder).content_hash() != before


def test_arguments_out_of_range_are_refused_at_once(written):
    images = open_images(written["npz"])
    for arguments in ((0,), (1, -1)):
        with pytest.raises(ValueError, match="out of range"):
            images.batches(*arguments)


# resources


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_npz_is_streamed(workers, tmp_path):
    path, batch = tmp_path / "big.npz", 16
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        header = {"shape": (2000, 256, 256, 3), "fortran_order": False, "descr": "|u1"}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(125):
            member.write(bytes(16 * 256 * 256 * 3))
    tracemalloc.start()
    try:
        batches = open_images(path).batches(batch, workers)
        assert len(next(batches)) == batch
        threading.Event().wait(0.2)  # a consumer that stops to think
        assert sum(len(images) for images in batches) == 2000 - batch
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * batch * 256 * 256 * 3 < 60e6


def test_few_images_are_decoded_ahead(tmp_path):
    images = open_images(write_zip(tmp_path / "a.zip", {f"{i:03d}.png": encode(IMAGES[0]) for i in range(200)}))
    decoded: list[str] = []
    files = [
        ImageFile(file.name, lambda file=file: decoded.append(file.name) or file.read()) for file in images.files()
    ]
    images.files = lambda: iter(files)
    batches = images.batches(10, 4)
    next(batches)
    threading.Event().wait(0.05)
    assert len(decoded) <= 30
    batches.close()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_end_with_the_iterator(kind, written):
    before = set(threading.enumerate())
    batches = open_images(written[kind]).batches(2, 3)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(ZeroDivisionError):
        for _ in open_images(written[kind]).batches(2, 3):
            raise ZeroDivisionError
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_exceptions_in_workers_come_out_as_they_are(workers, written):
    def fail() -> bytes:
        raise MemoryError("from a worker")

    images = open_images(written["zip"])
    files = list(images.files())
    files[7] = ImageFile("x.png", fail)
    images.files = lambda: iter(files)
    batches, got = images.batches(3, workers), []
    with pytest.raises(MemoryError, match="from a worker"):
        for batch in batches:
            got.append(batch)
    assert np.array_equal(np.concatenate(got), IMAGES[:6])  # what came before is given before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_neither_torch_nor_guided_mt_is_imported():
    code = "import sys, evaluations.files.images; print({'torch', 'guided_mt', 'pyarrow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# image files


def test_names_and_what_is_left_out(tmp_path):
    png = encode(IMAGES[0])
    names = ("b/x.PNG", "a.jpeg", "b/.hidden.png", ".git/x.png", "__MACOSX/a.png", "notes.txt", "b.webp")
    files = dict.fromkeys(names, png)
    for path in (
        write_files(tmp_path / "folder", files),
        write_zip(tmp_path / "x.zip", files),
        write_tar(tmp_path / "x.tar", files),
    ):
        found = image_files(path)
        assert [file.name for file in found] == ["a.jpeg", "b.webp", "b/x.PNG"]
        assert all(file.read() == png for file in found)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_files(tmp_path / "elsewhere", {"x.png": b"x"})
    folder = write_files(tmp_path / "folder", {"a/b.png": b"b"})
    (folder / "a" / "up").symlink_to(folder)
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    assert [file.name for file in image_files(folder)] == ["a/b.png", "c/x.png"]


def test_tar_hard_links_and_repeated_names(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"old", "./a.png": b"new"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    assert [(file.name, file.read()) for file in image_files(path)] == [("a.png", b"new"), ("b.png", b"new")]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_read_from_many_threads(kind, tmp_path):
    files = {f"{i}.png": os.urandom(5000 + i) for i in range(100)}
    path = tmp_path / f"a.{kind}"
    found = image_files(write_tar(path, files) if kind == "tar" else write_zip(path, files, zipfile.ZIP_DEFLATED))
    wrong: list[str] = []

    def read() -> None:
        wrong.extend(file.name for file in found if file.read() != files[file.name])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100 and not wrong


def decoded(data: bytes) -> np.ndarray:
    return decode(Path("set.zip"), ImageFile("x", lambda: data))


def test_every_mode_becomes_rgb():
    grey = IMAGES[0, ..., 0]
    as_rgb = np.repeat(grey[..., None], 3, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decoded(encode(grey)), as_rgb)
        assert np.array_equal(decoded(encode(grey.astype(np.uint16) * 257)), as_rgb)
        assert np.array_equal(decoded(encode(grey.astype(np.uint16) * 257, "TIFF")), as_rgb)
        assert np.array_equal(decoded(encode(grey > 99)), (as_rgb > 99) * 255)
        assert np.array_equal(decoded(encode(np.dstack([IMAGES[0], grey]))), IMAGES[0])  # alpha is dropped
        palette = Image.fromarray(grey).convert("P")
        for kind, transparency in (("PNG", bytes([0, 128])), ("PNG", 3), ("GIF", 3)):
            file = io.BytesIO()
            palette.save(file, kind, transparency=transparency)
            assert np.array_equal(decoded(file.getvalue()), np.asarray(palette.convert("RGB")))


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(decoded(encode(IMAGES[0], exif=exif)), IMAGES[0])


def test_lack_of_memory_is_not_called_a_broken_image(monkeypatch):
    def fail(file):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decoded(b"")


# bad input

PNGS = {f"{i}.png": encode(image) for i, image in enumerate(IMAGES)}
BAD_PNGS = {**PNGS, "7.png": PNGS["7.png"][:150]}
NOISE = np.random.default_rng(1).integers(0, 256, (40, 32, 32, 3), np.uint8)  # JPEGs of some kilobytes
JPEGS = {f"{i}.jpg": encode(image, "JPEG") for i, image in enumerate(NOISE[:3])}


def cut(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def touch(path: Path, data: bytes = b"what") -> Path:
    path.write_bytes(data)
    return path


def damage(path: Path) -> Path:
    """Overwrite bytes in the middle; sizes and the zip's directory stay whole."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    path.write_bytes(data)
    return path


def compressed(path: Path, array: np.ndarray) -> Path:
    np.savez_compressed(path, array)
    return path


def member(path: Path, shape: tuple[int, ...], data: bytes, descr: str = "|u1") -> Path:
    """An .npz with any header over any data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})
    return write_zip(path, {"arr_0.npy": file.getvalue() + data})


def encrypted(path: Path) -> Path:
    data = bytearray(write_zip(path, PNGS).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    path.write_bytes(data)
    return path


def claimed(path: Path) -> Path:
    """A zip whose directory claims 3 GiB for a file."""
    data = bytearray(write_zip(path, PNGS).read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = (3 << 30).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def huge_png() -> bytes:
    """The header of a PNG of 10^10 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + PNGS["0.png"][33:]


ONES = np.ones((4, 4))
SIGNED = NOISE / 127.5 - 1

# name: (how it is made, what the message must say besides the file's name)
BAD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (lambda p: p / "no.npz", ("no such file",)),
    "unknown kind": (lambda p: touch(p / "x.pt"), (".npz", "folder")),
    "empty folder": (lambda p: write_files(p / "f", {"a.txt": b"x"}), ("no images", "png")),
    "zip without images": (lambda p: write_zip(p / "x.zip", {"a.txt": b"x"}), ("no images",)),
    "tar without images": (lambda p: write_tar(p / "x.tar", {}), ("no images",)),
    "one image": (lambda p: write_files(p / "f", {"a.png": PNGS["0.png"]}), ("1 images", "at least two")),
    "one image in npz": (lambda p: write_npz(p / "x.npz", IMAGES[:1]), ("1 images", "at least two")),
    "zero images in npz": (lambda p: write_npz(p / "x.npz", IMAGES[:0]), ("no images",)),
    "one array of an image": (lambda p: write_npz(p / "x.npz", IMAGES[0]), ("at least two",)),
    "no arr_0": (lambda p: write_npz(p / "x.npz", images=IMAGES, y=ONES), ("images, y", "np.savez(path, images)")),
    "statistics only": (lambda p: write_npz(p / "x.npz", mu=ONES[0], sigma=ONES), ("statistics only", "mu, sigma")),
    "signed floats": (
        lambda p: write_npz(p / "x.npz", SIGNED.astype(np.float32)),
        ("float32", "from -1 to 1", "((x + 1) * 127.5).clip(0, 255).astype('uint8')"),
    ),
    "unit floats": (lambda p: write_npz(p / "x.npz", NOISE / 255), ("float64", "from 0 to 1", "(x * 255).round()")),
    "large floats": (lambda p: write_npz(p / "x.npz", NOISE / 1.0), ("from 0 to 255", "x.round().clip(0, 255)")),
    "nan": (lambda p: write_npz(p / "x.npz", NOISE * np.nan), ("float64", "finite")),
    "int64": (lambda p: write_npz(p / "x.npz", NOISE.astype(np.int64)), ("int64", "from 0 to 255", "clip(0, 255)")),
    "bool": (lambda p: write_npz(p / "x.npz", NOISE > 9), ("bool", "* 255")),
    "text": (lambda p: write_npz(p / "x.npz", NOISE.astype("U3")), ("<U3", "uint8")),
    "channels first": (lambda p: write_npz(p / "x.npz", NOISE.transpose(0, 3, 1, 2)), ("x.transpose(0, 2, 3, 1)",)),
    "grey": (lambda p: write_npz(p / "x.npz", NOISE[..., 0]), ("[40, 32, 32]", "np.repeat(x[..., None], 3, -1)")),
    "grey 1": (lambda p: write_npz(p / "x.npz", NOISE[..., :1]), ("[40, 32, 32, 1]", "np.repeat(x, 3, -1)")),
    "rgba": (lambda p: write_npz(p / "x.npz", NOISE[..., [0, 1, 2, 0]]), ("x[..., :3]",)),
    "flat": (lambda p: write_npz(p / "x.npz", NOISE.reshape(40, -1)), ("[40, 3072]", "[N, height, width, 3]")),
    "fortran": (lambda p: write_npz(p / "x.npz", np.asfortranarray(NOISE)), ("Fortran", "np.ascontiguousarray")),
    "objects": (lambda p: write_npz(p / "x.npz", np.array([{}, {}])), ("pickled", "plain array")),
    "less than the header says": (lambda p: member(p / "x.npz", (50, 8, 8, 3), bytes(999)), ("cut short",)),
    "more than the header says": (lambda p: member(p / "x.npz", (2, 8, 8, 3), bytes(999)), ("999",)),
    "negative shape": (lambda p: member(p / "x.npz", (2, -1, -1, 3), bytes(6)), ("no images",)),
    "no array header": (lambda p: write_zip(p / "x.npz", {"arr_0.npy": b"what"}), ("damaged",)),
    "no zip": (lambda p: touch(p / "x.npz"), ("damaged", "zip")),
    "empty npz": (lambda p: touch(p / "x.npz", b""), ("damaged",)),
    "truncated npz": (lambda p: cut(write_npz(p / "x.npz", NOISE), 0.6), ("cut short", "copy")),
    "damaged npz": (lambda p: damage(write_npz(p / "x.npz", NOISE)), ("damaged", "copy")),
    "damaged compressed npz": (lambda p: damage(compressed(p / "x.npz", NOISE)), ("damaged", "copy")),
    "truncated npy": (lambda p: cut(write(p, "npy"), 0.6), ("cut short",)),
    "truncated zip": (lambda p: cut(write_zip(p / "x.zip", PNGS), 0.6), ("cut short", "copy")),
    "damaged zip": (lambda p: damage(write_zip(p / "x.zip", PNGS)), (".png", "damaged", "copy")),
    "encrypted zip": (lambda p: encrypted(p / "x.zip"), ("0.png", "encrypted", "unpack")),
    "zip bomb": (lambda p: claimed(p / "x.zip"), ("0.png", "3,221,225,472")),
    "truncated tar": (lambda p: cut(write_tar(p / "x.tar", JPEGS), 0.2), ("cut short", "copy")),
    "tar cut between files": (lambda p: cut(write_tar(p / "x.tar", {"a.png": bytes(512)}), 0.1), ("cut short", "copy")),
    "damaged tar": (lambda p: damage(write_tar(p / "x.tar", {f"{i}.png": b"" for i in range(40)})), ("damaged",)),
    "no tar": (lambda p: touch(p / "x.tar"), ("damaged",)),
    "tgz": (lambda p: write_tar(p / "x.tgz", PNGS, "w:gz"), ("gunzip",)),
    "broken png": (lambda p: write_files(p / "f", BAD_PNGS), ("7.png", "replace or remove")),
    "first png broken": (lambda p: write_zip(p / "x.zip", {**PNGS, "0.png": b""}), ("0.png", "no known format")),
    "broken png in tar": (lambda p: write_tar(p / "x.tar", BAD_PNGS), ("7.png", "replace or remove")),
    "broken jpeg": (lambda p: write_files(p / "f", {**JPEGS, "1.jpg": JPEGS["1.jpg"][:900]}), ("1.jpg", "truncated")),
    "float pixels": (
        lambda p: write_files(p / "f", {"x.tif": encode(ONES.astype("f4"), "TIFF")}),
        ("x.tif", "floating"),
    ),
    "32-bit pixels": (
        lambda p: write_files(p / "f", {"x.tif": encode((ONES * 70000).astype("i4"), "TIFF")}),
        ("x.tif", "32-bit"),
    ),
    "pixel bomb": (lambda p: write_zip(p / "x.zip", {**PNGS, "0.png": huge_png()}), ("0.png", "exceeds limit")),
    "another size": (
        lambda p: write_zip(p / "x.zip", {**PNGS, "5.png": encode(NOISE[0])}),
        ("5.png is 32x32", "first image is 10x6", "mt-diffusion prepare SRC OUT.zip --size N"),
    ),
    "large image of another size": (lambda p: write_zip(p / "x.zip", {**PNGS, "5.png": huge_png()}), ("5.png",)),
    "no parquet": (lambda p: touch(p / "x.parquet"), ("damaged",)),
    "truncated parquet": (lambda p: cut(write(p, "parquet"), 0.6), ("damaged",)),
    "parquet without images": (
        lambda p: write_parquet(p / "x.parquet", pa.array(["a", "b"]), "text"),
        ("label, text", "column image"),
    ),
    "parquet with a gap": (
        lambda p: write_parquet(p / "x.parquet", pa.array([PNGS["0.png"], None])),
        ("row 1", "column image"),
    ),
    "empty parquet": (lambda p: write_parquet(p / "x.parquet", structs(PNGS)[:0]), ("no images",)),
    "broken png in parquet": (lambda p: write_parquet(p / "x.parquet", structs(BAD_PNGS)), ("row 7",)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_the_way_out(name, workers, tmp_path):
    make, hints = BAD[name]
    path = make(tmp_path)
    with pytest.raises(EvaluationError) as caught:
        for _ in open_images(path).batches(4, workers):
            pass
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 300
    for hint in hints:
        assert hint in message


def test_damage_that_shows_only_while_streaming(tmp_path):
    """Both are opened without complaint, and give what comes before."""
    for path in (damage(write_npz(tmp_path / "a.npz", NOISE)), damage(compressed(tmp_path / "b.npz", NOISE))):
        batches = open_images(path).batches(2)
        assert np.array_equal(next(batches), NOISE[:2])
        with pytest.raises(EvaluationError, match=path.name):
            list(batches)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    for name, arrays in {
        "images.npz": {"arr_0": np.array([Trap(), Trap()], dtype=object)},
        "labels.npz": {"arr_0": IMAGES, "arr_1": np.array([Trap()], dtype=object)},
        "mu.npz": {"mu": np.array([Trap()], dtype=object), "sigma": ONES},
    }.items():
        path = write_npz(tmp_path / name, **arrays)
        if name == "labels.npz":
            assert np.array_equal(next(open_images(path).batches(11)), IMAGES)
            continue
        with pytest.raises(EvaluationError, match=f"{name}.*pickled"):
            open_images(path, need_images=False)
    assert not (tmp_path / "opened").exists()
    np.load(tmp_path / "mu.npz", allow_pickle=True)["mu"]
    assert (tmp_path / "opened").exists()  # the trap works


def test_without_pyarrow_it_says_what_to_install(written, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EvaluationError, match=r"a\.parquet.*pip install pyarrow"):
        open_images(written["parquet"])


def test_images_beside_parquet_files_are_mentioned(tmp_path, capsys):
    folder = write(tmp_path, "parquet folder")
    write_files(folder, {"preview.png": PNGS["0.png"], "README.md": b"", ".cache/x.parquet": b""})
    assert open_images(folder).count == 11
    assert "not its 1 image files" in capsys.readouterr().err


def test_parquet_takes_column_image_before_others(tmp_path):
    path, png = tmp_path / "x.parquet", list(PNGS.values())
    pq.write_table(pa.table({"mask": [b"no"] * 11, "image": structs(PNGS), "raw": png}), path)
    assert np.array_equal(next(open_images(path).batches(11)), IMAGES)


# statistics


def test_statistics(tmp_path):
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(size=5).astype(np.float32), np.asfortranarray(rng.normal(size=(5, 5)))
    path = write_npz(tmp_path / "x.npz", IMAGES, mu=mu, sigma=sigma, other=ONES)
    images = open_images(path)
    assert images.count == 11 and list(images.statistics) == ["mu", "sigma"]
    assert images.statistics["mu"].dtype == np.float64 and np.array_equal(images.statistics["mu"], mu)
    assert np.array_equal(images.statistics["sigma"], sigma)

    alone = open_images(write_npz(tmp_path / "y.npz", mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3]), False)
    assert alone.count == 0 and list(alone.statistics) == ["mu", "sigma", "mu_s", "sigma_s"]
    assert list(alone.batches(4, 2)) == [] and len(alone.content_hash()) == 64


@pytest.mark.parametrize(
    ("arrays", "hint"),
    [
        ({"mu": ONES, "sigma": ONES}, "mu [D] and sigma [D, D]"),
        ({"mu": ONES[0, 0], "sigma": ONES}, "mu [D] and sigma [D, D]"),
        ({"mu": ONES[0], "sigma": ONES[:3]}, "sigma is [3, 4]"),
        ({"mu": ONES[0], "sigma": ONES, "mu_s": ONES[0], "sigma_s": ONES[:3, :3]}, "sigma_s is [3, 3]"),
        ({"mu": ONES[0] * np.nan, "sigma": ONES}, "mu holds values that are not finite"),
        ({"mu": ONES[0], "sigma": ONES * np.inf}, "sigma holds values that are not finite"),
        ({"mu": ONES[0].astype(complex), "sigma": ONES}, "complex128"),
        ({"mu": ONES[0]}, "mu without sigma"),
        ({"sigma": ONES}, "sigma without mu"),
        ({"x": ONES}, "no array arr_0"),
    ],
)
def test_bad_statistics(arrays, hint, tmp_path):
    path = write_npz(tmp_path / "x.npz", **arrays)
    with pytest.raises(EvaluationError) as caught:
        open_images(path, need_images=False)
    assert str(caught.value).startswith(f"{path}: ") and hint in str(caught.value) and "\n" not in str(caught.value)
