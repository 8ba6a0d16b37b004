"""reproduce/table4.py: one tiny table from end to end, runs that exist already, its numbers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_latent import FIRST_STAGE, LATENT, MAPS, SIZE, UNET, write_labelled_pairs, write_pairs, write_run

from evaluations.tables.seeds import Measured
from guided_mt.data.images import save_npz
from guided_mt.errors import UserError
from latent_mt.runs.targets import instantiate
from reproduce import table4, table4_stages
from reproduce import table4_scores as scores


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    return write_labelled_pairs(tmp_path_factory.mktemp("streets"))


@pytest.fixture(scope="module")
def webcams(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("webcams"), val=2)


def small(pairs: Path, **values) -> list[str]:
    """key=value words that make the preset camvid as small as the other tests' models."""
    stage = {f"first_stage_config.params.ddconfig.{key}": x for key, x in FIRST_STAGE["params"]["ddconfig"].items()}
    unet = {f"unet_config.params.{key}": value for key, value in UNET.items()}
    model = {"timesteps": 40, "linear_start": 0.01, "linear_end": 0.3, "image_size": LATENT, **stage, **unet}
    settings = {f"model.params.{key}": value for key, value in model.items()}
    settings |= {"data.params.path": pairs, "data.params.image_size": SIZE, "data.params.batch_size": 2}
    settings |= {"data.params.val_split": "val", "data.params.num_workers": 0, "run.total_steps": 2}
    settings |= {"run.val_interval": 0, "lightning.trainer.precision": 32, "lightning.trainer.accelerator": "cpu"}
    return [f"{key}={str(value).replace(' ', '')}" for key, value in {**settings, **values}.items()]


def forbid(monkeypatch, *commands: str) -> None:
    def main(argv):
        raise AssertionError(argv)

    for name in commands:
        monkeypatch.setattr(getattr(table4_stages, name), "main", main)


def read(run: Path) -> dict:
    return json.loads((run / "table4.json").read_text())


def by_row(content: dict) -> dict[str, dict]:
    return {row["row"]: row for row in content["rows"]}


def test_end_to_end(streets, tmp_path, monkeypatch, capsys):
    run, autoencoder = tmp_path / "run", tmp_path / "ae.safetensors"
    save_file(instantiate(FIRST_STAGE, "m").state_dict(), str(autoencoder))
    argv = ["--preset", "camvid", "--run", str(run), "--seeds", "0", "--autoencoder", str(autoencoder)]
    argv += ["--latents", str(tmp_path / "latents"), "--sample_steps", "2", "--batch_size", "8", *small(streets)]
    table4.main([*argv, "--dry_run"])
    printed = capsys.readouterr().out
    assert f"# {run}/camvid_mt-0: nothing yet of 2" in printed and printed.count("$ mt-diffusion latent-train") == 2
    assert not run.exists()

    table4.main(argv)
    assert (tmp_path / "latents/val/latents.bin").exists()
    for kind in ("single", "mt"):
        assert (run / f"camvid_{kind}-0/checkpoints/step_00000002/model.safetensors").exists()
    made = run / "camvid_mt-0/table4"
    assert len(list((made / "made/map_of_photo_read").glob("*.png"))) == 3
    with Image.open(made / "other_way/photo_of_map.png") as grid:
        assert grid.size[0] > 3 * SIZE

    content = read(run)
    assert (content["images"], content["training_steps"], content["images_per_step"]) == (3, 2, 2)
    assert content["seeds"] == [0] and content["sampling"] == {"sampler": "dpm++", "steps": 2, "eta": 0.0}
    rows = by_row(content)
    assert list(rows) == ["single-task, generated", "MT, generated", "MT, read off its head", "first stage alone"]
    found = scores.score_maps(made / "made/map_of_photo", made / "made/map_truth", made / "made/classes.txt")
    assert {key: rows["MT, generated"][key]["mean"] for key in found} == found
    assert rows["MT, generated"]["seeds"] == [{"seed": 0, **found}]

    lines = (run / "table4.md").read_text().splitlines()
    assert lines[2] == "| CycleGAN (quoted, Cityscapes) | 0.58 | 0.22 | 0.16 |"
    assert lines[4] == "| InternImage-H (quoted, Cityscapes) | - | - | 0.86 |"
    assert lines[6] == "| MT-Diffusion paper (quoted, Cityscapes) | 0.95 | 0.85 | 0.70 |"
    alone = [f"{rows['single-task, generated'][key]['mean']:.3f}" for key in scores.MAP_KEYS]
    assert lines[7] == f"| single-task, generated | {' | '.join(alone)} |"
    text = (run / "table4.md").read_text()
    assert "3 images of 16 pixels; 2 training steps of 2 pairs each; seeds 0" in text and "--sample_steps 2" in text

    forbid(monkeypatch, "latent_train", "latent_sample", "encode_latents")
    table4.main(argv)  # again: nothing is left to do but the report
    assert read(run)["rows"] == content["rows"]
    with pytest.raises(AssertionError, match="'--steps', '3'"):
        table4.main([*argv, "--steps", "3"])
    with pytest.raises(UserError, match=r"mt_weights \(bridge there, paper here\)"):
        table4.main([*argv, "model.params.mt_weights=paper"])
    with pytest.raises(UserError, match=r"unet_confg \(None there, 3 here\)"):
        table4.main([*argv, "model.params.unet_confg=3"])
    with pytest.raises(UserError, match=r"is at step 2, past run\.total_steps=1"):
        table4.main([*argv, "run.total_steps=1"])
    with pytest.raises(UserError, match="camvid_single-0: is not finished, and --no_train"):
        table4.main([*argv, "run.total_steps=3", "--no_train"])


def write_runs(run: Path, name: str, pairs: Path, seeds: int = 1, single: dict | None = None, **params) -> list[str]:
    """Finished runs of a preset; the words that name them."""
    for seed in range(seeds):
        write_run(run / f"{name}_mt-{seed}", pairs, seed=seed, **params)
        alone = {"mt_variant": "X", "mt_swap_prob": float(name == "camvid"), "mt_loss_weight": 0.0, **params}
        write_run(run / f"{name}_single-{seed}", pairs, seed=seed, **{**alone, **(single or {})})
    return ["--preset", name, "--run", str(run), "--seeds", ",".join(map(str, range(seeds))), "--sample_steps", "2"]


def test_runs_that_are_there_already(webcams, tmp_path, monkeypatch, capsys):
    """Days of nights, two seeds, trained elsewhere: whatever the preset says of their size, they are only sampled and scored."""
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    run = tmp_path / "run"
    argv = write_runs(run, "daynight", webcams, seeds=2)
    forbid(monkeypatch, "latent_train")
    table4.main(argv)
    content, text = read(run), (run / "table4.md").read_text()
    rows = by_row(content)
    assert content["not_run"] == ["fid", "inception_score"] and content["images"] == 2
    assert list(rows) == ["single-task, generated", "MT, generated", "MT, read off its head", "first stage alone"]
    psnr = rows["MT, generated"]["psnr"]
    assert psnr["min"] < psnr["mean"] < psnr["max"] and psnr["std"] > 0
    assert [seed["seed"] for seed in rows["MT, generated"]["seeds"]] == [0, 1]
    assert rows["first stage alone"]["psnr"].keys() == {"mean", "min", "max"}
    assert "| MT-Diffusion paper (quoted, night2day) | - | - | - | 37.93 | 3.94 |" in text
    assert "| MT-Diffusion paper, single-task (quoted, night2day) | - | - | - | 40.73 | 3.84 |" in text
    assert f"| MT, generated | {psnr['mean']:.2f} +- {psnr['std']:.2f} |" in text and "| not run | not run |" in text
    assert "not run: needs the Inception weights (--inception FILE)" in text
    assert (run / "daynight_mt-1/table4/other_way/night_of_day.png").exists()

    asked = []
    monkeypatch.setattr(scores.evaluator, "main", lambda words: asked.append(words) or write_scores(words))
    capsys.readouterr()
    table4.main([*argv, "--inception", "weights.pth"])
    assert len(asked) == 7 and all(words[-2:] == ["--inception", "weights.pth"] for words in asked)
    assert asked[0][0].endswith("day_truth.npz") and asked[0][1].endswith(
        "daynight_single-0/table4/made/day_of_night.npz"
    )
    assert "| MT, generated |" in capsys.readouterr().out and read(run)["not_run"] == []
    assert by_row(read(run))["MT, generated"]["fid"]["mean"] == 12.5


def write_scores(words: list[str]) -> None:
    file = Path(words[words.index("--json") + 1])
    file.write_text(json.dumps({"scores": {"fid": 12.5, "inception_score": 2.0}}))


def test_rows_at_unequal_budget_are_refused(streets, tmp_path):
    argv = write_runs(tmp_path, "camvid", streets, **MAPS)
    file = tmp_path / "camvid_single-0/checkpoints/step_00000004/config.yaml"
    config = OmegaConf.load(file)
    config.run.images_per_step = 8
    file.write_text(OmegaConf.to_yaml(config))
    with pytest.raises(UserError, match=r"run.images_per_step 4, but .*camvid_single-0 has 8: .* equal budget"):
        table4.main(argv)

    config.run.images_per_step = 4
    file.write_text(OmegaConf.to_yaml(config))
    weights = load_file(file.with_name("model.safetensors"))
    weights["first_stage_model.decoder.conv_out.bias"] += 1
    save_file(weights, file.with_name("model.safetensors"))
    with pytest.raises(UserError, match=r"camvid_mt-0: first stage \w+, but .*camvid_single-0 has \w+:"):
        table4.main(argv)


BAD = [
    (["--preset", "camvit"], r"--preset 'camvit' is none of camvid, .* .did you mean camvid"),
    ([], r"--preset '' is none of"),
    (["--preset", "camvid", "--sample_step", "3"], r"unknown flag --sample_step .did you mean sample_steps"),
    (["--preset", "camvid", "--given", "map"], r"unknown flag --given"),
    (["--preset", "camvid", "--seeds", "0,0"], r"--seeds 0,0: write different whole numbers"),
    (["--preset", "camvid", "--sampler", "dpm"], r"--sampler: 'dpm' is none of"),
    (["--preset", "camvid", "run.seed=3"], r"run.seed=3: is set by table4"),
    (["--preset", "camvid", "total_steps"], r"don't know what to do with 'total_steps'"),
    (
        ["--preset", "camvid", "lightning.trainer.devices=2"],
        r"trains in one process; train with several by latent-train",
    ),
    (
        ["--preset", "camvid", "data.params.path=x.tar"],
        r"runs/autoencoder_kl_camvid: no such first stage; make it by mt-diffusion autoencoder-train --config "
        r"autoencoder_kl_camvid data.params.path=x.tar",
    ),
    (
        ["--preset", "night2day"],
        r"no such first stage .it is latent-diffusion's kl-f8.; make it by .*autoencoder_kl_f8",
    ),
    (["--preset", "daynight", "--autoencoder", "nowhere"], r"nowhere: no such first stage"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[" ".join(row[0]) for row in BAD])
def test_bad_input(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        table4.main([*words, "--run", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="is one process"):
        table4.main(["--preset", "camvid"])


# ---------------------------------------------------------------- numbers


def test_scores_of_images(tmp_path):
    """An offset of 10 grey levels everywhere, and one of 20."""
    true = np.random.default_rng(0).integers(0, 200, (18, 16, 16, 3), dtype=np.uint8)
    off = np.where(np.arange(18) < 9, 10, 20).astype(np.uint8)
    save_npz(tmp_path / "a.npz", {"arr_0": true + off[:, None, None, None]})
    save_npz(tmp_path / "b.npz", {"arr_0": true})
    found = scores.score_images(tmp_path / "a.npz", tmp_path / "b.npz")
    assert found["mae"] == pytest.approx(15 / 127.5, rel=1e-5)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / np.array([100, 400])).mean(), rel=1e-5)
    assert 0.8 < found["ssim"] < 1


def test_layout():
    results = [Measured("ours", seed, {"class_iou": 0.5 + seed / 10}) for seed in (0, 1)]
    lines = scores.layout(scores.MAPS, results).splitlines()
    assert lines[0] == "|  | per-pixel accuracy | per-class accuracy | class IoU |"
    assert lines[-1] == "| ours | - | - | 0.550 +- 0.071 |" and len(lines) == 3 + len(scores.QUOTED)
    assert scores.summary(results, "ours")["class_iou"] == pytest.approx(
        {"mean": 0.55, "min": 0.5, "max": 0.6, "std": 0.0707}, rel=1e-3
    )
