"""Cached latents: what is written, what is read back, what is refused, and the command."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pairs import aligned_files, camvid_files, same, write
from torch import Tensor, nn

from guided_mt.data import ImageStream, load_images, open_source
from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError
from guided_mt.runs.processes.claim import Claim
from latent_mt.commands.encode_latents import main
from latent_mt.data import ImageData, LatentCache, PairData, open_pairs
from latent_mt.first_stage.first_stages import AutoencoderKL
from latent_mt.first_stage.latents import encode_items, first_stage_hash, write_cache

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


class Fake(nn.Module):
    """Two latent channels at half the size, not symmetric under mirroring; one moment where `plain`."""

    def __init__(self, plain: bool = False):
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 2, 2)
        self.plain = plain
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + k).view_as(parameter))

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = self.convolution(x)
        return mean, None if self.plain else mean.square() - 5


@pytest.fixture
def pairs(tmp_path: Path):
    return open_pairs(write("tar", camvid_files(), tmp_path))


# ---------------------------------------------------------------- what is in it


@pytest.mark.parametrize("plain", [False, True])
def test_moments_of_both_sides_and_mirrorings(plain, pairs, tmp_path):
    first_stage = Fake(plain)
    written = write_cache(pairs, first_stage, 8, tmp_path / "out" / "train", batch_size=3, num_workers=0)
    cache = LatentCache(tmp_path / "out" / "train")
    assert cache.meta == written.meta and len(cache) == 10 and cache.labels is None
    assert cache.sides == pairs.sides and cache.class_names == pairs.class_names and cache.direction == "AtoB"
    assert [cache.name(k) for k in range(10)] == [pairs.name(k) for k in range(10)]
    loaded = load_images(cache, 8)
    assert loaded.images.dtype == torch.float32 and loaded.images.shape == (10, *cache.item_shape(8))
    mean, logvar = cache.unpack(loaded.images)
    assert mean.shape == (10, 2, 2, 2, 4, 4) and (logvar is None) == plain
    images = from_uint8(load_images(pairs, 8).images)
    for side in range(2):
        for mirrored in range(2):
            x = images[:, 3 * side : 3 * side + 3]
            expected = first_stage.encode_moments(x.flip(-1) if mirrored else x)
            torch.testing.assert_close(mean[:, side, mirrored], expected[0])
            if not plain:
                torch.testing.assert_close(logvar[:, side, mirrored], expected[1])
    assert not (tmp_path / "out" / ".train.unfinished").exists()


def test_half_precision_and_batch_size(pairs, tmp_path):
    whole = load_images(write_cache(pairs, Fake(), 8, tmp_path / "a", num_workers=1), 8).images
    half = write_cache(pairs, Fake(), 8, tmp_path / "b", batch_size=1, precision="float16", num_workers=0)
    assert (tmp_path / "b" / "latents.bin").stat().st_size * 2 == (tmp_path / "a" / "latents.bin").stat().st_size
    found = load_images(half, 8).images
    assert found.dtype == torch.float32 and 0 < (found - whole).abs().max() < 1e-2


def test_classes_of_single_images_stay(tmp_path):
    source = open_source("builtin:digits-test")
    cache = write_cache(source, Fake(), 8, tmp_path / "val", batch_size=64, num_workers=0)
    assert np.array_equal(cache.labels, source.labels) and cache.class_names == source.class_names
    assert [side.name for side in cache.sides] == ["image"]
    assert cache.unpack(load_images(cache, 8).images).mean.shape == (360, 1, 2, 2, 4, 4)


def test_a_broken_image_is_left_out(tmp_path, caplog):
    files = aligned_files()
    files["train/p4.png"] = files["train/p4.png"][:80]
    source = open_pairs(write("folder", files, tmp_path))
    with caplog.at_level(logging.WARNING, "guided_mt"):
        cache = write_cache(source, Fake(), 8, tmp_path / "out", batch_size=4, num_workers=2)
    assert len(cache) == 9 and "train/p4.png" not in cache.names and "p4.png" in caplog.text
    (tmp_path / "set" / "train" / "p5.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 10 images are broken, over 1 %"):
        write_cache(source, Fake(), 8, tmp_path / "other", batch_size=4, num_workers=0)
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


def test_the_stream_of_a_cache(pairs, tmp_path):
    cache = write_cache(pairs, Fake(), 8, tmp_path / "train", num_workers=0)
    settings = {"seed": 1, "global_batch": 4, "total_steps": 6}
    whole = list(ImageStream(cache, 8, **settings))
    pixels = list(ImageStream(pairs, 8, **settings, num_workers=0))
    for latents, images in zip(whole, pixels, strict=True):  # the same items at the same steps as in pixels
        assert torch.equal(latents.indices, images.indices)
        expected = encode_items(Fake(), images.images, 2).flatten(1, 4)
        torch.testing.assert_close(latents.images, expected)
    assert same(whole[2:], list(ImageStream(pickle.loads(pickle.dumps(cache)), 8, start_step=2, **settings)))
    halves = [list(ImageStream(cache, 8, rank=r, world_size=2, **settings)) for r in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(one.images, torch.cat([first.images, second.images]))


# ---------------------------------------------------------------- who made it


def test_another_first_stage_is_refused(pairs, tmp_path):
    first_stage = Fake()
    cache = write_cache(pairs, first_stage, 8, tmp_path / "train", num_workers=0)
    cache.check(first_stage_hash(first_stage))
    cache.check(first_stage_hash(Fake().double()))  # the values count, not how they are stored
    with torch.no_grad():
        first_stage.convolution.bias[0] += 1e-3
    with pytest.raises(UserError, match="made by another first stage"):
        cache.check(first_stage_hash(first_stage))


def test_a_cache_that_is_there(pairs, tmp_path):
    folder = tmp_path / "train"
    write_cache(pairs, Fake(), 8, folder, num_workers=0)
    before = (folder / "latents.bin").stat().st_mtime_ns
    assert len(write_cache(pairs, Fake(), 8, folder, num_workers=0)) == 10
    assert (folder / "latents.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="a cache is there already, with another image_size and precision; remove it"):
        write_cache(pairs, Fake(), 16, folder, precision="float16", num_workers=0)
    with pytest.raises(UserError, match="precision 'bf16': must be one of float32, float16"):
        write_cache(pairs, Fake(), 8, folder, precision="bf16")


def test_damaged_caches(pairs, tmp_path):
    folder = tmp_path / "train"
    write_cache(pairs, Fake(), 8, folder, num_workers=0)

    def damaged(name: str, content: bytes | None, message: str) -> None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            LatentCache(copy)
        assert "\n" not in str(caught.value)

    meta = json.loads((folder / "meta.json").read_text())
    damaged("latents.bin", (folder / "latents.bin").read_bytes()[:-4], r"latents\.bin has \d+ bytes, not those of")
    damaged("latents.bin", None, "not a whole cache")
    damaged("meta.json", None, r"no cache of latents here \(meta\.json is missing\)")
    damaged("meta.json", b"{", r"meta\.json is damaged")
    damaged("meta.json", b"[]", "a cache of another format")
    damaged("meta.json", json.dumps(meta | {"format": 99}).encode(), "a cache of another format")
    damaged("meta.json", json.dumps({"format": 1}).encode(), "not a whole cache of latents")
    damaged("meta.json", json.dumps(meta | {"shape": "x"}).encode(), "not a whole cache of latents")
    damaged("meta.json", json.dumps(meta | {"precision": "object"}).encode(), "not a whole cache of latents")
    damaged("names.json", json.dumps(["a"]).encode(), "and 1 names")
    with pytest.raises(UserError, match="latents of 8 pixel images, not 16"):
        LatentCache(folder).item_shape(16)
    with pytest.raises(UserError, match="cached latents are of centre crops"):
        LatentCache(folder).decode(0, 8, np.zeros(3))


# ---------------------------------------------------------------- the data section and the command


def test_pair_data_reads_latents(pairs, tmp_path):
    write_cache(pairs, Fake(), 8, tmp_path / "out" / "train", num_workers=0)
    write_cache(open_pairs(pairs.path, split="val"), Fake(), 8, tmp_path / "out" / "val", num_workers=0)
    settings = {"path": pairs.path, "image_size": 8, "batch_size": 2, "latents": str(tmp_path / "out")}
    data = PairData(**settings, val_split="val").open()
    with data.stream(seed=0, total_steps=2) as stream:
        batch = next(iter(stream))
    assert data.source.unpack(batch.images).mean.shape == (2, 2, 2, 2, 4, 4)
    assert len(data.val_source) == 3 and data.pixel_source("val").decode(0, 8).shape == (6, 8, 8)
    assert len(PairData(**settings, limit=4).source) == 4
    for change, message in (
        ({"direction": "BtoA"}, "was encoded with direction AtoB, not BtoA"),
        ({"sides": ["a", "b"]}, "its sides are photo and map"),
        ({"image_size": 16}, "latents of 8 pixel images, not 16"),
        ({"split": "test"}, r"test: no cache of latents here .* mt-diffusion encode"),
    ):
        with pytest.raises(UserError, match=message):
            PairData(**(settings | change)).open()
    with pytest.raises(
        UserError, match=r"holds latents of pairs, not of single images; take latent_mt\.data\.PairData"
    ):
        ImageData(**settings).open()


def write_config(folder: Path, data: dict, first_stage: dict | None) -> Path:
    params = {} if first_stage is None else {"first_stage_config": first_stage}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}, "data": data}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "config.yaml"


def test_the_command_with_a_real_autoencoder(tmp_path, capsys):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(ddconfig=DDCONFIG, embed_dim=4)
    torch.save({"state_dict": autoencoder.state_dict()}, tmp_path / "kl.ckpt")
    path = write("tar", camvid_files(), tmp_path)
    data = {
        "target": "latent_mt.data.PairData",
        "params": {"path": str(path), "image_size": 16, "batch_size": 2, "num_workers": 0},
    }
    described = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": DDCONFIG, "embed_dim": 4}}
    config = write_config(tmp_path, data, described)
    command = ["--config", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(UserError, match=r"first_stage_config: has no weights; set its params\.ckpt_path, or name them"):
        main(command)
    command += ["--first_stage", str(tmp_path / "kl.ckpt"), "--splits", "train,val"]
    main([*command, "--dry_run"])
    assert not (tmp_path / "out").exists() and "# train: 10 items" in capsys.readouterr().out
    with (
        Claim(tmp_path / "out"),
        pytest.raises(UserError, match=rf"--out {tmp_path / 'out'}: this process is writing here"),
    ):
        main([*command, "data.params.limit=4"])
    main([*command, "data.params.limit=4"])
    assert "4 items, 2 side(s) of 4x8x8, 2 moment(s), plain and mirrored" in capsys.readouterr().out
    cache = LatentCache(tmp_path / "out" / "train")
    assert len(cache) == 4 and len(LatentCache(tmp_path / "out" / "val")) == 3
    cache.check(first_stage_hash(autoencoder))
    x = from_uint8(load_images(open_pairs(path, limit=4), 16).images)
    mean, logvar = cache.unpack(load_images(cache, 16).images)
    with torch.no_grad():
        expected = autoencoder.encode_moments(x[:, 3:].flip(-1))
    torch.testing.assert_close(mean[:, 1, 1], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar[:, 1, 1], expected[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="images of 15 x 15 pixels don't fit"):
        main([*command, "data.params.image_size=15", "data.params.limit=4"])


def test_messages_of_the_command(tmp_path):
    data = {
        "target": "latent_mt.data.ImageData",
        "params": {"path": "builtin:digits", "image_size": 8, "batch_size": 2},
    }
    config = write_config(tmp_path, data, None)
    command = ["--config", str(config), "--out", str(tmp_path / "out")]
    for words, message in (
        (["--precision", "float8"], r"--precision: invalid choice"),
        (["--batch_size", "few"], r"--batch_size: invalid int value"),
        (["--presicion", "float16"], r"unknown flag --presicion \(did you mean --precision\?\)"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--splits", "train,test"], r"split test: ImageData has train \(path\) and val"),
        (["--splits", "vall"], "split vall"),
        ([], r"model\.params\.first_stage_config: missing; write it there, or name a run"),
        (["--first_stage", str(tmp_path / "none")], "none: no such file or folder"),
        (["data.params.imagesize=8"], "unknown key 'imagesize'"),
    ):
        with pytest.raises(UserError, match=message):
            main([*command, *words])
    config.write_text(json.dumps({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {}}}))
    with pytest.raises(UserError, match="has no data section"):
        main(command)
