"""Which files are images, and that training and evaluation make the same pixels of every kind of them."""

from __future__ import annotations

import io
import logging
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import make_files, png, stream_of, write

from evaluations.errors import EvaluationError
from evaluations.files import image_files
from guided_mt.commands import prepare
from guided_mt.data import load_images, open_source
from guided_mt.data.sources import formats
from guided_mt.data.sources.formats import IMAGE_SUFFIXES, TooManyPixels, open_image
from guided_mt.data.transforms import to_rgb
from guided_mt.errors import UserError

COLOURS = np.random.default_rng(3).integers(0, 256, (8, 8, 4), np.uint8)
RGB = Image.fromarray(COLOURS[..., :3])


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, "PNG", exif=exif)


def see_through_palette(transparency: int | bytes) -> bytes:
    return encoded(RGB.quantize(16), "PNG", transparency=transparency)


GREY16 = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1031)
FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
# {kind: (bytes, what must come out as RGB [8, 8, 3])}; None: what Pillow's own convert("RGB") says.
KINDS: dict[str, tuple[bytes, np.ndarray | None]] = {
    "RGB": (encoded(RGB, "PNG"), COLOURS[..., :3]),
    "16-bit grey": (encoded(GREY16, "PNG"), np.rint(np.asarray(GREY16) / 257)[..., None].repeat(3, 2)),
    "16-bit grey PGM": (encoded(GREY16, "PPM"), np.rint(np.asarray(GREY16) / 257)[..., None].repeat(3, 2)),
    "16-bit grey TIFF": (encoded(GREY16, "TIFF"), np.rint(np.asarray(GREY16) / 257)[..., None].repeat(3, 2)),
    "palette, one colour transparent": (see_through_palette(3), np.asarray(RGB.quantize(16).convert("RGB"))),
    "palette, alphas": (see_through_palette(bytes(range(0, 160, 10))), np.asarray(RGB.quantize(16).convert("RGB"))),
    "RGB, one colour transparent": (encoded(RGB, "PNG", transparency=(1, 2, 3)), COLOURS[..., :3]),
    "alpha": (encoded(Image.fromarray(COLOURS), "PNG"), COLOURS[..., :3]),
    "alpha, WebP": (encoded(Image.fromarray(COLOURS), "WEBP", lossless=True, exact=True), COLOURS[..., :3]),
    "grey with alpha": (encoded(RGB.convert("LA"), "PNG"), np.asarray(RGB.convert("L"))[..., None].repeat(3, 2)),
    "one bit": (encoded(RGB.convert("1"), "PNG"), None),
    "CMYK JPEG": (encoded(RGB.convert("CMYK"), "JPEG"), None),
    "YCbCr TIFF": (encoded(RGB.convert("YCbCr"), "TIFF"), None),
    "EXIF says turned": (turned(), COLOURS[..., :3]),
    "animated GIF": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), np.asarray(FRAMES[0])),
    "animated PNG": (encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), np.asarray(FRAMES[0])),
    "TIFF of two pages": (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), np.asarray(FRAMES[0])),
}


def as_evaluated(content: bytes) -> np.ndarray:
    return image_files.decode(Path("set"), image_files.ImageFile("x", lambda: content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_training_and_evaluation_see_the_same_pixels(kind):
    content, expected = KINDS[kind]
    if expected is None:
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = np.asarray(to_rgb(open_image(content)))
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert np.array_equal(as_evaluated(content), expected)


@pytest.mark.parametrize(
    ("pixels", "why"), [(np.full((8, 8), 0.5, np.float32), "floating"), (np.full((8, 8), 70_000, np.int32), "32-bit")]
)
def test_pixels_that_are_no_colours_are_refused_by_both(pixels, why):
    content = encoded(Image.fromarray(pixels), "TIFF")
    with pytest.raises(ValueError, match=why):
        to_rgb(open_image(content))
    with pytest.raises(EvaluationError, match=why):
        as_evaluated(content)


# ---------------------------------------------------------------- names


def test_both_packages_take_the_same_files():
    assert IMAGE_SUFFIXES == image_files.SUFFIXES
    assert formats._QUIET_SUFFIXES == image_files._QUIET_SUFFIXES and formats._QUIET_NAMES == image_files._QUIET_NAMES
    Image.init()
    assert set(IMAGE_SUFFIXES) <= Image.registered_extensions().keys() | {
        ".avif"
    }  # of which a Pillow may lack the codec


@pytest.mark.parametrize("container", ["folder", "tar", "zip"])
def test_every_suffix_is_read_and_what_is_left_out_is_said_once(container, tmp_path, caplog, capsys):
    image = png(np.zeros((8, 8, 3), np.uint8))
    good = [f"a/{k:02d}{suffix.upper() if k % 2 else suffix}" for k, suffix in enumerate(IMAGE_SUFFIXES)]
    quiet = [
        "a/boxes.txt",
        "README",
        "a/.hidden.png",
        "a/.ipynb_checkpoints/00-checkpoint.png",
        "__MACOSX/a/._00.png",
        "a/Thumbs.db",
    ]
    other = ["a/film.mp4", "a/photo.heic", "b/raw.cr2", "c/raw.dng"]
    path = write(container, dict.fromkeys(good + quiet + other, image), tmp_path)
    caplog.set_level(logging.INFO)
    source = open_source(path)
    assert sorted(source.names) == sorted(good)
    line = f"{path}: 4 file(s) are no images by their names and left out: a/film.mp4, a/photo.heic, b/raw.cr2, ..."
    assert [record.getMessage() for record in caplog.records] == [line]
    assert len(load_images(source, 8).images) == len(good)
    assert [file.name for file in image_files.image_files(path)] == sorted(good)
    assert capsys.readouterr().err == f"warning: {line}\n"


def test_what_lies_elsewhere_in_an_archive_is_not_said(tmp_path, caplog):
    path = write("zip", dict.fromkeys(["a/1.png", "b/1.png", "b/x.heic"], make_files(1)["cat/0000.png"]), tmp_path)
    open_source(path / "a")
    assert not caplog.records
    open_source(path / "b")
    assert "b: 1 file(s) are no images by their names and left out: x.heic" in caplog.text


def test_links_that_lead_nowhere_are_left_out(tmp_path, caplog, capsys):
    folder = write("folder", make_files(3), tmp_path)
    os.symlink(folder / "gone.png", folder / "cat" / "link.png")
    assert len(open_source(folder)) == 3 == len(image_files.image_files(folder))
    for text in (caplog.text, capsys.readouterr().err):
        assert "1 file(s) are no images by their names and left out: cat/link.png" in text


# ---------------------------------------------------------------- large photos


def large(width: int = 20, height: int = 20) -> bytes:
    return png(np.zeros((height, width, 3), np.uint8))


def test_a_photo_above_the_limit_is_not_called_broken(tmp_path, caplog):
    files = make_files() | {"cat/large.png": large()}
    path = write("zip", files, tmp_path)
    source = open_source(path, max_pixels=399)
    assert len(load_images(pickle.loads(pickle.dumps(source)), 8).images) == 21
    assert len(caplog.messages) == 1 and "image cat/large.png is too large and left out" in caplog.messages[0]
    assert "20 x 20 = 400 pixels, over the limit of 399; to read it, raise the limit: --max_pixels 400" in caplog.text
    assert "broken" not in caplog.text
    assert len(load_images(open_source(path, max_pixels=400), 8).images) == 22
    assert len(load_images(open_source(f"{path},{path}", max_pixels=400), 8).images) == 44
    with pytest.raises(
        UserError, match=r"of 22 images are left out, over 1 %, the last one .*--max_pixels \d+ of prep"
    ):
        stream_of(open_source(path, max_pixels=100), num_workers=1)


def claimed(width: int, height: int) -> bytes:
    """A PNG whose header says that it is of one bit and this size."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    header = (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82"


@pytest.mark.filterwarnings("error")  # Pillow's warning begins at half of its limit
def test_the_limit_is_pillows_where_nothing_is_said():
    before = Image.MAX_IMAGE_PIXELS
    assert open_image(claimed(13_000, 13_000)).size == (13_000, 13_000)
    with pytest.raises(TooManyPixels, match=r"13500 x 13500 = 182,250,000 pixels, over the limit of 178,956,970"):
        open_image(claimed(13_500, 13_500))
    assert open_image(claimed(13_500, 13_500), 182_250_000).size == (13_500, 13_500)
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(
        EvaluationError, match=r"x has more pixels than are decoded here .* scripts/prepare_images.py SRC OUT.zip"
    ):
        as_evaluated(claimed(13_500, 13_500))


def test_large_photos_are_prepared(tmp_path, caplog, monkeypatch):
    path = write("folder", {"a.png": large(), "b.png": large()}, tmp_path)
    with pytest.raises(UserError, match=r"2 of 2 images are left out, .* raise the limit: --max_pixels 400"):
        prepare.main([str(path), str(tmp_path / "out.zip"), "--size", "8", "--workers", "0", "--max_pixels", "399"])
    prepare.main([str(path), str(tmp_path / "out.zip"), "--size", "8", "--workers", "0", "--max_pixels", "400"])
    assert len(open_source(tmp_path / "out.zip")) == 2
    with pytest.raises(UserError, match="--max_pixels 0: must be at least 1"):
        prepare.main([str(path), str(tmp_path / "out.zip"), "--size", "8", "--max_pixels", "0"])
