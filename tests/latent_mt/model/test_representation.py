"""The representation by a frozen CLIP in a latent model: of images and of stored latents, beside a condition of LDM's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny import assert_same, contents, progress
from tiny_clip import ARCH, SIZE, write_clip
from tiny_latent import LATENT, UNET, train, write_config, write_images
from tiny_latent import SIZE as PIXELS

from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError
from guided_mt.networks.image_encoder import ImageEncoder
from latent_mt.commands import encode_latents, latent_sample
from latent_mt.data import LatentCache
from latent_mt.runs.targets import instantiate

CONDITION = {
    "conditioning_key": "crossattn",
    "cond_stage_key": "class_label",
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": SIZE, "n_classes": 3, "key": "class_label"},
    },
    "unet_config": {
        "target": "latent_mt.model.unet.UNetModel",
        "params": {**UNET, "use_spatial_transformer": True, "context_dim": SIZE},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("representation")
    write_images(folder / "images")
    write_clip(folder)
    torch.manual_seed(0)
    write(folder / "first.yaml", folder)
    return folder


def task(folder: Path, **values: Any) -> dict[str, Any]:
    entry = {
        "representation_source": "clip-image",
        "clip_arch": ARCH,
        "clip_weights": str(folder / "clip_3.pt"),
        "representation_token": "vector",
        "weights": "bridge",
    }
    return {"representation": {**entry, **values}}


def write(file: Path, folder: Path, run: Path | None = None, entry: dict | None = None, **params: Any) -> Path:
    values = {"mt_sides": [], "mt_swap_prob": 0.0, "mt_variant": "U", **CONDITION, **params}
    values["mt_tasks"] = task(folder, **(entry or {}))
    return write_config(file, folder / "images", run or file.with_suffix(""), **values)


@pytest.fixture(scope="module")
def run(folder) -> Path:
    train(write(folder / "run.yaml", folder))
    return folder / "run"


def step(run: Path, number: int = 4) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def test_it_trains_beside_a_condition_and_logs_the_cosine(run):
    rows = progress(run)
    assert len(rows) == 4 and all(-1 <= float(row["cos_representation"]) <= 1 for row in rows)
    assert {f"cos_representation_q{q}" for q in range(4)} <= rows[0].keys()
    saved = OmegaConf.load(step(run) / "config.yaml").model.params.mt_tasks.representation
    assert saved.representation_size == SIZE and saved.clip_arch.startswith("{")
    state = contents(step(run))["model.safetensors"]
    assert not any("visual" in key or "null_token" in key for key in state)
    assert bytes(state["model.diffusion_model.units.representation.encoder"].tolist()).hex()


def test_a_resumed_run_is_the_uninterrupted_one(run, folder, tmp_path):
    file = write(tmp_path / "run.yaml", folder, tmp_path / "run")
    train(file, "run.total_steps=2")
    train(file)
    both = [contents(step(each)) for each in (run, tmp_path / "run")]
    assert_same(*({name: x for name, x in one.items() if name != "config.yaml"} for one in both))


def test_training_reads_what_encode_stored(folder, tmp_path, capsys):
    """The same vectors and the same run, but for the last digits of the latents."""
    file = write(tmp_path / "run.yaml", folder, tmp_path / "run", mt_variant="any")
    config = OmegaConf.load(file)
    first = instantiate(OmegaConf.to_container(config.model.params.first_stage_config), "m")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    config.model.params.first_stage_config.params["ckpt_path"] = str(tmp_path / "first.ckpt")
    file.write_text(OmegaConf.to_yaml(config))
    words = ["--config", str(file), "--num_workers", "0", "--device", "cpu"]
    encode_latents.main([*words, "--out", str(tmp_path / "plain")])
    encode_latents.main([*words, "--out", str(tmp_path / "cache"), "--representation", "clip-image"])
    assert f"{SIZE} numbers of clip-image" in capsys.readouterr().out
    encoder = ImageEncoder(ARCH, str(folder / "clip_3.pt"))
    cache = LatentCache(tmp_path / "cache" / "train")
    images = from_uint8(load_images(open_source(str(folder / "images")), PIXELS).images)
    wanted = torch.stack([encoder(images), encoder(images.flip(-1))], dim=1).numpy()
    np.testing.assert_allclose(cache.encoded.read(np.arange(9)), wanted, atol=1e-5)
    assert LatentCache(tmp_path / "plain" / "train").encoded is None

    train(file)
    seen = progress(tmp_path / "run")
    train(file, f"data.params.latents={tmp_path / 'cache'}", f"run.log_dir={tmp_path / 'cached'}", "run.val_interval=4")
    for one, other in zip(seen, progress(tmp_path / "cached"), strict=True):
        for name in ("mse", "representation", "cos_representation"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=2e-3), name
    assert np.isfinite(float(progress(tmp_path / "cached")[-1]["val_cos_representation"]))

    with pytest.raises(
        UserError, match=r"stored latents without representations, .*encode --representation clip-image"
    ):
        train(file, f"data.params.latents={tmp_path / 'plain'}", f"run.log_dir={tmp_path / 'no'}")
    other = write_clip(tmp_path, seed=4)[1]
    with pytest.raises(
        UserError, match=r"its representations are of another encoder: weights clip_3.pt there, clip_4.pt"
    ):
        where = "model.params.mt_tasks.representation.clip_weights"
        train(file, f"data.params.latents={tmp_path / 'cache'}", f"run.log_dir={tmp_path / 'no'}", f"{where}={other}")
    (tmp_path / "same").mkdir()
    shutil.copy(other, tmp_path / "same" / "clip_3.pt")
    with pytest.raises(
        UserError, match=r"made with other weights of the same name as those of .*clip_weights; encode the"
    ):
        own = f"{where}={tmp_path / 'same' / 'clip_3.pt'}"
        train(file, f"data.params.latents={tmp_path / 'cache'}", f"run.log_dir={tmp_path / 'no'}", own)
    bare = write(tmp_path / "bare.yaml", folder, entry={"representation_source": "file"})
    with pytest.raises(UserError, match=r"--representation clip-image: no modality of model.params.mt_tasks has that"):
        encode_latents.main(["--config", str(bare), "--out", str(tmp_path / "x"), "--representation", "clip-image"])


# ---------------------------------------------------------------- from a checkpoint of LDM


@pytest.mark.parametrize("variant", ["U", "any"])
def test_fine_tuning_begins_with_the_loaded_models_output(folder, tmp_path, variant):
    """Nothing is learned yet, and the output is that of LDM's model to the bit, with text and without the modality."""
    plain = instantiate(_model(folder, tmp_path, mt_tasks=None), "m")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "ldm.ckpt")
    tuned = instantiate(
        _model(folder, tmp_path, mt_tasks=task(folder), mt_variant=variant, ckpt_path=str(tmp_path / "ldm.ckpt")), "m"
    )
    z, t = torch.randn(3, 4, LATENT, LATENT), torch.tensor([0, 20, 39])
    c = plain.cond_stage_model({"class_label": torch.tensor([0, 1, 2])})
    x = {"representation": torch.randn(3, SIZE)}
    with torch.no_grad():
        wanted = plain.eval().model(z, t, {}, c_crossattn=c).output
        tuned.eval()
        assert torch.equal(tuned.model(z, t, {}, c_crossattn=c).output, wanted)
        if variant == "any":
            given = {"representation": torch.tensor([False, True, False])}
            found = tuned.model(z, t, x, given=given, c_crossattn=c).output
            torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=0)
            assert (found[1] - wanted[1]).abs().max() > 1e-4
        encoded = tuned.network.encode_modality("representation", x["representation"])
        assert (
            encoded[0] - encoded[1]
        ).abs().max() > 1e-3  # the loaded network tells vectors apart from the first step on


def _model(folder: Path, tmp_path: Path, **params: Any) -> dict[str, Any]:
    file = write(tmp_path / "m.yaml", folder)
    config: Any = OmegaConf.to_container(OmegaConf.load(file))["model"]
    return {"target": config["target"], "params": {**config["params"], **params}}


def test_images_and_representations_of_a_condition(run, folder, tmp_path):
    words = ["--model_path", str(run), "--steps", "2", "--device", "cpu", "--sampler", "ddim", "--num_samples", "3"]
    latent_sample.main([*words, "--out", str(tmp_path / "a"), "--class_id", "1"])
    found = dict(np.load(tmp_path / "a" / "samples_3.npz"))
    assert found["arr_0"].shape == (3, PIXELS, PIXELS, 3) and found["representation"].shape == (3, SIZE)


def test_image_variation_of_a_photo_and_of_its_vector(run, folder, tmp_path):
    photo = next((folder / "images").rglob("*.png"))
    words = ["--model_path", str(run), "--steps", "3", "--device", "cpu", "--sampler", "ddim", "--num_samples", "2"]
    pixels = from_uint8(load_images(open_source(str(photo.parent)), PIXELS, limit=1).images)
    vector = ImageEncoder(ARCH, str(folder / "clip_3.pt"))(pixels).numpy()
    np.savez(tmp_path / "vector.npz", representation=vector)

    def draw(name: str, *more: str) -> np.ndarray:
        latent_sample.main([*words, "--class_id", "1", "--out", str(tmp_path / name), *more])
        (file,) = (tmp_path / name).glob("samples*.npz")
        with np.load(file) as found:
            return found["arr_0"].astype(int)

    free = draw("free")
    given = draw("photo", "--given", f"representation={sorted(photo.parent.iterdir())[0]}")
    assert np.abs(free - given).max() > 0
    np.testing.assert_allclose(draw("vector", "--given", f"representation={tmp_path / 'vector.npz'}"), given, atol=1)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--given representation=.*broken.jpg: can't be read"):
        draw("x", "--given", f"representation={tmp_path / 'broken.jpg'}")
    np.savez(tmp_path / "wide.npz", representation=np.zeros((1, 5), np.float32))
    with pytest.raises(UserError, match=r"wide.npz: has vectors of 5 numbers, this model takes 24"):
        draw("x", "--given", f"representation={tmp_path / 'wide.npz'}")


def test_the_datas_representations_are_given_by_name(run, tmp_path, monkeypatch):
    """Variations of the data's own images, each under the model's condition."""
    seen = []
    true = latent_sample.conditions_of
    monkeypatch.setattr(latent_sample, "conditions_of", lambda *args: seen.append(args[4]) or true(*args))
    words = [
        "--model_path",
        str(run),
        "--given",
        "representation",
        "--num_samples",
        "2",
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    latent_sample.main([*words, "--out", str(tmp_path / "o"), "--sampler", "ddim"])
    with np.load(tmp_path / "o" / "image_of_representation.npz") as found:
        assert found["arr_0"].shape == (2, PIXELS, PIXELS, 3)
    assert [seeds[:2] for seeds in seen] == [[0, 1]]  # filled up to a whole batch
