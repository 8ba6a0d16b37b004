"""The representation that a frozen CLIP makes of the images themselves, in pixel space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny import assert_same, contents, flags, progress, words
from tiny_clip import ARCH, SIZE, write_clip

from guided_mt.commands import sample, train
from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.generation.build import build_modalities, build_model, model_sections
from guided_mt.modalities import Images
from guided_mt.modalities.encoded import EncodedVector
from guided_mt.modalities.vector import read_vectors
from guided_mt.networks.image_encoder import ImageEncoder
from guided_mt.runs.config import parse
from guided_mt.training.units import measure_units

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[Path, Path]:
    return write_clip(tmp_path_factory.mktemp("clip"))


def settings(clip: tuple[Path, Path], **values):
    arch, weights = clip
    return {
        "mt_task": "representation",
        "representation_source": "clip-image",
        "clip_arch": arch,
        "clip_weights": weights,
        "ema_rate": "0.9",
        "mt_variant": "any",
        "num_channels": 32,
        "predict_xstart": True,
        **values,
    }


def built(clip, **values):
    """(modality with measured units, images, the encoder) of a model without a run."""
    from guided_mt.generation.build import bind, complete

    chosen = {k: v for k, v in settings(clip, image_size=8, **values).items() if k != "ema_rate"}
    config = parse(words(**chosen), model_sections(), description="")
    complete(config)
    model = build_model(config)
    modalities = build_modalities(config, model)
    bind(modalities, config, model)
    modality = modalities["representation"]
    assert isinstance(modality, EncodedVector) and modality.unmeasured
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    measure_units(modalities, [Images(images[:6]), Images(images[6:])])
    return modality, images, ImageEncoder(ARCH, str(clip[1]))


@pytest.mark.parametrize("normalised", [False, True])
def test_x_is_the_images_vector_in_units_of_the_first_images(clip, normalised):
    modality, images, encoder = built(clip, representation_normalised=normalised)
    vectors = F.normalize(encoder(images), dim=1) if normalised else encoder(images)
    x = modality.from_batch(Images(images), SampleStreams(torch.arange(12)))
    assert x.mean(0).abs().max() < 1e-4 and (x.var(0, unbiased=False).mean() - 1).abs() < 1e-3
    np.testing.assert_allclose(modality.arrays(x)["representation"], vectors.numpy(), atol=1e-5)
    scale = vectors.var(0, unbiased=False).mean().sqrt()
    assert torch.allclose(torch.cdist(x, x) * scale, torch.cdist(vectors, vectors), atol=1e-4)
    assert torch.allclose(modality.figure("cos", x, x), torch.ones(12))
    assert (modality.prior((3, 8, 8), SampleStreams(torch.arange(2))) == 0).all()


def test_a_mirrored_image_has_the_vector_of_the_mirrored_image(clip):
    modality, images, encoder = built(clip)
    streams = SampleStreams(torch.arange(12))
    plain, mirrored = (modality.from_batch(Images(x), streams) for x in (images, images.flip(-1)))
    assert (plain - mirrored).abs().max() > 1e-2
    stored = torch.stack([encoder(images), encoder(images.flip(-1))], dim=1)
    flip = torch.arange(12) % 2 == 0
    cached = Images(torch.zeros(12, 4, 4, 4), loaded={"representation": stored}, cached=True, mirrored=flip)
    torch.testing.assert_close(
        modality.from_batch(cached, streams), torch.where(flip[:, None], mirrored, plain), atol=1e-5, rtol=0
    )


@pytest.fixture(scope="module")
def run(clip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "run"
    train.main(flags(**settings(clip, log_dir=folder, total_steps=3, save_interval=3)))
    return folder


def step(run: Path, number: int = 3) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def test_a_checkpoint_holds_units_and_hash_and_nothing_of_clip(run, clip):
    for stem in ("model", "ema_0.9"):
        state = load_file(step(run) / f"{stem}.safetensors")
        assert {key for key in state if key.startswith("units.")} == {
            f"units.representation.{name}" for name in ("mean", "scale", "encoder")
        }
        assert not any("visual" in key or "transformer.resblocks" in key for key in state)
        assert bytes(state["units.representation.encoder"].tolist()) == ImageEncoder(ARCH, str(clip[1])).digest
    saved = (run / "config.yaml").read_text()
    assert "embed_dim" in saved and str(clip[1]) in saved and f"representation_size: {SIZE}" in saved


def test_the_log_has_the_cosine_by_quartile(run):
    rows = progress(run)
    names = ["cos_representation", *(f"cos_representation_q{q}" for q in range(4))]
    values = [float(row[name]) for row in rows for name in names if row[name] not in ("", "nan")]
    assert values and all(-1 <= value <= 1 for value in values)
    assert all(name in rows[0] for name in names)


def test_a_resumed_run_is_the_uninterrupted_one_and_reads_the_units(run, clip, tmp_path):
    again = settings(clip, log_dir=tmp_path / "run", save_interval=1)
    train.main(flags(**again, total_steps=1))
    train.main(flags(**again, total_steps=3))
    both = [contents(step(folder)) for folder in (run, tmp_path / "run")]
    assert_same(*({name: content for name, content in one.items() if name != "config.yaml"} for one in both))
    other = write_clip(tmp_path, seed=4)
    with pytest.raises(UserError, match=r"--clip_weights: this encoder's weights \(\w+\) are not those .*trained with"):
        train.main(flags(**{**again, "clip_weights": other[1]}, total_steps=4))


def test_an_image_gives_its_representation(run, clip, tmp_path):
    source = open_source("builtin:digits")
    pixels = load_images(source, 8, limit=1).images
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    encoder = ImageEncoder(ARCH, str(clip[1]))
    wanted = encoder(from_uint8(pixels))[0].numpy()

    def draw(given: str) -> dict[str, np.ndarray]:
        out = tmp_path / "out.npz"
        out.unlink(missing_ok=True)
        words_ = words(model_path=run, num_samples=2, steps=2, out=out, device="cpu", sampler="ddim")
        sample.main([*words_, *(["--given", given] if given else [])])
        with np.load(out) as file:
            return dict(file)

    found = draw(f"representation={tmp_path / 'photo.png'}")
    np.testing.assert_allclose(found["representation"], np.stack([wanted, wanted]), atol=1e-4)
    np.savez(tmp_path / "v.npz", representation=wanted[None])
    np.testing.assert_allclose(draw(f"representation={tmp_path / 'v.npz'}")["arr_0"], found["arr_0"], atol=1)
    assert draw("")["representation"].shape == (2, SIZE)
    with pytest.raises(UserError, match=r"--given representation=.*gone.png: no such file"):
        draw(f"representation={tmp_path / 'gone.png'}")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--given representation=.*broken.png: can't be read"):
        draw(f"representation={tmp_path / 'broken.png'}")


def test_options_that_say_nothing_with_a_source_are_named(clip, tmp_path, caplog):
    from guided_mt.generation.build import complete

    np.save(tmp_path / "v.npy", np.ones((3, 5), np.float32))
    for values, expected in (
        ({"representation_file": "x.npz"}, "--representation_file is not used: representation_source is clip-image"),
        (
            {"representation_source": "file", "representation_file": tmp_path / "v.npy", "clip_arch": ""},
            "--clip_weights is not used: representation_source is file",
        ),
    ):
        chosen = {k: v for k, v in settings(clip, image_size=8, **values).items() if k != "ema_rate"}
        complete(parse(words(**chosen), model_sections(), description=""))
        assert expected in caplog.text
    assert "clip_arch is not used" not in caplog.text


def test_numbers_that_float32_does_not_hold(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[1.0, 2.0], [1.0, 1e300]]))
    with pytest.raises(UserError, match=r"v\.npy: has values that are not finite, first in row 1"):
        read_vectors(str(tmp_path / "v.npy"), "v", 2, f"--given v={tmp_path / 'v.npy'}")


BAD = [
    ({"clip_arch": ""}, r"--clip_arch is missing: an architecture that open_clip knows"),
    ({"clip_weights": ""}, r"--clip_weights is missing: a file, .* or 'untrained'"),
    ({"clip_arch": "gone.json"}, r"--clip_arch gone.json: can't be read as JSON \(No such file"),
    ({"clip_arch": "ViT-H-41"}, r"'ViT-H-41' is none of open_clip's \(did you mean ViT-H-1"),
    ({"clip_weights": "gone.pt"}, r"CLIP weights gone.pt: no such file; name one, or weights that open_clip lists"),
    ({"clip_weights": "untraind"}, r"CLIP weights 'untraind' of a mapping are unknown"),
    (
        {"clip_arch": '{"embed_dim": "wide", "vision_cfg": {}, "text_cfg": {}}'},
        r"has a whole number as embed_dim and mappings as vision_cfg and text_cfg",
    ),
    ({"representation_size": 5}, r"--representation_size 5: this CLIP's vectors have 24 numbers"),
    (
        {"representation_token": "vector"},
        r"representation_token vector: the vectors have 24 numbers, the network's context 128",
    ),
    ({"representation_source": "clip-imge"}, r"'clip-imge' is none of file, clip-image \(did you mean clip-image"),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_input_is_one_line(clip, tmp_path, values, expected):
    with pytest.raises(UserError, match=expected) as caught:
        train.main(flags(**settings(clip, log_dir=tmp_path / "run", total_steps=1, **values)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_without_open_clip_it_says_what_to_install(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match=r"CLIP needs the package open_clip_torch .*text"):
        train.main(flags(**settings(clip, clip_arch="ViT-H-14", log_dir=tmp_path / "run", total_steps=1)))
