"""The pages of docs/ are true: their code and their commands are run as they stand."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny import MODEL, PROCESS, ROOT, TRAINING, progress, step_folder, words
from tiny_latent import SIZE, write_config, write_images

from guided_mt import create_gaussian_diffusion
from guided_mt.commands import sample
from guided_mt.diffusion import sampling
from guided_mt.diffusion.sampling import SAMPLERS
from guided_mt.errors import UserError
from guided_mt.modalities.registry import TASKS
from latent_mt.commands import latent_sample

PAGE = (ROOT / "docs" / "new_modality.md").read_text()


LATENT = "## In latent space\n"  # the section's heading


def blocks(language: str, latent: bool = False) -> list[str]:
    """The page's code in this language, outside the section on latent space or inside it."""
    before, _, rest = PAGE.partition(LATENT)
    inside, heading, after = rest.partition("\n## ")
    text = inside if latent else before + heading + after
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def mean_colour(tmp_path, monkeypatch):
    """The page's file as a program: (words of its command line) -> None. Its row of TASKS goes away afterwards."""
    (code,) = blocks("python")
    file = tmp_path / "mean_colour.py"
    file.write_text(code)
    monkeypatch.setitem(TASKS, "colour", None)  # remembered as absent
    del TASKS["colour"]

    def program(argv: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [str(file), *argv])
        runpy.run_path(str(file), run_name="__main__")

    return program


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


def test_the_new_modality_is_under_60_lines():
    (code,) = blocks("python")
    assert len(code.splitlines()) < 60
    assert all(len(line) <= 120 for line in code.splitlines())


@pytest.mark.parametrize("variant", ["U", "X", "any"])
def test_the_new_modality_trains_resumes_and_samples(variant, mean_colour, tmp_path):
    run, out = tmp_path / "run", tmp_path / "s.npz"
    settings = {**MODEL, **PROCESS, **TRAINING, "mt_task": "masked,colour", "mt_variant": variant, "log_dir": run}
    settings |= {"predict_xstart": True, "lr": 0.005, "ema_rate": 0, "colour_gain": 1.5}
    settings |= {"sample_interval": 2} if variant == "any" else {}
    for steps in (2, 3):  # the second time it resumes
        mean_colour(["train", *words(**settings, total_steps=steps)])
    assert [row["step"] for row in progress(run)] == ["1", "2", "3"] and step_folder(run, 2).exists()
    assert all(np.isfinite(float(row["colour"])) for row in progress(run))
    assert "colour_gain: 1.5" in (run / "config.yaml").read_text()

    drawing = ["sample", *words(model_path=run, num_samples=3, steps=3, device="cpu", out=out)]
    mean_colour(drawing)
    unknown = arrays(out)
    assert ("colour" in unknown) == (variant != "X")
    mean_colour([*drawing, "--given", "colour=0.5/-0.2/0.1"])
    given = arrays(out)
    np.testing.assert_allclose(given["colour"], np.tile([0.75, -0.3, 0.15], (3, 1)), rtol=1e-6)
    assert given["arr_0"].shape == (3, 8, 8, 3) and (given["arr_0"] != unknown["arr_0"]).any()


def test_the_pages_commands(mean_colour, tmp_path, capsys):
    """As printed, but tiny, and without the launcher."""
    (commands,) = blocks("sh")
    small = {**MODEL, **PROCESS, **TRAINING, "num_head_channels": -1, "total_steps": 2, "ema_rate": "0.5"}
    tiny = {"train": small, "sample": {"num_samples": 2, "steps": 2, "out": tmp_path / "s.npz", "device": "cpu"}}
    for line in commands.splitlines():
        launched, _, argv = line.partition("python mean_colour.py ")
        assert launched in ("", "mpiexec -n 2 ")
        argv = [word.replace("runs/colour", str(tmp_path / "run")) for word in shlex.split(argv)]
        mean_colour([*argv, *words(**tiny[argv[0]])])
    assert np.allclose(arrays(tmp_path / "s.npz")["colour"], -0.2)
    scoring = {"model_path": tmp_path / "run", "data_dir": "builtin:digits-test", "num_samples": 2, "device": "cpu"}
    mean_colour(["nll", *words(**scoring, out=tmp_path / "n.npz", timestep_respacing=2)])
    assert np.isfinite(arrays(tmp_path / "n.npz")["L2_colour"]).all()

    with pytest.raises(SystemExit) as stopped:
        mean_colour(["sample", "--model_path", str(tmp_path / "run"), "--given", "colour=red"])
    assert stopped.value.code == 2
    assert "error: --given colour=red: write RED/GREEN/BLUE" in capsys.readouterr().err


def test_the_original_scripts_say_that_they_dont_know_it(mean_colour, tmp_path):
    run = tmp_path / "run"
    mean_colour(["train", *words(**MODEL, **PROCESS, **TRAINING, mt_task="colour", log_dir=run, total_steps=1)])
    del TASKS["colour"]
    with pytest.raises(UserError, match=r"config.yaml: was trained with the modality 'colour'.*docs/new_modality.md"):
        sample.main(words(model_path=run, num_samples=1))


def test_the_new_modality_in_latent_space(tmp_path, monkeypatch, capsys):
    """As printed, each command a program of its own that imports the row; trained, resumed, and drawn from with a colour given."""
    (yaml,), (code,), (commands,) = (blocks(language, latent=True) for language in ("yaml", "python", "sh"))
    (tmp_path / "mean_colour.py").write_text(blocks("python")[0])
    (tmp_path / "latent_colour.py").write_text(code)
    images, run = write_images(tmp_path / "images"), tmp_path / "runs/colour"
    file = write_config(tmp_path / "tiny.yaml", images, run, mt_sides=[], mt_swap_prob=0.0, mt_variant="U")
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), OmegaConf.create(yaml)), tmp_path / "colour.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(TASKS, "colour", None)  # remembered as absent
    few = ["--steps", "2", "--out", str(tmp_path / "out")]

    def program(argv: list[str]) -> None:
        TASKS.pop("colour", None)
        monkeypatch.delitem(sys.modules, "mean_colour", raising=False)
        monkeypatch.setattr(sys, "argv", ["latent_colour.py", *argv])
        runpy.run_path("latent_colour.py", run_name="__main__")

    training, drawing = (shlex.split(line.removeprefix("python latent_colour.py ")) for line in commands.splitlines())
    for steps in (2, 3):  # the second time it resumes
        program([*training, f"run.total_steps={steps}"])
    assert [row["step"] for row in progress(run)] == ["1", "2", "3"]
    assert all(np.isfinite(float(row["colour"])) for row in progress(run))
    saved = OmegaConf.load(run / "config.yaml").model.params.mt_tasks.colour
    assert saved == {"weights": "bridge", "loss_weight": 0.05, "colour_gain": 2.0}

    program([*drawing, *few])
    given = arrays(tmp_path / "out/samples_of_colour_16.npz")
    program([*drawing[: drawing.index("--given")], *few])
    unknown = arrays(tmp_path / "out/samples_16.npz")
    assert given["arr_0"].shape == (16, SIZE, SIZE, 3) and "colour" not in given
    assert unknown["colour"].shape == (16, 3) and (given["arr_0"] != unknown["arr_0"]).any()

    with pytest.raises(SystemExit) as stopped:
        program([*drawing[: drawing.index("--given")], "--given", "colour=red"])
    assert stopped.value.code == 2
    assert "error: --given colour=red: write RED/GREEN/BLUE" in capsys.readouterr().err
    del TASKS["colour"]
    with pytest.raises(UserError, match=r"mt_tasks\.colour\.task: unknown 'colour'"):
        latent_sample.main(["--model_path", str(run)])


def test_what_the_page_links_to_exists():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for name in re.findall(r"`(\w+/\w+\.py)`", PAGE):
        assert (ROOT / name).exists() or (ROOT / "guided_mt" / name).exists(), name


def test_the_sampler_of_the_page_on_sampling():
    """As printed: it is known by its name, and calls the network once per timestep."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sampling.md").read_text(), re.DOTALL)
    before = dict(SAMPLERS)
    try:
        exec(compile(code, "docs/sampling.md", "exec"), {})
        process = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="solver20")
        calls: list[int] = []
        model = lambda z, t: (calls.append(int(t[0])), 0.1 * z)[1]  # noqa: E731
        drawn = sampling.sample(model, process, {}, (1, 3, 4, 4), sampler="midpoint", seeds=[0]).x_start
    finally:
        SAMPLERS.clear()
        SAMPLERS.update(before)
    assert calls == sorted(calls, reverse=True) and len(calls) == 20 and torch.isfinite(drawn).all()
