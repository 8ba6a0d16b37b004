"""Bad input to models of labels, vectors and several modalities: one clear line that names flag or file and the way out."""

from __future__ import annotations

import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import DIGITS, ROOT, assert_same, contents, flags, progress, step_folder, words

from guided_mt.commands import classifier_train, nll, restore, sample, train
from guided_mt.data import open_source
from guided_mt.errors import UserError
from guided_mt.modalities import LabelModality, MaskedImage, VectorModality


def complaint(command, argv: list[str]) -> str:
    """The UserError's text, which must be one line that a terminal shows without a traceback."""
    with pytest.raises(UserError) as caught:
        command.main(argv)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


def training(**values: Any) -> list[str]:
    return flags(**{"mt_task": "label", "num_classes": 10, "total_steps": 1, **values})


E_HEAD = {"mt_label_head": "E", "classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "8"}
RUNS = {
    "label U": {"mt_variant": "U"},
    "label X": {"mt_variant": "X"},
    "label E": {"mt_variant": "U", **E_HEAD},
    "masked,label": {"mt_task": "masked,label", "mt_variant": "any"},
    "masked": {"mt_task": "masked", "mt_variant": "U"},
    "none": {"mt_task": "none"},
    "vectors": {"mt_task": "representation", "mt_variant": "X"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One step each."""
    folder = tmp_path_factory.mktemp("bad labels")
    np.savez(folder / "vectors.npz", representation=np.zeros((DIGITS, 5), np.float32))
    for name, row in RUNS.items():
        needed = {"representation_file": folder / "vectors.npz"} if name == "vectors" else {}
        train.main(training(log_dir=folder / name, **row, **needed))
    return {name: folder / name for name in RUNS}


def test_images_without_a_class_are_refused_where_each_needs_one(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((9, 8, 8, 3), np.uint8), np.arange(9) - 1)
    values = {"data_dir": tmp_path / "x.npz", "log_dir": tmp_path / "run"}
    text = complaint(train, training(**values, mt_task="none", class_cond=True))
    assert "1 of 9 images have no class, which --class_cond True needs; leave them out" in text
    with pytest.raises(UserError, match="1 of 9 images have no class, which a classifier needs"):
        classifier_train.main(
            words(**values, image_size=8, num_classes=10, classifier_width=64, total_steps=1, device="cpu")
        )


def test_numbers_of_a_file_are_ids_of_the_model(tmp_path, caplog):
    np.savez(tmp_path / "x.npz", arr_1=np.array([0, 2]))
    names = ["0", "1", "10", "2"]  # of a run whose classes were sorted as words
    caplog.set_level(logging.INFO)
    read = LabelModality(4).read(str(tmp_path / "x.npz"), 8, names)
    assert read.tolist() == [0, 2] and "its numbers are ids of the model: 2 is class 10" in caplog.text


@pytest.fixture
def animals(tmp_path) -> Path:
    """Nine images of three classes, in folders."""
    for number, name in enumerate(("ant", "bee", "cow")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.fromarray(np.full((8, 8, 3), 80 * number + i, np.uint8))
            picture.save(tmp_path / "animals" / name / f"{i}.png")
    return tmp_path / "animals"


# ---------------------------------------------------------------- flags of training

TRAINING = [
    ("--mt_task labl", r"--mt_task: unknown 'labl' \(did you mean label\?\); choose from none, masked, label"),
    ("--mt_task masked,masked", r"--mt_task masked,masked: names masked twice"),
    ("--mt_task masked,labels", r"--mt_task: unknown 'labels' \(did you mean label\?\)"),
    ("--mt_weights label=papr", r"--mt_weights: 'papr' is none of .*\(did you mean paper\?\)"),
    ("--mt_weights label=", r"--mt_weights: '' is none of paper, "),
    ("--mt_weights masked=paper", r"masked but --mt_task label has no 'masked'; write label=VALUE"),
    ("--mt_weights lable=paper", r"has no 'lable' \(did you mean label\?\); write label=VALUE"),
    ("--mt_weights label=paper,label=bridge", r"--mt_weights label=.*: names label twice"),
    ("--mt_weights label=paper,bridge", r"--mt_weights label=paper,bridge: names bridge but"),
    ("--mt_task masked,label --mt_loss_weight masked=x", r"--mt_loss_weight must be at least 0.* not masked=x"),
    ("--mt_loss_weight label=-1", r"--mt_loss_weight must be at least 0.* not label=-1"),
    ("--mt_loss_weight label=nan", r"--mt_loss_weight must be at least 0.* not label=nan"),
    ("--mt_loss_weight masked=0.1", r"--mt_loss_weight masked=0.1: .*--mt_task label has no 'masked'"),
    ("--mt_loss_weight 0.1,0.2", r"--mt_loss_weight must be at least 0"),
    ("--mt_task none --mt_weights label=paper", r"--mt_task none has no 'label'; write one value"),
    ("--mt_variant anny", r"--mt_variant: 'anny' is none of .*\(did you mean any\?\)"),
    ("--mt_encoding_norm rsm", r"--mt_encoding_norm: 'rsm' is none of none, rms"),
    ("--mt_encoder_refresh 0", r"--mt_encoder_refresh must be at least 1, not 0"),
    ("--mt_conflict_interval -1", r"--mt_conflict_interval must be at least 0"),
    ("--mt_given_prob 2", r"--mt_given_prob must be between 0 and 1"),
    ("--mt_context_dim 0", r"--mt_context_dim must be at least 1, or -1"),
    ("--mt_label_head F", r"--mt_label_head: 'F' is none of M, E"),
    ("--mt_label_head E --classifier_width 48", r"--classifier_width 48 makes .*a multiple of 64"),
    ("--mt_label_head E --classifier_pool spatal", r"--classifier_pool: 'spatal' is none of .*did you mean spatial"),
    (
        "--class_cond True",
        r"--class_cond True gives the network the class that --mt_task label is to predict; leave one",
    ),
    ("--num_classes 4", r"builtin:digits: has 10 classes; raise --num_classes 4 to 10"),
    ("--mt_task representation", r"--representation_file is missing"),
    ("--mt_task representation --representation_file gone.npz", r"--representation_file gone.npz: .*No such file"),
    (
        f"--mt_task representation --representation_file {ROOT}/README.md",
        r"README.md: can't be read as .npz or .npy \(it is another kind of file\)",
    ),
]


@pytest.mark.parametrize(("typed", "expected"), TRAINING, ids=[row[0][:60] for row in TRAINING])
def test_training_flags(typed, expected, tmp_path):
    assert re.search(expected, complaint(train, [*training(log_dir=tmp_path / "run"), *typed.split(" ")]))
    assert not (tmp_path / "run").exists()


def test_a_list_of_tasks_is_written_one_way(tmp_path):
    """'label,' is 'label', for the run folder and for resuming."""
    run = tmp_path / "run"
    train.main(training(log_dir=run, mt_task="label,"))
    train.main(training(log_dir=run, mt_task=" label", total_steps=2))
    assert "mt_task: label\n" in (run / "config.yaml").read_text() and len(progress(run)) == 2


# ---------------------------------------------------------------- data


def test_images_without_classes_are_named(animals, tmp_path):
    """The first file that has none, or the .npz."""
    argv = training(log_dir=tmp_path / "run", global_batch_size=2)
    shutil.copy(animals / "ant" / "0.png", animals / "stray.png")
    text = complaint(train, [*argv, *words(data_dir=animals)])
    assert f"{animals}: --mt_task label needs classes (sub-folders" in text and "stray.png has none" in text
    (tmp_path / "flat").mkdir()
    for name in ("ant_1.png", "ant_2.png", "3.png"):
        shutil.copy(animals / "ant" / "0.png", tmp_path / "flat" / name)
    assert "and 3.png has none" in complaint(train, [*argv, *words(data_dir=tmp_path / "flat")])
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    text = complaint(train, [*argv, *words(data_dir=tmp_path / "plain.npz")])
    assert f"{tmp_path / 'plain.npz'}: --mt_task label needs classes" in text and "arr_1 in an .npz" in text
    assert not (tmp_path / "run").exists()


def test_more_classes_than_the_checkpoint(animals, tmp_path):
    """When resuming and when evaluating; folders by name, an .npz by number. Nothing is lost."""
    argv = training(log_dir=tmp_path / "run", data_dir=animals, global_batch_size=4)
    train.main(argv)
    before = contents(step_folder(tmp_path / "run", 1))
    (animals / "bee").rename(animals / "wasp")
    scoring = words(model_path=tmp_path / "run", data_dir=animals, out=tmp_path / "n.npz", timestep_respacing=2)
    for command, words_typed in ((train, [*argv, "--total_steps", "2"]), (nll, scoring)):
        text = complaint(command, words_typed)
        assert f"{animals}: class 'wasp' is not one of the 3 saved classes" in text and "leave it out" in text
    pixels = np.zeros((8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "five.npz", arr_0=pixels, arr_1=np.arange(8) % 5)
    text = complaint(train, [*argv, *words(data_dir=tmp_path / "five.npz", total_steps=2)])
    assert "five.npz: class id 4 in arr_1, but there are 3 saved classes; leave it out of the data" in text
    np.savez(tmp_path / "plain.npz", arr_0=pixels)
    text = complaint(nll, [*scoring, *words(data_dir=tmp_path / "plain.npz")])
    assert "plain.npz: --mt_task label needs classes" in text
    assert_same(before, contents(step_folder(tmp_path / "run", 1)))


def test_starting_from_a_run_of_other_classes(runs, animals, tmp_path, caplog):
    """Another number is refused; as many with other names is said, since ids then mean something else."""
    argv = training(log_dir=tmp_path / "run", data_dir=animals, global_batch_size=4, resume_checkpoint=runs["label U"])
    text = complaint(train, [*argv, "--num_classes", "3"])
    assert "another architecture" in text and "compare num_classes (10 there, 3 here)" in text
    with caplog.at_level(logging.WARNING, logger="guided_mt"):
        train.main(argv)
    assert "knew other classes, 10 of them and not 3: id 0 was '0' and is now 'ant'" in caplog.text


VECTORS = [
    (np.zeros((12, 5), np.float32), r"has 12 vectors for the 1437 images of builtin:digits"),
    (np.full((DIGITS, 5), np.nan, np.float32), r"has values that are not finite"),
    (np.zeros(DIGITS, np.float32), r"vectors must be floats \[N, D\], not float32 \[1437\]"),
    (np.zeros((DIGITS, 5), int), r"vectors must be floats \[N, D\], not int64 \[1437, 5\]"),
    (np.zeros((DIGITS, 0), np.float32), r"vectors must be floats \[N, D\], not float32 \[1437, 0\]"),
    (np.array([None]), r"can't be read as .npz or .npy \(it holds pickled objects, which are never loaded\)"),
]


@pytest.mark.parametrize(("vectors", "expected"), VECTORS, ids=[row[1][:40] for row in VECTORS])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_vectors_that_do_not_fit(vectors, expected, kind, tmp_path):
    file = tmp_path / f"v.{kind}"
    np.savez(file, representation=vectors) if kind == "npz" else np.save(file, vectors)
    argv = training(log_dir=tmp_path / "run", mt_task="representation", representation_file=file)
    text = complaint(train, argv)
    assert text.startswith(f"--representation_file {file}: ") and re.search(expected, text)


def test_vectors_of_another_width_or_name(runs, tmp_path):
    file = runs["vectors"].parent / "vectors.npz"
    argv = training(log_dir=tmp_path / "run", mt_task="representation", mt_variant="X", representation_file=file)
    text = complaint(train, [*argv, *words(representation_size=7)])
    assert f"--representation_file {file}: has vectors of 5 numbers, this model takes 7" in text
    np.savez(tmp_path / "clip.npz", clip=np.zeros((DIGITS, 5), np.float32))
    text = complaint(train, [*argv, *words(representation_file=tmp_path / "clip.npz")])
    assert "has neither an array 'representation' nor arr_0 (it has clip)" in text
    np.save(tmp_path / "wide.npy", np.zeros((DIGITS, 6), np.float32))
    again = {"log_dir": runs["vectors"], "representation_file": tmp_path / "wide.npy", "total_steps": 2}
    assert "representation_size (5 there, 6 here)" in complaint(train, [*argv, *words(**again)])
    scoring = words(model_path=runs["vectors"], data_dir="builtin:digits-test", out=tmp_path / "n.npz")
    assert "has 1437 vectors for the 360 images of builtin:digits-test" in complaint(nll, scoring)


def test_a_damaged_compressed_file_is_one_line(tmp_path):
    """Whatever it is read as: the damage shows only while its arrays are decompressed."""
    file, rng = tmp_path / "damaged.npz", np.random.default_rng(0)
    arrays = {"arr_0": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), "arr_1": rng.integers(0, 9, 5000)}
    np.savez_compressed(
        file, **arrays, representation=rng.standard_normal((50, 5), dtype=np.float32), masked=arrays["arr_0"]
    )
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        starts = [info.header_offset + 80 for info in archive.infolist()]
    for start in starts:
        content[start : start + 40] = bytes(255 - byte for byte in content[start : start + 40])
    file.write_bytes(bytes(content))
    for read in (
        lambda: LabelModality(9).read(str(file), 8, None),
        lambda: VectorModality("representation", 5).read(str(file), 8, None),
        lambda: MaskedImage(patch=2).read(str(file), 8, None),
        lambda: open_source(str(file)),
    ):
        with pytest.raises(UserError, match=r"damaged\.npz"):
            read()


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("run", "change", "expected"),
    [
        ("label U", {"mt_label_head": "E"}, "mt_label_head (M there, E here)"),
        ("label E", {"mt_label_head": "M"}, "mt_label_head (E there, M here)"),
        ("label U", {"mt_context_dim": 64}, "mt_context_dim (-1 there, 64 here)"),
        ("label U", {"mt_encoding_norm": "rms"}, "mt_encoding_norm (none there, rms here)"),
        ("label U", {"mt_encoder_refresh": 4}, "mt_encoder_refresh (1 there, 4 here)"),
        ("label U", {"num_classes": 12}, "num_classes (10 there, 12 here)"),
        ("label U", {"mt_variant": "any"}, "mt_variant (U there, any here)"),
        ("label U", {"mt_loss_weight": "label=0.2"}, "mt_loss_weight (0.1 there, label=0.2 here)"),
        ("masked,label", {"mt_task": "label,masked"}, "mt_task (masked,label there, label,masked here)"),
        ("masked,label", {"mt_given_prob": 0.4}, "mt_given_prob (0.5 there, 0.4 here)"),
        ("label E", {"classifier_depth": 2}, "classifier_depth (1 there, 2 here)"),
    ],
    ids=str,
)
def test_resuming_with_other_settings_names_them(run, change, expected, runs):
    text = complaint(train, training(log_dir=runs[run], **{**RUNS[run], "total_steps": 2, **change}))
    assert expected in text and text.count(" there, ") == 1 and "repeat them to resume" in text


def test_what_is_measured_and_where_files_lie_may_change(runs, tmp_path):
    """--mt_conflict_interval can be switched on in a running training, and the vectors may have moved."""
    run = Path(shutil.copytree(runs["vectors"], tmp_path / "run"))
    moved = shutil.copy(runs["vectors"].parent / "vectors.npz", tmp_path / "moved.npz")
    changed = {"representation_file": moved, "mt_conflict_interval": 1, "total_steps": 2}
    train.main(training(log_dir=run, **{**RUNS["vectors"], **changed}))
    first, second = progress(run)
    assert first["grad_cos_denoising_representation"] == "" and second["grad_cos_denoising_representation"] != ""


# ---------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files to give that are not what they should be; the working directory of the tests with `--given`."""
    folder = tmp_path_factory.mktemp("files")
    np.savez(folder / "large.npz", labels=np.array([1, 2, 30, 4]))
    np.savez(folder / "two.npz", labels=np.array([1, 2]), representation=np.zeros((2, 5)))
    np.savez(folder / "floats.npz", labels=np.array([1.0, 2.0, 3.0, 4.0]))
    np.savez(folder / "empty.npz", labels=np.array([], int), masked=np.zeros((0, 8, 8, 3), np.uint8))
    np.savez(folder / "objects.npz", labels=np.array([None]))
    np.savez(folder / "small.npz", masked=np.zeros((4, 4, 4, 3), np.uint8), representation=np.zeros((4, 4)))
    np.savez(folder / "infinite.npz", representation=np.full((4, 5), np.inf))
    (folder / "text.npz").write_text("hello")
    (folder / "text.png").write_text("hello")
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "0.png")
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "1.png")
    return folder


GIVEN = [
    ("masked,label", "label=99", r"--given label=99: no such class; this model has 10 classes"),
    ("masked,label", "label=-1", r"--given label=-1: no such class; this model has 10 classes"),
    ("masked,label", "label=zebra", r"--given label=zebra: no such class; this model has 10 classes.*: 0, 1, 2"),
    ("masked,label", "label=", r"--given label=: write label=VALUE"),
    ("masked,label", "label", r"--given label: write label=VALUE"),
    ("masked,label", "", r"--given: write NAME=VALUE"),
    ("masked,label", "labl=3", r"no modality 'labl' \(did you mean label\?\); it has masked, label"),
    ("masked,label", "mask=x.png", r"no modality 'mask' \(did you mean masked\?\)"),
    ("masked,label", "label=3,representation=x", r"no modality 'representation'; it has masked, label"),
    ("masked,label", "label=3,label=4", r"--given label=3,label=4: names label twice"),
    ("masked", "label=3", r"no modality 'label'; it has masked"),
    ("none", "label=3", r"no modality 'label'; it has no modality"),
    ("masked,label", "label=large.npz", r"label=large.npz: ids run from 1 to 30, this model has 10 classes"),
    ("masked,label", "label=two.npz", r"label=two.npz: holds 2 for 4 samples; lower --num_samples"),
    ("masked,label", "label=floats.npz", r"label=floats.npz: needs class ids \[N\] as array arr_1 or labels"),
    ("masked,label", "label=empty.npz", r"label=empty.npz: needs class ids"),
    (
        "masked,label",
        "label=objects.npz",
        r"label=objects.npz: can't be read .*pickled objects, which are never loaded",
    ),
    ("masked,label", "label=infinite.npz", r"label=infinite.npz: needs class ids"),
    ("masked,label", "label=text.npz", r"label=text.npz: can't be read as .npz"),
    ("masked,label", "label=gone.npz", r"label=gone.npz: can't be read as .npz \(No such file"),
    ("masked,label", "masked=gone.png", r"--given masked=gone.png: no such file or folder"),
    ("masked,label", "masked=text.png", r"--given masked=text.png: can't be read"),
    ("masked,label", "masked=text.npz", r"--given masked=text.npz: can't be read as .npz"),
    ("masked,label", "masked=small.npz", r"'masked' is uint8 \[4, 4, 4, 3\]; this model wants uint8 \[N, 8, 8, 3\]"),
    ("masked,label", "masked=empty.npz", r"'masked' is uint8 \[0, 8, 8, 3\]; this model wants"),
    ("masked,label", "masked=two.npz", r"--given masked=two.npz: no array arr_0"),
    ("masked,label", "masked=pictures", r"masked=pictures: holds 2 for 4 samples; lower --num_samples"),
    ("masked,label", "masked=builtin:digts", r"--given masked=builtin:digts: .*did you mean digits"),
    ("vectors", "representation=gone.npz", r"--given representation=gone.npz: can't be read .*No such file"),
    ("vectors", "representation=small.npz", r"has vectors of 4 numbers, this model takes 5"),
    ("vectors", "representation=infinite.npz", r"representation=infinite.npz: has values that are not finite"),
    ("vectors", "representation=two.npz", r"holds 2 for 4 samples"),
    ("vectors", "representation=large.npz", r"has neither an array 'representation' nor arr_0 \(it has labels\)"),
]


@pytest.mark.parametrize(("run", "given", "expected"), GIVEN, ids=[f"{row[0]} {row[1]}" for row in GIVEN])
def test_given(run, given, expected, runs, files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    argv = words(model_path=runs[run], out=tmp_path / "s.npz", num_samples=4, steps=2, device="cpu")
    text = complaint(sample, [*argv, "--given", given])
    assert text.startswith("--given") and re.search(expected, text)
    assert not list(tmp_path.iterdir())  # and nothing stands in the way of the next try


def test_a_class_by_almost_its_name(animals, tmp_path):
    train.main(training(log_dir=tmp_path / "run", data_dir=animals, num_classes=3, global_batch_size=4))
    argv = words(model_path=tmp_path / "run", out=tmp_path / "s.npz", num_samples=2, steps=2)
    text = complaint(sample, [*argv, "--given", "label=cows"])
    assert "no such class (did you mean cow?); this model has 3 classes" in text and text.endswith(": ant, bee, cow")


SAMPLING = [
    ("label U", "--mt_variant X", r"mt_variant \(U there, X here\); leave these flags out"),
    ("label U", "--mt_task masked", r"mt_task \(label there, masked here\); leave these flags out"),
    ("label U", "--mt_label_head E", r"mt_label_head \(M there, E here\); leave"),
    ("label U", "--num_classes 5", r"num_classes \(10 there, 5 here\); leave"),
    ("label U", "--mt_context_dim 5", r"mt_context_dim \(-1 there, 5 here\); leave"),
    ("label U", "--mt_encoding_norm rms", r"mt_encoding_norm \(none there, rms here\); leave"),
    ("label U", "--mt_weights bridge", r"mt_weights \(paper there, bridge here\); leave"),
    ("vectors", "--representation_size 4", r"representation_size \(5 there, 4 here\); leave"),
    ("label U", "--class 3 --given label=3", r"--given label=3,label=3: names label twice"),
    ("masked", "--class 3", r"--class needs a class-conditional model"),
    ("label U", "--guidance_scale 3", r"--guidance_scale needs a condition to strengthen: .*--given"),
    ("none", "--guidance_scale 3", r"--guidance_scale needs a condition to strengthen"),
    ("label U", "--guidance_scale 3 --given label=3", r"--guidance_scale needs .*: train with --mt_drop_prob 0.1"),
    ("label X", "--guidance_scale 3 --given label=3", r"--guidance_scale needs .*: train with --mt_drop_prob 0.1"),
    ("masked,label", "--guidance_scale 3 --given label=3", r"--guidance_scale needs .*train with --mt_drop_prob"),
    ("label U", "--guidance_scale -1", r"--guidance_scale must be at least 0"),
]


@pytest.mark.parametrize(("run", "typed", "expected"), SAMPLING, ids=[f"{row[0]} {row[1]}" for row in SAMPLING])
def test_sampling_flags(run, typed, expected, runs, tmp_path):
    argv = words(model_path=runs[run], out=tmp_path / "s.npz", num_samples=2, steps=2, device="cpu")
    assert re.search(expected, complaint(sample, [*argv, *typed.split(" ")]))
    assert not (tmp_path / "s.npz").exists()


def test_restoring_with_a_model_that_can_not(runs, tmp_path):
    argv = words(model_path=runs["label X"], data_dir="builtin:digits-test", out=tmp_path / "r.npz", num_samples=2)
    assert "--method mt needs a model trained with --mt_task masked" in complaint(restore, argv)
    assert "never saw plain noisy images" in complaint(restore, [*argv, "--method", "sdedit"])
