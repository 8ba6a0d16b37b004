"""docs/architecture.md is true: its map is the tree, its files do what it says of them, and its commands run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import check_backbone
from gaussian import JointGaussian, frechet
from small_inception import pixels, use_small_backend
from tiny import MODEL, PROCESS, ROOT, TRAINING, column, progress, step_folder, words
from tiny_latent import MAPS, write_config, write_labelled_pairs

from evaluations.scores.comparison import METRICS
from guided_mt.commands import sample as sample_command
from guided_mt.commands import train
from guided_mt.data import SOURCES, open_source
from guided_mt.diffusion.aggregation import WEIGHTS, Aggregation
from guided_mt.diffusion.process import GaussianDiffusion
from guided_mt.diffusion.respacing import create_gaussian_diffusion, kept_timesteps
from guided_mt.diffusion.sampling import SAMPLERS, sample
from guided_mt.diffusion.targets import TARGETS
from guided_mt.diffusion.weighting import TIMESTEP_WEIGHTS
from guided_mt.errors import UserError
from guided_mt.modalities import ImageModality
from guided_mt.networks.model import VARIANTS
from guided_mt.runs.backbones import BACKBONES
from latent_mt.commands import latent_sample
from latent_mt.data import ImageData

DOCS = ROOT / "docs"
PAGE = (DOCS / "architecture.md").read_text()
PAGES = [PAGE, (DOCS / "sampling.md").read_text(), (DOCS / "new_modality.md").read_text()]
REGISTRIES = (SAMPLERS, WEIGHTS, TARGETS, TIMESTEP_WEIGHTS, BACKBONES, METRICS, SOURCES)
SHAPE = (3, 2, 2)
SMALL = {**MODEL, **PROCESS, **TRAINING, "num_head_channels": -1}


def block(name: str, language: str) -> str:
    """The block that follows the sentence that names a file to be saved, of whichever page shows it."""
    for page in PAGES:
        found = re.search(rf"[Ss]ave (?:this|it) as `{name}`:\n\n```python\n(.*?)^```(.*)", page, re.S | re.M)
        if found:
            return found[1] if language == "python" else re.search(r"^```sh\n(.*?)^```", found[2], re.S | re.M)[1]
    raise AssertionError(f"no page shows {name}")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(name)(argv): a file of the pages, run as a user would. What it adds to the registries goes away afterwards."""
    before = [dict(registry) for registry in REGISTRIES]

    def saved(name: str) -> Callable[[list[str]], None]:
        file = tmp_path / name
        file.write_text(block(name, "python"))

        def run(argv: list[str]) -> None:
            monkeypatch.setattr(sys, "argv", [str(file), *argv])
            runpy.run_path(str(file), run_name="__main__")

        return run

    yield saved
    for registry, rows in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(rows)


def load(name: str) -> None:
    """Only add the row of a file, which the fixture `program` takes away again."""
    exec(compile(block(name, "python"), name, "exec"), {"__name__": "read"})


def run_commands(program: Callable, name: str, folder: Path, **changed: object) -> tuple[Path, dict[str, np.ndarray]]:
    """The commands printed below a file, as they stand but tiny; training once more, so that it resumes. -> (run, drawn)."""
    run, out = folder / "run", folder / "drawn.npz"
    start = program(name)
    for line in block(name, "sh").splitlines():
        assert line.startswith(f"python {name} ")
        command, *argv = shlex.split(line)[2:]
        argv = [re.sub(r"^(runs/.*|RUN)$", str(run), word) for word in argv]
        if command == "train":
            for steps in (2, 3):
                small = {**SMALL, "num_channels": 32, "ema_rate": "0.5", "total_steps": steps, **changed}
                start([command, *argv, *words(**small)])
            assert [row["step"] for row in progress(run)] == ["1", "2", "3"] and step_folder(run, 2).exists()
            assert np.isfinite(column(run, "loss")).all()
        else:
            start([command, *argv, *words(num_samples=3, steps=4, device="cpu", out=out)])
    with np.load(out) as file:
        drawn = {key: file[key] for key in file.files}
    assert drawn["arr_0"].shape == (3, 8, 8, 3)
    return run, drawn


# ---------------------------------------------------------------- the map and the counts


def test_the_map_is_the_tree_and_its_order_the_contract():
    listed = {
        package: re.findall(r"^\| `([\w.]+)` \|", part, re.MULTILINE)
        for package, part in re.findall(r"\| folder of `(\w+)`(.*?)\n\n", PAGE, re.DOTALL)
    }
    for package, folders in listed.items():
        there = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert {name for name in folders if not name.endswith(".py")} == there, package
    drawn = runpy.run_path(str(DOCS / "figures" / "rooms.py"))
    for package, name in {"guided_mt": "GUIDED", "latent_mt": "LATENT", "evaluations": "SCORES"}.items():
        folders = {name for name in listed[package] if not name.endswith(".py")}
        assert {folder for row in drawn[name] for folder in row} == folders, package
    contract = (ROOT / "pyproject.toml").read_text().partition('id = "layers"')[2]
    layers = re.search(r"^layers = \[(.*)\]$", contract, re.MULTILINE)[1].split(", ")
    bottom_up = [name for layer in reversed(layers) for name in layer.strip('"').split(" | ")]
    assert [name.removesuffix(".py") for name in listed["guided_mt"]] == bottom_up


def test_what_the_page_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (DOCS / target).exists(), target
    for name in re.findall(r"`(\w+(?:/\w+)+\.py)`", PAGE):
        assert any((ROOT / folder / name).exists() for folder in ("", "guided_mt")), name


def test_every_file_has_as_many_lines_as_the_page_says():
    claimed = re.findall(r"`(\w+\.py)`, (\d+) lines", PAGE)
    shown = re.findall(r"[Ss]ave (?:this|it) as `(\w+\.py)`:", "".join(PAGES))
    assert sorted(name for name, _ in claimed) == sorted(shown)
    for name, lines in claimed:
        code = block(name, "python").splitlines()
        assert int(lines) == sum(bool(line.strip()) for line in code), name
        assert all(len(line) <= 120 for line in code), name


# ---------------------------------------------------------------- the rows


def full_process(weights: str) -> GaussianDiffusion:
    return create_gaussian_diffusion(noise_schedule="cosine", sigma_small=True, mt_weights={"x": weights})


def oracle_error(sampler: str, weights: str, count: int = 4000) -> tuple[float, float]:
    """(error of the law of z_0 with x unknown, by the best network; that of as many exact draws): Frechet distances."""
    data, full = JointGaussian.make(int(np.prod(SHAPE)), seed=1), full_process(weights)
    drawn = sample(
        data.network_u(full),
        full.respace(kept_timesteps(full, "solver200")),
        {"x": ImageModality("x")},
        (count, *SHAPE),
        sampler=sampler,
        seeds=range(count),
        clip_denoised=False,
    ).x_start.flatten(1)
    exact = np.random.default_rng(7).normal(size=drawn.shape) @ np.linalg.cholesky(data.cov_z).T
    ours, theirs = (frechet(x.T @ x / count, data.cov_z) for x in (drawn.double().numpy(), exact))
    return ours, theirs


def test_the_sampler_is_exact_on_the_gaussian_oracle(program, tmp_path):
    load("midpoint.py")
    error, floor = oracle_error("midpoint", "bridge")
    assert error < 0.004 + 2 * floor
    run = tmp_path / "run"
    train.main(words(**SMALL, mt_task="masked", mt_variant="U", log_dir=run, total_steps=1))
    run_commands(program, "midpoint.py", tmp_path)


def test_the_schedule_has_its_coefficients_and_is_exact_on_the_oracle(program, tmp_path):
    load("narrow_bridge.py")
    full = full_process("narrow-bridge")
    abar = full.alphas_cumprod
    coefficients = Aggregation.from_weights({"x": "narrow-bridge"}, full.betas).coefficients["x"]
    np.testing.assert_allclose(coefficients, 4 * abar * (1 - abar), rtol=1e-9, atol=1e-15)
    error, floor = oracle_error("dpm++", "narrow-bridge")
    assert error < 0.004 + 2 * floor
    run, drawn = run_commands(program, "narrow_bridge.py", tmp_path)
    assert "mt_weights: narrow-bridge" in (run / "config.yaml").read_text() and "masked" in drawn


def test_the_target_gives_z_0_back_exactly_and_trains(program, tmp_path):
    load("edm.py")
    full = create_gaussian_diffusion(steps=50, noise_schedule="cosine", prediction="edm")
    row, t = TARGETS["edm"], torch.arange(50)
    x_start, noise = torch.randn(2, 50, *SHAPE, dtype=torch.float64)
    y_t = full.q_sample(x_start, t, noise)
    wanted = row.wanted(full, x_start, noise, y_t, t)
    torch.testing.assert_close(full.predict_xstart(wanted, y_t, t), x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(full.predict_eps(wanted, y_t, t), noise, rtol=1e-6, atol=1e-6)
    snr = full.alphas_cumprod / (1 - full.alphas_cumprod)
    np.testing.assert_allclose(row.eps_error(snr), snr * full.xstart_coefficients()[1] ** 2, rtol=1e-9)
    terms = full.training_losses(lambda x, t: wanted, x_start, t, noise=noise)
    assert float(terms["loss"].abs().max()) == 0

    run, _ = run_commands(program, "edm.py", tmp_path, timestep_weights="p2")
    for name in TARGETS:
        assert (name == "edm") == (f"\nprediction: {name}\n" in (run / "config.yaml").read_text())


def test_the_timestep_weighting_is_in_the_loss(program, tmp_path):
    load("soft_min_snr.py")
    t, (x_start, noise) = torch.arange(20), torch.randn(2, 20, *SHAPE, dtype=torch.float64)
    for prediction in ("eps", "x0"):
        full = create_gaussian_diffusion(
            steps=20, noise_schedule="cosine", prediction=prediction, timestep_weights="soft-min-snr"
        )
        terms = full.training_losses(lambda z, t: 0.3 * z, x_start, t, noise=noise)
        snr = full.alphas_cumprod / (1 - full.alphas_cumprod)
        factor = (1 if prediction == "eps" else snr) * 5 / (snr + 5)
        np.testing.assert_allclose(terms["loss"] / terms["mse"], factor, rtol=1e-9)
    run, _ = run_commands(program, "soft_min_snr.py", tmp_path, learn_sigma=False)
    plain = tmp_path / "plain"
    same = {**SMALL, "learn_sigma": False, "ema_rate": "0.5"}
    train.main(["--preset", "masked-digits", *words(**same, log_dir=plain, total_steps=1)])
    assert column(run, "mse")[0] == pytest.approx(column(plain, "mse")[0], rel=1e-6)
    assert column(run, "loss")[0] != pytest.approx(column(plain, "loss")[0], rel=1e-3)


def test_the_backbone_trains_with_heads_and_draws(program, tmp_path):
    run, drawn = run_commands(program, "uvit.py", tmp_path)
    assert all(np.isfinite(column(run, name)).all() for name in ("masked", "label"))
    assert (drawn["arr_1"] == 3).all() and "masked" in drawn
    start, lines = program("uvit.py"), {"log_dir": tmp_path / "u", "mt_task": "masked,label", "mt_variant": "U"}
    start(["train", *words(**SMALL, **lines, mt_backbone="uvit", class_cond=False, total_steps=2)])
    start(["sample", *words(model_path=tmp_path / "u", num_samples=2, steps=3, device="cpu", out=tmp_path / "u.npz")])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backbone_sees_what_it_is_given(variant, program):
    load("uvit.py")
    check_backbone("uvit", variant)


def write_idx(folder: Path) -> tuple[Path, np.ndarray]:
    """30 images of 8x8 as MNIST's files have them, and their pixels."""
    images, digits = pixels(30, 0)[..., 0], np.arange(30, dtype=np.uint8) % 10
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(np.array([2051, 30, 8, 8], ">i4").tobytes() + images.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(np.array([2049, 30], ">i4").tobytes() + digits.tobytes())
    return file, images


def test_the_data_source_is_read_and_trained_on(program, tmp_path):
    load("idx.py")
    file, images = write_idx(tmp_path)
    source = open_source(file)
    assert len(source) == 30 and source.class_names == [str(digit) for digit in range(10)]
    np.testing.assert_array_equal(source.read(4), np.repeat(images[4][..., None], 3, axis=2))
    backwards = open_source(file, class_names=[str(digit) for digit in reversed(range(10))])
    np.testing.assert_array_equal(backwards.labels, 9 - np.arange(30) % 10)
    with pytest.raises(UserError, match="class '9' is not one of the 9 saved classes"):
        open_source(file, class_names=[str(digit) for digit in range(9)])
    assert open_source("builtin:digits").path == "builtin:digits"
    run, drawn = run_commands(program, "idx.py", tmp_path, data_dir=file)
    assert np.isfinite(column(run, "label")).all() and (drawn["arr_1"] == 3).all()


def test_the_metric_is_in_the_evaluators_output(program, tmp_path, monkeypatch, capsys):
    use_small_backend(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    np.savez("reference.npz", arr_0=pixels(60, 0))
    np.savez("samples.npz", arr_0=pixels(40, 1, brightness=10))
    start = program("coverage.py")
    (line,) = block("coverage.py", "sh").splitlines()
    assert line.startswith("python coverage.py ")
    start(shlex.split(line)[2:])
    found = json.loads(Path("scores.json").read_text())
    assert {"fid", "density", "coverage"} <= set(found["scores"]) and found["protocol"]["k"] == 3
    printed = capsys.readouterr().out
    assert "Density: " in printed and "Coverage: " in printed and "k 3" in printed
    assert 0 <= found["scores"]["coverage"] <= 1
    start(["reference.npz", "samples.npz"])
    assert "Recall: " in (printed := capsys.readouterr().out) and "Coverage" not in printed
    start(["reference.npz", "reference.npz", "--metrics", "coverage", "--json", "same.json"])
    assert json.loads(Path("same.json").read_text())["scores"]["coverage"] == 1
    with pytest.raises(SystemExit) as stopped:
        start(["reference.npz", "samples.npz", "--metrics", "coverage", "--k", "60"])
    assert stopped.value.code == 2 and "need at least 61 images" in capsys.readouterr().err


def test_the_rows_train_and_draw_latent_models(program, tmp_path, monkeypatch):
    for name in ("midpoint.py", "narrow_bridge.py", "edm.py"):
        (tmp_path / name).write_text(block(name, "python"))
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    start, run = program("latents.py"), tmp_path / "run"
    pairs = write_labelled_pairs(tmp_path / "pairs")
    config = write_config(tmp_path / "tiny.yaml", pairs, run, **MAPS)
    training, sampling = block("latents.py", "sh").splitlines()
    assert training.startswith("python latents.py train ") and sampling.startswith("python latents.py sample ")
    for steps in (2, 4):  # the second time it resumes
        argv = [str(config) if word.endswith(".yaml") else word for word in shlex.split(training)[2:]]
        start([*argv, "data.params.sides=[photo,map]", f"run.total_steps={steps}"])
    assert [row["step"] for row in progress(run)] == ["1", "2", "3", "4"] and np.isfinite(column(run, "loss")).all()
    trained = (run / "config.yaml").read_text()
    assert "mt_weights: narrow-bridge" in trained and "parameterization: edm" in trained
    argv = [str(run) if word == "runs/camvid_mt" else word for word in shlex.split(sampling)[2:]]
    start([*argv, *words(steps=4, device="cpu")])
    assert len(list((run / "samples" / "map_of_photo").glob("*.png"))) == 3
    for name in ("midpoint", "narrow_bridge", "edm"):
        monkeypatch.delitem(sys.modules, name)

    del TARGETS["edm"]
    with pytest.raises(UserError, match="parameterization 'edm' is none of"):
        latent_sample.main(words(model_path=run, given="photo", device="cpu"))


def test_a_row_of_sources_is_read_for_latent_models(program, tmp_path):
    load("idx.py")
    file, _ = write_idx(tmp_path)
    source = ImageData(path=str(file), image_size=8, batch_size=2).pixel_source("train")
    assert len(source) == 30 and len(source.class_names) == 10


def test_help_lists_the_row(program, capsys):
    for name, flag, row in [("narrow_bridge.py", "mt_weights", "narrow-bridge"), ("uvit.py", "mt_backbone", "uvit")]:
        with pytest.raises(SystemExit):
            program(name)(["train", "--help"])
        (text,) = re.findall(
            rf"\n  --{flag}(?:(?: TEXT)?, --\w+)* TEXT\s(.*?)\(default", capsys.readouterr().out, re.DOTALL
        )
        assert re.search(rf"[ (]{row}\)", " ".join(text.split()))


# ---------------------------------------------------------------- a script that doesn't know the row


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("narrow_bridge.py", {"mt_task": "masked", "mt_variant": "U", "mt_weights": "narrow-bridge"}),
        ("edm.py", {"prediction": "edm"}),
        ("soft_min_snr.py", {"timestep_weights": "soft-min-snr"}),
        ("uvit.py", {"mt_backbone": "uvit"}),
    ],
)
def test_the_original_scripts_say_that_they_dont_know_it(name, flags, program, tmp_path):
    run, (flag, row) = tmp_path / "run", list(flags.items())[-1]
    before = [dict(registry) for registry in REGISTRIES]
    program(name)(["train", *words(**SMALL, **flags, log_dir=run, total_steps=1)])
    for registry, rows in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(rows)
    with pytest.raises(UserError, match=rf"config.yaml: was trained with --{flag} {row}.*docs/architecture.md"):
        sample_command.main(words(model_path=run, num_samples=1, device="cpu"))
