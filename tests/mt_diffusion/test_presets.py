"""The named settings: each has a line, and the commands take them by name."""

from __future__ import annotations

import pytest

from evaluations.errors import EvaluationError
from guided_mt.errors import UserError
from guided_mt.runs import presets as pixel
from guided_mt.runs.config import preset_names
from latent_mt import configs as latent
from latent_mt.runs.configuration import load_config
from mt_diffusion import presets
from reproduce.table4_presets import PRESETS


def test_all_are_listed_with_a_line(capsys):
    presets.main([])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [
        *preset_names(),
        *sorted(latent.names(), key=lambda name: not name.startswith("autoencoder")),
        *PRESETS,
    ]
    for name, line in lines:
        assert 20 < len(line) < 130 and line[-1] not in ",-", name


@pytest.mark.parametrize("name", ["masked-digits", "camvid_mt", "cityscapes"])
def test_one_is_printed(name, capsys):
    presets.main([name])
    printed = capsys.readouterr().out
    files = [folder.file_of(name) for folder in (pixel, latent) if name in folder.names()]
    assert (
        printed == (files[0].read_text() if files else printed) and printed.startswith("# ") and printed.endswith("\n")
    )


def test_an_unknown_one():
    with pytest.raises(EvaluationError, match=r"unknown preset 'x'; mt-diffusion presets lists them"):
        presets.main(["x"])


def test_latent_configurations_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as from a wheel: no clone here
    (tmp_path / "camvid_mt").mkdir()  # such as a run of that name
    assert load_config("camvid_mt") == load_config(latent.file_of("camvid_mt"))
    with pytest.raises(UserError, match=r"latent_mt/configs/camvid_mt.yaml: no such file; .* --config camvid_mt$"):
        load_config("latent_mt/configs/camvid_mt.yaml")
    with pytest.raises(
        UserError, match=r"camvd_mt: no such file, and no configuration .* \(did you mean camvid_mt\?\)"
    ):
        load_config("camvd_mt")
    with pytest.raises(UserError, match=r"own.yaml: can't be read"):
        load_config("own.yaml")
