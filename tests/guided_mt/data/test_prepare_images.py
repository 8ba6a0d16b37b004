"""scripts/prepare_images.py: exact, repeatable, and nothing left behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from guided_mt.commands.prepare import main, prepare
from guided_mt.data import load_images, open_source
from guided_mt.errors import UserError

SCRIPT = ROOT / "scripts" / "prepare_images.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """70 JPEGs of different sizes in two classes."""
    rng = np.random.default_rng(0)
    for i in range(70):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i % 9, 30, 3), np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 2])
def test_round_trip_is_pixel_exact(workers, folder, tmp_path, capsys):
    out = tmp_path / "out.zip"
    main([str(folder), str(out), "--size", "16", "--workers", str(workers)])
    assert "70 images of 16x16 pixels" in capsys.readouterr().out
    before, after = load_images(open_source(folder), 16), load_images(open_source(out), 16)
    assert torch.equal(before.images, after.images) and torch.equal(before.labels, after.labels)
    assert list(after.names) == [name.replace(".jpg", ".png") for name in before.names]
    assert open_source(out).class_names == ["cat", "dog"]


def test_digits_keep_their_labels(tmp_path):
    prepare("builtin:digits-test", tmp_path / "out.zip", 8, workers=0, limit=50)
    source, images = open_source("builtin:digits-test"), load_images(open_source(tmp_path / "out.zip"), 8)
    expected = {source.name(i): source.read(i) for i in range(50)}
    for name, image, label in zip(images.names, images.images, images.labels, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected[name]) and name.startswith(f"{label}/")


def test_same_input_same_bytes(folder, tmp_path):
    for name, workers in (("a.zip", 0), ("b.zip", 1), ("c.zip", 2)):
        prepare(str(folder), tmp_path / name, 16, workers=workers)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.zip", "b.zip", "c.zip"))
    assert a == b == c


def test_names_stay_unique(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "in").mkdir()
    for suffix in ("gif", "jpg", "png", "jpg.png"):
        (tmp_path / "in" / f"x_1.{suffix}").write_bytes(buffer.getvalue())
    assert prepare(str(tmp_path / "in"), tmp_path / "out.zip", 8, workers=0) == 4
    assert len(set(zipfile.ZipFile(tmp_path / "out.zip").namelist())) == 4


def test_photos_are_turned_where_that_is_asked_for(tmp_path):
    """Pixels lie as they are stored, as in ADM, else; 6: the stored right is the bottom."""
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(array).save(tmp_path / "in" / "x.png", exif=exif)
    for paths, out, upright, expected in (
        ("{}", "stored.zip", False, array),
        ("{}", "turned.zip", True, np.rot90(array, -1)),
        ("{},{}", "both.zip", True, np.rot90(array, -1)),
    ):
        prepare(paths.replace("{}", str(tmp_path / "in")), tmp_path / out, 8, workers=0, upright=upright)
        assert np.array_equal(open_source(tmp_path / out).read(0), expected)


def test_broken_images_are_left_out_up_to_one_percent(folder, tmp_path, caplog):
    (folder / "cat" / "000.jpg").write_bytes(b"not an image")
    assert prepare(str(folder), tmp_path / "out.zip", 16, workers=1) == 69
    assert "cat/000.jpg" in caplog.text
    (folder / "dog" / "001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 70 images are broken"):
        prepare(str(folder), tmp_path / "other.zip", 16, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zip", "photos"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(how, folder, tmp_path):
    out = tmp_path / "out.zip"
    command = [sys.executable, str(SCRIPT), str(folder), str(out), "--size", "3000", "--workers", "1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite run in the background has it ignored
    )
    unfinished = tmp_path / "out.zip.unfinished"
    for _ in range(300):
        if unfinished.exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, how)  # as Ctrl-C and launchers do
    assert process.wait(timeout=30) in (130, 143)
    assert not out.exists() and not unfinished.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}", "{tmp}/out.png", "--size", "8"], "must be named .zip"),
        (["{photos}", "{tmp}/no/out.zip", "--size", "8"], "no does not exist"),
        (["{photos}", "{tmp}/out.zip", "--size", "0"], "--size 0: must be at least 1"),
        (["{tmp}/photo", "{tmp}/out.zip", "--size", "8"], "did you mean photos?"),
        (["{tmp}/out.zip/a", "{tmp}/out.zip", "--size", "8"], "is the source itself"),
        (["{photos}", "{tmp}/out.zip", "--siez", "8"], "unknown flag --siez (did you mean --size?)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, folder, tmp_path, capsys, monkeypatch):
    from guided_mt.commands.prepare import console

    filled = [argument.format(photos=folder, tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["prepare_images.py", *filled])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as error:
        console()
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.partition("error: ")[1] and message in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]
