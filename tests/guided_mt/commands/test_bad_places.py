"""Inputs that an output would be written over, and what the system or the memory refuses."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from console_runs import exit_code
from PIL import Image
from tiny import flags, step_folder, words
from tiny_latent import write_pairs, write_run

from evaluations.errors import run as run_evaluation
from guided_mt.commands import export, nll, prepare, restore, sample, train
from guided_mt.data import open_source
from guided_mt.errors import UserError, in_a_line
from latent_mt.commands import export_ldm


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of the tiny masked X model."""
    folder = tmp_path_factory.mktemp("places") / "run"
    train.main(flags(log_dir=folder, total_steps=2))
    return folder


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latent places")
    return write_run(folder / "run", write_pairs(folder / "pairs"))


def complaint(command, argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        command.main(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("linked", [False, True], ids=["same name", "by a link"])
@pytest.mark.parametrize("command", [restore, nll], ids=["restore", "nll"])
def test_data_are_not_written_over(command, linked, run, tmp_path):
    data = out = tmp_path / "data.npz"
    np.savez(data, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    if linked:
        out = tmp_path / "link.npz"
        out.symlink_to(data)
    before = data.read_bytes()
    text = complaint(command, words(model_path=run, data_dir=data, out=out, num_samples=2))
    assert f"--out {out}: would be written over {data}, which --data_dir reads; give another name" in text
    assert data.read_bytes() == before


def test_a_mask_is_not_written_over(run, tmp_path):
    """The picture beside OUT.npz has the mask's name."""
    Image.new("RGB", (8, 8), "white").save(tmp_path / "m.png")
    before = (tmp_path / "m.png").read_bytes()
    argv = words(model_path=run, data_dir="builtin:digits-test", num_samples=2, out=tmp_path / "m.npz")
    assert "which --mask reads" in complaint(restore, [*argv, "--mask", "image", str(tmp_path / "m.png")])
    assert (tmp_path / "m.png").read_bytes() == before


def test_weights_are_not_written_over(run, latent_run, tmp_path):
    file = tmp_path / "both.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "optimizer": {}}, file)
    before = file.read_bytes()
    assert "which --model_path reads" in complaint(export, words(model_path=file, out=file))
    assert file.read_bytes() == before
    weights = Path(shutil.copy(step_folder(latent_run, 4) / "model.safetensors", tmp_path))
    assert "which --model_path reads" in complaint(export_ldm, words(model_path=weights, out=weights))
    assert "must end in .pt" in complaint(export, words(model_path=run, out=tmp_path / "x.ckpt"))


def test_the_folder_of_checkpoints_stands_for_its_run(run, tmp_path, capsys):
    out = tmp_path / "s.npz"
    sample.main(words(model_path=run / "checkpoints", num_samples=1, steps=100, out=out))
    assert out.exists() and "# 40 network calls and not 100: the schedule has no more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.full(4, 10**12), r"class ids 0, 1, 2, \.\.\. below 1,048,576.*from 1000000000000"),
        (np.array(list("abcd")), r"it is <U1"),
        (np.array([True] * 4), r"it is bool"),
    ],
    ids=["huge", "text", "bool"],
)
def test_labels_that_are_no_class_ids(labels, expected, tmp_path):
    np.savez(tmp_path / "l.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=labels)
    with pytest.raises(UserError, match=expected):
        open_source(tmp_path / "l.npz")


def test_a_link_in_a_circle_is_left_out(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("b.png")
    assert list(open_source(tmp_path).names) == ["a.png"]


def test_prepare_takes_no_more_workers_than_a_machine_has(tmp_path):
    for workers, expected in ((10**8, "must be at most 1024"), (-1, "must be at least 0")):
        argv = ["builtin:digits", str(tmp_path / "o.zip"), "--size", "8", "--workers", str(workers)]
        assert expected in complaint(prepare, argv)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/x"), "run/x: No space left on device"),
        (MemoryError(), "memory has run out; take a smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory has run out (DefaultCPU"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory has run out (CUDA out of memory"),
    ],
    ids=["full disk", "python", "torch", "gpu"],
)
def test_what_the_machine_refuses_is_one_line(error, expected, capsys):
    def main(_) -> None:
        raise error

    assert exit_code(main) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")
    if isinstance(error, (OSError, MemoryError)):
        with pytest.raises(SystemExit) as end:
            run_evaluation(main, [])
        assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {expected.partition(';')[0]}")
    assert in_a_line(RuntimeError("a fault in the code")) == ""
