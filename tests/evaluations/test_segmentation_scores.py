"""Table 4's scores: known confusion matrices, every form of input, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT, complaint_of
from PIL import Image

from evaluations import segmentation
from evaluations.errors import EvaluationError
from evaluations.files.palettes import CITYSCAPES, CITYSCAPES_LABEL_IDS, palette_of, read_classes
from evaluations.segmentation import confusion_matrix, nearest_class, scores

CAMVID = ROOT.parent / "shared" / "data" / "camvid-256.tar"
CITY = palette_of(CITYSCAPES, "Cityscapes")
THREE = "0 grass 0 200 0\n1 water 0 0 200\n2 sand 230 200 120\n7 void 0 0 0\n"
COLOURS = np.array([[0, 200, 0], [0, 0, 200], [230, 200, 120]], np.uint8)


@pytest.fixture
def classes(tmp_path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text(THREE)
    return path


def maps(seed: int, count: int = 4, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    """uint8 [count, H, W] of 0, 1, 2."""
    return np.random.default_rng(seed).integers(0, 3, (count, *size), dtype=np.uint8)


def with_void(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[:, 0] = 7
    return labels


def painted(labels: np.ndarray) -> np.ndarray:
    table = np.zeros((8, 3), np.uint8)
    table[:3] = COLOURS
    return table[labels]


def write(folder: Path, images: np.ndarray, names: list[str] | None = None) -> Path:
    for i, image in enumerate(images):
        path = folder / f"{names[i] if names else f'street/{i:03d}'}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def score(pred: Path, ref: Path, *more: str | Path) -> dict:
    """All numbers of the command."""
    out = ref.parent / "scores.json"
    segmentation.main([*map(str, (pred, ref, *more)), "--json", str(out)])
    return json.loads(out.read_text())


def complaint(*argv: str | Path) -> str:
    return complaint_of(segmentation.main, *argv)


# ---------------------------------------------------------------- the formulas


def test_three_classes_by_hand():
    ref = np.array([[0, 0, 0, 0], [1, 1, 2, -1]])
    pred = np.array([[0, 0, 0, 1], [1, 2, 2, 0]])
    H = confusion_matrix(pred, ref, classes=3)
    np.testing.assert_array_equal(H, [[3, 1, 0], [0, 1, 1], [0, 0, 1]])
    found = scores(H)
    assert found.pixel_accuracy == pytest.approx(5 / 7)
    assert found.class_accuracy == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert found.class_iou == pytest.approx((3 / 4 + 1 / 3 + 1 / 2) / 3)
    np.testing.assert_allclose(found.share, [4 / 7, 2 / 7, 1 / 7])


def test_an_absent_class_is_0_in_the_means_and_left_out_of_those_beside():
    H = np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    found = scores(H)
    assert found.class_accuracy == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert found.class_iou == pytest.approx((6 / 8 + 2 / 4 + 0) / 3)
    assert found.present_class_accuracy == pytest.approx((6 / 8 + 1) / 2)
    assert found.present_class_iou == pytest.approx((6 / 8 + 2 / 4) / 2)
    np.testing.assert_array_equal(found.present, [True, True, False])


def test_pix2pix_code_gives_the_same():
    """Its formulas as they are written there (scripts/eval_cityscapes/util.py), with an absent class."""
    H = np.random.default_rng(0).integers(0, 1000, (5, 5))
    H[3] = 0
    H[:, 3] = 0
    found = scores(H)
    assert found.pixel_accuracy == pytest.approx(np.diag(H).sum() / (H.sum() + 1e-12))
    assert found.class_accuracy == pytest.approx(np.mean(np.diag(H) / (H.sum(1) + 1e-12)))
    union = H.sum(1) + H.sum(0) - np.diag(H) + 1e-12
    assert found.class_iou == pytest.approx(np.mean(np.diag(H) / union))


def test_confusion_matrix_refuses_what_is_no_class():
    with pytest.raises(EvaluationError, match=r"predicted classes lie in 0\.\.3, not 0\.\.2"):
        confusion_matrix(np.array([0, 3]), np.array([0, 1]), classes=3)
    with pytest.raises(EvaluationError, match="differ in shape"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), classes=3)
    with pytest.raises(EvaluationError, match="void everywhere"):
        scores(confusion_matrix(np.zeros(4, int), np.full(4, 9), classes=3, void=9))


def test_nearest_class_equals_a_slow_search_and_takes_the_lower_of_equals():
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    palette = rng.integers(0, 256, (6, 3), dtype=np.uint8)
    found = nearest_class(rgb, palette)
    for y, x in np.ndindex(7, 9):
        distances = [sum((int(a) - int(b)) ** 2 for a, b in zip(rgb[y, x], colour, strict=True)) for colour in palette]
        assert found[y, x] == distances.index(min(distances))
    grey = np.array([[[5, 5, 5]]], np.uint8)
    assert nearest_class(grey, np.array([[9, 9, 9], [6, 5, 5], [4, 5, 5]], np.uint8)) == 1
    assert nearest_class(np.zeros((0, 4, 3), np.uint8), palette).shape == (0, 4)


def test_noise_of_10_is_undone():
    truth = maps(0, size=(300, 301))  # more pixels than are looked at together
    noise = np.random.default_rng(1).integers(-10, 11, (*truth.shape, 3))
    noisy = np.clip(painted(truth).astype(int) + noise, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(nearest_class(noisy, COLOURS), truth)
    city = CITY.colours[:19]  # bus and train are 20 apart in green alone: 10 would be halfway
    noisy = np.clip(city[None].astype(int) + np.random.default_rng(2).integers(-9, 10, (500, 19, 3)), 0, 255)
    np.testing.assert_array_equal(nearest_class(noisy.astype(np.uint8), city), np.tile(np.arange(19), (500, 1)))


def test_command_equals_loops_over_pixels(tmp_path, classes):
    truth, wrong = with_void(maps(0)), maps(1)
    found = score(write(tmp_path / "pred", painted(wrong)), write(tmp_path / "ref", truth), "--classes", classes)
    hits = [0, 0, 0]
    true, predicted = [0, 0, 0], [0, 0, 0]
    for t, p in zip(truth.ravel().tolist(), wrong.ravel().tolist(), strict=True):
        if t != 7:
            true[t] += 1
            predicted[p] += 1
            hits[t] += t == p
    assert found["per_pixel_accuracy"] == pytest.approx(sum(hits) / sum(true))
    assert found["per_class_accuracy"] == pytest.approx(sum(h / t for h, t in zip(hits, true, strict=True)) / 3)
    unions = [t + p - h for t, p, h in zip(true, predicted, hits, strict=True)]
    assert found["class_iou"] == pytest.approx(sum(h / u for h, u in zip(hits, unions, strict=True)) / 3)
    assert found["void_pixels"] == 4 * 5 and found["pixels"] == 4 * 25 and found["images"] == 4


# ---------------------------------------------------------------- forms of input


def test_perfect_prediction(tmp_path, classes, capsys):
    truth = with_void(maps(0))
    found = score(write(tmp_path / "pred", painted(truth)), write(tmp_path / "ref", truth), "--classes", classes)
    assert (found["per_pixel_accuracy"], found["per_class_accuracy"], found["class_iou"]) == (1, 1, 1)
    text = capsys.readouterr()
    assert text.out.startswith("Per-pixel accuracy: 1.0000\nPer-class accuracy: 1.0000\nClass IoU: 1.0000\n")
    assert "4 images, 100 pixels scored, 20 void pixels left out (void: void)" in text.out
    assert text.err == ""


def test_folder_zip_tar_and_npz_agree_for_colours_and_indices(tmp_path, classes):
    truth, wrong = with_void(maps(0)), maps(1)
    forms: dict[str, list[Path]] = {}
    for side, indices in (("pred", wrong), ("ref", truth)):
        forms[side] = []
        for kind, images in (("colours", painted(indices)), ("indices", indices)):
            folder = write(tmp_path / side / kind, images)
            with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
                for path in folder.rglob("*.png"):
                    archive.write(path, path.relative_to(folder))
            with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
                archive.add(folder / "street", "street")
            np.savez(folder.with_suffix(".npz"), images)
            forms[side] += [folder, *(folder.with_suffix(suffix) for suffix in (".zip", ".tar", ".npz"))]
    expected = score(forms["pred"][0], forms["ref"][0], "--classes", classes)["confusion"]
    assert expected == confusion_matrix(wrong, truth, 3, void=7).tolist()
    for pred in forms["pred"]:
        assert score(pred, forms["ref"][0], "--classes", classes)["confusion"] == expected, pred
    for ref in forms["ref"]:
        assert score(forms["pred"][0], ref, "--classes", classes)["confusion"] == expected, ref


def test_order_of_the_images_does_not_matter(tmp_path, classes):
    truth, wrong, order = maps(0), maps(1), [2, 0, 3, 1]
    a = score(write(tmp_path / "p1", painted(wrong)), write(tmp_path / "r1", truth), "--classes", classes)
    p2, r2 = write(tmp_path / "p2", painted(wrong[order])), write(tmp_path / "r2", truth[order])
    assert score(p2, r2, "--classes", classes)["confusion"] == a["confusion"]


def test_other_arrays_of_an_npz(tmp_path, classes):
    truth, wrong = maps(0), maps(1)
    np.savez(
        tmp_path / "x.npz", arr_0=np.zeros((4, 6, 5, 3), np.uint8), label_map=painted(wrong), truth=truth[..., None]
    )
    keys = ["--pred_key", "label_map", "--ref_key", "truth", "--classes", classes]
    found = score(tmp_path / "x.npz", tmp_path / "x.npz", *keys)
    assert found["confusion"] == confusion_matrix(wrong, truth, 3).tolist()


def test_images_with_a_colour_table(tmp_path, classes):
    """Read as colours where the table holds class colours, as indices where it does not."""
    truth = maps(0, count=1)[0]
    write(tmp_path / "ref", truth[None], ["a"])
    (tmp_path / "pred").mkdir()
    for table, shown in (
        (COLOURS[[1, 2, 0]], np.array([2, 0, 1])[truth]),  # entry 0 is water, 1 sand, 2 grass
        (np.array([[9, 9, 9], [90, 90, 90], [99, 99, 99]], np.uint8), truth),
    ):
        image = Image.fromarray(shown.astype(np.uint8)).convert("P")
        image = Image.frombytes("P", image.size, shown.astype(np.uint8).tobytes())
        image.putpalette(table.tobytes())
        image.save(tmp_path / "pred" / "a.png")
        assert score(tmp_path / "pred", tmp_path / "ref", "--classes", classes)["per_pixel_accuracy"] == 1


def test_alpha_is_dropped_and_two_bit_grey_is_not_stretched(tmp_path, classes):
    truth = maps(0, count=1)[0]
    alpha = np.dstack([painted(truth), np.full(truth.shape, 9, np.uint8)])
    write(tmp_path / "pred", alpha[None], ["a"])
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "a.png").write_bytes(two_bit_png(truth))
    assert np.asarray(Image.open(tmp_path / "ref" / "a.png")).max() == 170  # what Pillow makes of it
    assert score(tmp_path / "pred", tmp_path / "ref", "--classes", classes)["per_pixel_accuracy"] == 1


def two_bit_png(indices: np.ndarray) -> bytes:
    import struct
    import zlib

    height, width = indices.shape
    padded = np.zeros((height, -(-width // 4) * 4), np.uint8)
    padded[:, :width] = indices
    packed = (padded.reshape(height, -1, 4) << np.array([6, 4, 2, 0], np.uint8)).sum(axis=2).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 2, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_void_in_a_prediction_counts_as_the_class_nearest_in_colour(tmp_path, classes, capsys):
    truth = with_void(maps(0))
    wrong = maps(1)
    wrong[:, :2] = 7  # the first row is void in the reference as well
    ref = write(tmp_path / "ref", truth)
    by_index = score(write(tmp_path / "indices", wrong), ref, "--classes", classes)
    assert "20 scored pixels are predicted as void" in capsys.readouterr().err
    by_colour = score(write(tmp_path / "colours", painted(wrong)), ref, "--classes", classes)
    assert by_index["confusion"] == by_colour["confusion"]
    assert by_index["predicted_void_pixels"] == 20


def test_sizes_that_differ(tmp_path, classes):
    truth = maps(0)
    large = painted(truth.repeat(2, axis=1).repeat(2, axis=2))
    pred, ref = write(tmp_path / "pred", large), write(tmp_path / "ref", with_void(truth))
    text = complaint(pred, ref, "--classes", classes)
    assert "000.png is 10x12" in text and "000.png 5x6" in text and "--resize" in text
    found = score(pred, ref, "--classes", classes, "--resize")
    assert found["per_pixel_accuracy"] == 1 and found["void_pixels"] == 4 * 2 * 10


def test_reference_colours_off_the_palette_are_reported(tmp_path, classes, capsys):
    truth = with_void(maps(0))
    colours = painted(truth)
    colours[0, 3, 3] += 3
    ref = write(tmp_path / "ref", colours)
    found = score(write(tmp_path / "pred", painted(truth)), ref, "--classes", classes)
    assert found["per_pixel_accuracy"] == 1
    assert found["off_palette_pixels"] == 1 and found["off_palette_distance"] == pytest.approx(27**0.5)
    err = capsys.readouterr().err
    assert "1 reference pixels have a colour of no class" in err and "at most 5.2 away" in err
    assert "is this the palette" not in err
    score(write(tmp_path / "pred", painted(truth)), ref)  # Cityscapes' colours
    assert "is this the palette of the reference (Cityscapes)?" in capsys.readouterr().err


def test_absent_classes_are_named(tmp_path, capsys):
    truth = np.full((1, 4, 4), 13, np.uint8)
    truth[0, 0] = 0
    found = score(write(tmp_path / "pred", CITY.colours[truth]), write(tmp_path / "ref", truth))
    assert found["per_pixel_accuracy"] == 1
    assert found["per_class_accuracy"] == pytest.approx(2 / 19)
    assert found["class_iou_of_present"] == 1
    text = capsys.readouterr()
    assert "counted as 0 in the means: sidewalk, building" in text.err
    assert "Over the 2 of 19 classes that occur in the reference: per-class accuracy 1.0000" in text.out


def test_cityscapes_label_ids(tmp_path, capsys):
    ids = np.arange(34, dtype=np.uint8).reshape(1, 2, 17)
    training = np.full((1, 2, 17), 255, np.uint8)
    for train_id, label_id in enumerate(CITYSCAPES_LABEL_IDS):
        training[ids == label_id] = train_id
    pred = CITY.colours[CITY.rows(training)]
    found = score(write(tmp_path / "p1", pred, ["a_labelIds"]), write(tmp_path / "r1", ids, ["a_labelIds"]))
    assert found["confusion"] == np.eye(19, dtype=int).tolist() and found["void_pixels"] == 15
    p2, r2 = write(tmp_path / "p2", pred, ["a"]), write(tmp_path / "r2", ids, ["a"])
    assert score(p2, r2, "--label_ids")["confusion"] == found["confusion"]
    text = complaint(p2, r2)
    assert "r2: a.png" in text and "index 19 (1 pixels) is no class" in text and "--label_ids" in text
    np.savez(tmp_path / "r3.npz", np.array([[[35, 7]]]))
    np.savez(tmp_path / "p3.npz", np.array([[[0, 0]]]))
    assert "35 is none of Cityscapes' label ids" in complaint(tmp_path / "p3.npz", tmp_path / "r3.npz", "--label_ids")


@pytest.mark.parametrize("ids", [(7, 8, 11, 23), (7, 8, 11, 17)])
def test_predictions_in_label_ids(ids, tmp_path, capsys):
    """As cityscapesScripts ask for them, in files of any name: told by a flag, and suspected where nothing tells them."""
    labels = np.array([ids] * 2, np.uint8)[None].repeat(2, 0)
    pred, ref = write(tmp_path / "pred", labels), write(tmp_path / "ref", labels)
    assert score(pred, ref, "--label_ids", "--pred_label_ids")["per_pixel_accuracy"] == 1
    assert "looks like" not in capsys.readouterr().err
    if max(ids) > 18:
        text = complaint(pred, ref, "--label_ids")
        assert "index 23" in text and text.endswith("if these are Cityscapes' label ids: --pred_label_ids")
        assert complaint(pred, ref).endswith("if these are Cityscapes' label ids: --pred_label_ids")
        return
    assert score(pred, ref, "--label_ids")["per_pixel_accuracy"] == 0
    assert "PRED looks like Cityscapes' label ids" in capsys.readouterr().err
    assert score(pred, ref, "--pred_label_ids")["per_pixel_accuracy"] == 0
    assert "REF looks like Cityscapes' label ids" in capsys.readouterr().err
    score(pred, ref)
    err = capsys.readouterr().err
    assert "PRED looks like" in err and "REF looks like" in err


def test_training_ids_are_not_suspected(tmp_path, classes, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 19, (4, 16, 16)).astype(np.uint8)
    guessed = np.where(rng.random(labels.shape) < 0.9, rng.integers(0, 19, labels.shape), labels).astype(np.uint8)
    score(write(tmp_path / "pred", guessed), write(tmp_path / "ref", labels))
    assert "looks like" not in capsys.readouterr().err
    assert "--pred_label_ids are Cityscapes' label ids and do not go with --classes" in complaint(
        tmp_path / "pred", tmp_path / "ref", "--pred_label_ids", "--classes", classes
    )


def test_cityscapes_palette():
    assert len(CITY.classes) == 19 and [entry.index for entry in CITY.classes] == list(range(19))
    assert [entry.name for entry in CITY.void] == ["void"] and len(set(map(tuple, CITY.colours.tolist()))) == 20


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", "])
def test_class_files(tmp_path, separator):
    lines = [["index", "name", "R", "G", "B"], ["4", "traffic light", "1", "2", "3"], ["0", "Road", "9", "9", "9"]]
    path = tmp_path / "c.txt"
    path.write_text("# made by hand\n\n" + "\n".join(separator.join(line) for line in lines), encoding="utf-8-sig")
    palette = palette_of(read_classes(path), "c")
    assert [tuple(entry) for entry in palette.classes] == [(0, "Road", (9, 9, 9)), (4, "traffic light", (1, 2, 3))]


BAD_CLASSES = [
    ("0 a 1 2 3\n1 b 1 2", r"c\.txt, line 2: expected `index name R G B`, found '1 b 1 2'"),
    ("0 a 1 2 3\n\nx b 1 2 4", "line 3: expected"),
    ("0 a 1 2 256", r"line 1: colours lie in 0\.\.255"),
    ("0 a 1 2 3\n0 b 1 2 4", "line 2: index 0 of b is already that of a"),
    ("0 a 1 2 3\n1 b 1 2 3", r"line 2: colour \(1, 2, 3\) of b is already that of a"),
    ("0 a 1 2 3\n1 a 1 2 4", "line 2: name a of a is already"),
    ("index name R G B\n", "no class to score"),
    ("255 void 0 0 0\n", r"no class to score \(1 void\)"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_CLASSES)
def test_bad_class_files(tmp_path, text, expected):
    path = tmp_path / "c.txt"
    path.write_text(text)
    assert re.search(expected, complaint("pred", "ref", "--classes", path))


def test_void_by_name_or_index(tmp_path, classes):
    truth = maps(0)
    pred, ref = write(tmp_path / "pred", painted(truth)), write(tmp_path / "ref", truth)
    for name in ("Water", "1"):
        found = score(pred, ref, "--classes", classes, "--void", name, "--void", "void")
        assert [entry["name"] for entry in found["classes"]] == ["grass", "sand"]
        assert found["void_pixels"] == (truth == 1).sum() and found["per_pixel_accuracy"] == 1
    assert "--void sky: no such class" in complaint(pred, ref, "--classes", classes, "--void", "sky")


# ---------------------------------------------------------------- what is refused


def test_names_that_do_not_match(tmp_path, classes):
    pred = write(tmp_path / "pred", painted(maps(0)), list("abcd"))
    ref = write(tmp_path / "ref", maps(0, 8), list("abcdefgh"))
    assert "4 of the 8 names in " in complaint(pred, ref, "--classes", classes)
    ref = write(tmp_path / "ref2", maps(0, 10), list("klmnopqrst"))
    text = complaint(pred, ref, "--classes", classes)
    assert "10 of the 10 names" in text and "k, l, m, n, o, ..." in text
    mixed = write(tmp_path / "mixed", maps(0), [f"a_gtFine_{kind}" for kind in ("color", "labelIds", "x", "y")])
    assert "the reference holds _color, _labelIds: give a folder of one kind" in complaint(pred, mixed)


def test_refused(tmp_path, classes):
    pred, ref = write(tmp_path / "pred", painted(maps(0))), write(tmp_path / "ref", maps(0))
    more = ["--classes", classes]
    assert "missing" in complaint(tmp_path / "missing", ref, *more)
    assert "--label_ids" in complaint(pred, ref, *more, "--label_ids")
    np.savez(tmp_path / "few.npz", maps(0)[:3])
    assert re.search(r"few\.npz holds 3 label maps, .*ref 4", complaint(tmp_path / "few.npz", ref, *more))
    assert "no array labels; it holds arr_0" in complaint(tmp_path / "few.npz", ref, *more, "--pred_key", "labels")
    np.savez(tmp_path / "float.npz", maps(0) / 2)
    assert "array arr_0 is float64 [4, 6, 5]; expected" in complaint(tmp_path / "float.npz", ref, *more)
    np.savez(tmp_path / "objects.npz", np.array([None, 1]))
    assert "holds Python objects" in complaint(tmp_path / "objects.npz", ref, *more)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no")
    assert "not a readable .npz" in complaint(tmp_path / "broken.npz", ref, *more)
    bad = maps(0)
    bad[2, 1, 1] = 5
    text = complaint(pred, write(tmp_path / "bad", bad), *more)
    assert "street/002.png: index 5 (1 pixels) is no class and not void" in text and "label_ids" not in text
    assert "index 5" in complaint(tmp_path / "bad", ref, *more)
    (pred / "street" / "001.png").write_bytes((pred / "street" / "001.png").read_bytes()[:50])
    assert "street/001.png: not a readable image" in complaint(pred, ref, *more)
    buffer = io.BytesIO()
    Image.new("LA", (5, 6)).save(buffer, "png")
    (pred / "street" / "000.png").write_bytes(buffer.getvalue())
    assert "mode LA is neither indices" in complaint(pred, ref, *more)
    (ref / "street" / "000.jpg").write_bytes(buffer.getvalue())
    assert "names occur with several suffixes, such as street/000" in complaint(pred, ref, *more)
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in complaint(pred, ref, "--classes", tmp_path / "c.bin")


def test_as_a_program_from_another_folder(tmp_path, classes):
    script = ROOT / "evaluations" / "segmentation.py"
    truth = with_void(maps(0))
    write(tmp_path / "pred", painted(truth))
    write(tmp_path / "ref", truth)
    options = ["ref", "--classes", "classes.txt"]
    done = warm.run(script, ["pred", *options, "--table"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"pix2pix \(quoted, Cityscapes\) +0\.85 +0\.40 +0\.32", done.stdout)
    assert re.search(r"InternImage-H \(quoted, Cityscapes\) +- +- +0\.86", done.stdout)
    assert re.search(r"this run \(classes\.txt\) +1\.00 +1\.00 +1\.00", done.stdout)
    done = warm.run(script, ["pred", "none", *options[1:]], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: none: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- files


def test_confusion_matrix_as_csv_and_picture(tmp_path, classes):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    truth, wrong = maps(0), maps(1)
    out = tmp_path / "new" / "folder"
    found = score(write(tmp_path / "p", wrong), write(tmp_path / "r", truth), "--classes", classes, "--out_dir", out)
    rows = list(csv.reader((out / "confusion.csv").read_text().splitlines()))
    assert rows[0] == ["true \\ predicted", "grass", "water", "sand"] and [row[0] for row in rows[1:]] == rows[0][1:]
    assert [[int(value) for value in row[1:]] for row in rows[1:]] == found["confusion"]
    with Image.open(out / "confusion.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


@pytest.fixture(scope="module")
def camvid(tmp_path_factory) -> Path:
    """CamVid's classes.txt and validation label maps."""
    if not CAMVID.is_file():
        pytest.skip(f"{CAMVID} is not there")
    folder = tmp_path_factory.mktemp("camvid")
    with tarfile.open(CAMVID) as archive:
        wanted = [m for m in archive if m.name == "classes.txt" or m.name.startswith("val/labels/")]
        for member in wanted:
            if member.isfile():
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    return folder


def test_camvid(camvid, tmp_path):
    """All indices are valid; painted labels are perfect against themselves and not after a shift."""
    palette = palette_of(read_classes(camvid / "classes.txt"), "CamVid")
    assert len(palette.classes) == 11 and [entry.name for entry in palette.void] == ["Unlabelled"]
    ref, more = camvid / "val" / "labels", ["--classes", str(camvid / "classes.txt")]
    same, shifted = tmp_path / "same", tmp_path / "shifted.npz"
    same.mkdir()
    moved = []
    for path in sorted(ref.iterdir()):
        colours = palette.colours[palette.rows(np.asarray(Image.open(path)))]
        Image.fromarray(colours).save(same / path.name, compress_level=1)
        moved.append(np.roll(colours, 6, axis=1))
    np.savez(shifted, np.stack(moved))
    found = score(same, ref, *more)
    assert (found["per_pixel_accuracy"], found["per_class_accuracy"], found["class_iou"]) == (1, 1, 1)
    assert found["images"] == 101 and found["pixels"] + found["void_pixels"] == 101 * 256 * 256
    worse = score(shifted, ref, *more)
    assert 0.3 < worse["class_iou"] < worse["per_class_accuracy"] < worse["per_pixel_accuracy"] < 0.95
