"""A new modality is a class, a head and a row of TASKS: flags, training, checkpoints, sampling and grids follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from tiny import flags, words

from guided_mt.commands import sample as sample_command
from guided_mt.commands import train as train_command
from guided_mt.errors import UserError
from guided_mt.modalities import ImageModality
from guided_mt.modalities.names import check_name
from guided_mt.modalities.registry import TASKS, Task
from guided_mt.networks.heads import ImageHead
from guided_mt.runs.config import option


@dataclass
class GreyConfig:
    """A grey version of the image"""

    grey_gain: float = option(1.0, "brightness of the grey image")


class Grey(ImageModality):
    """x = the image's mean over colours, times a gain."""

    def __init__(self, gain: float, variance):
        super().__init__("grey", variance)
        self.gain = gain

    def from_batch(self, images, streams):
        return self.gain * images.x_start.mean(dim=1, keepdim=True).expand_as(images.x_start)


@pytest.fixture
def registered(monkeypatch):
    row = Task(
        GreyConfig, lambda config, v: Grey(config.grey_gain, v), lambda config, backbone, process: ImageHead(backbone)
    )
    monkeypatch.setitem(TASKS, "grey", row)


@pytest.mark.parametrize("tasks, variant", [("grey", "X"), ("grey", "U"), ("masked,grey", "U"), ("masked,grey", "X")])
def test_a_new_row_trains_and_samples(registered, tmp_path, tasks, variant):
    flags = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 --diffusion_steps 20"
    flags += (
        " --noise_schedule cosine --data_dir builtin:digits --global_batch_size 4 --total_steps 2 --sample_interval 2"
    )
    flags += (
        f" --ema_rate 0.5 --grey_gain 0.5 --mt_task {tasks} --mt_variant {variant} --log_dir {tmp_path} --device cpu"
    )
    train_command.main(flags.split())
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert all(name in header and f"{name}_q3" in header for name in tasks.split(","))
    assert (tmp_path / "grids" / "step_00000002.png").exists()
    assert "grey_gain: 0.5" in (tmp_path / "config.yaml").read_text()

    out = tmp_path / "drawn.npz"
    options = f"--model_path {tmp_path} --num_samples 2 --steps 3 --out {out} --device cpu".split()
    sample_command.main(options)
    with np.load(out) as file:
        expected = {"arr_0", *(tasks.split(",") if variant == "U" else [])}
        assert set(file.files) == expected
        assert all(file[name].shape == (2, 8, 8, 3) and file[name].dtype == np.uint8 for name in expected)


@dataclass
class NoConfig:
    """Nothing to set"""


class Elsewhere(Grey):
    """Its array has the name of the image's."""

    def arrays(self, x):
        return {"arr_0": super().arrays(x)["grey"]}


@pytest.mark.parametrize(
    "name",
    ["l1", "log2_loss_scale", "role", "val_loss", "arr_1", "rms_label", "label_q0", "label_draw", "two words", "none"],
)
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(UserError, match=f"modality '{name}': "):
        ImageModality(name)


def test_a_row_of_a_taken_name_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(
        TASKS,
        "vb",
        Task(NoConfig, lambda config, v: Grey(1.0, v), lambda config, backbone, process: ImageHead(backbone)),
    )
    with pytest.raises(UserError, match=r"modality 'vb': the name is that of a column of progress\.csv"):
        train_command.main(flags(mt_task="vb", log_dir=tmp_path))


def test_every_column_of_a_run_is_taken(tmp_path):
    train_command.main(flags(mt_task="label", num_classes=10, mt_conflict_interval=1, total_steps=1, log_dir=tmp_path))
    columns = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"vb", "rms_label", "spread_label", "grad_cos_denoising_label"} < set(columns)
    for column in set(columns) - {"label"}:
        with pytest.raises(UserError, match=f"modality '{column}'"):
            check_name(column)


def test_arrays_that_another_has_are_refused(monkeypatch, tmp_path):
    row = Task(NoConfig, lambda config, v: Elsewhere(1.0, v), lambda config, backbone, process: ImageHead(backbone))
    monkeypatch.setitem(TASKS, "grey", row)
    train_command.main(flags(mt_task="grey", mt_variant="U", total_steps=1, log_dir=tmp_path))
    with pytest.raises(UserError, match="modality 'grey': writes the array arr_0"):
        sample_command.main(words(model_path=tmp_path, num_samples=2, steps=2, out=tmp_path / "s.npz", device="cpu"))


@dataclass
class FileConfig:
    """Greys on disk"""

    grey_file: str = option("", "where they are")


def test_a_run_goes_on_with_a_file_that_moved(monkeypatch, tmp_path):
    row = Task(FileConfig, lambda config, v: Grey(1.0, v), lambda config, backbone, process: ImageHead(backbone))
    monkeypatch.setitem(TASKS, "grey", row)
    again = {"mt_task": "grey", "total_steps": 1, "log_dir": tmp_path}
    train_command.main(flags(**again, grey_file="here"))
    with pytest.raises(UserError, match="grey_file"):
        train_command.main(flags(**again, grey_file="there"))
    monkeypatch.setitem(TASKS, "grey", replace(row, file_options=("grey_file",)))
    train_command.main(flags(**again, grey_file="there"))
