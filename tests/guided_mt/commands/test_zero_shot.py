"""`classify --texts`: the head's vector and the frozen CLIP's own, each by its nearest text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import flags, words
from tiny_clip import ARCH, SIZE, write_clip

from guided_mt.commands import classify, train
from guided_mt.data import load_images, open_source
from guided_mt.data.images import from_uint8
from guided_mt.errors import UserError
from guided_mt.networks.clip import build_clip
from guided_mt.networks.image_encoder import ImageEncoder, TextEncoder

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero_shot")
    arch, weights = write_clip(folder)
    clip = {"representation_source": "clip-image", "clip_arch": arch, "clip_weights": weights}
    for name, values in {"U": {}, "X": {"mt_variant": "X"}, "unlearned": {"mt_loss_weight": 0}}.items():
        settings = {"mt_task": "representation", "mt_variant": "U", **clip, **values, "total_steps": 1}
        train.main(flags(**settings, log_dir=folder / name))
    train.main(flags(log_dir=folder / "masked", total_steps=1))
    return folder


def classified(folder: Path, *more: str, run: str = "U", **values) -> dict[str, np.ndarray]:
    out = folder / "found.npz"
    out.unlink(missing_ok=True)
    settings = {"data_dir": "builtin:digits-test", "num_samples": 6, "draws": 1, "device": "cpu", "out": out, **values}
    classify.main([*words(model_path=folder / run, **settings), *more])
    with np.load(out) as file:
        return dict(file)


def test_the_encoders_answer_is_open_clips_and_the_heads_is_its_vectors(folder, capsys):
    found = classified(folder, texts="data", template="the digit {}")
    printed = capsys.readouterr().out
    clip = build_clip(ARCH, str(folder / "clip_3.pt"))
    tokens = open_clip.SimpleTokenizer()([f"the digit {name}" for name in CLASSES], 77)
    with torch.no_grad():
        texts, scale = clip.encode_text(tokens, normalize=True), clip.logit_scale.exp()
    source = open_source("builtin:digits-test")
    own = ImageEncoder(ARCH, str(folder / "clip_3.pt"))(from_uint8(load_images(source, 8).images))
    head = torch.from_numpy(found["representation"])
    assert head.shape == (6, SIZE) and found["classes"].tolist() == CLASSES
    wanted = (scale * F.normalize(head, dim=1) @ texts.T).softmax(1)
    np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-5)
    by_encoder = (scale * F.normalize(own, dim=1) @ texts.T).softmax(1)
    rows = [int((by_encoder - torch.from_numpy(row)).abs().sum(1).argmin()) for row in found["encoder_probabilities"]]
    np.testing.assert_allclose(found["encoder_probabilities"], by_encoder[rows], atol=1e-5)
    np.testing.assert_allclose(found["cosine"], F.cosine_similarity(head, own[rows]), atol=1e-5)
    assert "head and encoder: the same class for" in printed and "right: head" in printed


def test_texts_by_list_and_by_file(folder, tmp_path, capsys):
    by_list = classified(folder, texts="a ring;a bar", labelled=False)
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfa ring\r\n\r\na bar\r\n")
    by_file = classified(folder, texts=tmp_path / "texts.txt", labelled=False)
    assert by_list["classes"].tolist() == ["a ring", "a bar"] and by_list["probabilities"].shape == (6, 2)
    assert "right:" not in capsys.readouterr().out
    for key in ("probabilities", "encoder_probabilities", "representation"):
        np.testing.assert_array_equal(by_list[key], by_file[key])


def test_the_same_texts_have_the_same_vectors():
    one, two = TextEncoder(ARCH, "untrained"), TextEncoder(ARCH, "untrained")
    vectors = one(["a cat", "a dog"])
    assert torch.equal(vectors, two(["a cat", "a dog"])) and torch.allclose(vectors.norm(dim=1), torch.ones(2))


def test_a_text_that_is_too_long_is_cut_and_that_is_said(caplog):
    TextEncoder(ARCH, "untrained")(["a cat", "cat " * 80])
    assert caplog.text.count("a text is cut to the 77 tokens that CLIP reads: 'cat cat") == 1


BAD = [
    ({"texts": "gone.txt"}, r"--texts gone.txt: can't be read \(No such file"),
    ({"texts": "a cat;"}, r"--texts: has 1 class\(es\); two are the least"),
    ({"texts": "a cat;a cat"}, r"--texts: names 'a cat' twice"),
    ({"texts": "a;b", "template": "a photo"}, r"--template 'a photo': write {} where the class stands"),
    ({"texts": "a;b", "run": "masked"}, r"was trained with --mt_task masked, so no head says a vector"),
    ({"texts": "a;b", "run": "X"}, r"form X is told the representation"),
    ({"texts": "a;b", "run": "unlearned"}, r"the head of 'representation' learned nothing"),
    ({"texts": "a;b"}, r"--labelled False classifies without comparing"),
]


@pytest.mark.parametrize(("values", "expected"), BAD, ids=[str(values) for values, _ in BAD])
def test_bad_input_is_one_line(folder, values, expected):
    with pytest.raises(UserError, match=expected) as caught:
        classified(folder, **values)
    assert "\n" not in str(caught.value)
