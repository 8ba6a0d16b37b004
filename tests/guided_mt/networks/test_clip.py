"""CLIP by open_clip: its numbers, its towers one by one, its tokens, and what is said where something is missing."""

from __future__ import annotations

import sys

import pytest
import torch
from test_unet import fill, golden

from guided_mt.errors import UserError
from guided_mt.networks.clip import END, START, build_clip, clip_config, clip_state, load_clip, tokenize, vocabulary

SPEC, ARRAYS = golden("openclip_tiny")
ARCH = {key: SPEC[key] for key in ("embed_dim", "text_cfg", "vision_cfg")}


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 500, text
    return text


@pytest.fixture(scope="module")
def whole():
    return fill(build_clip(ARCH), SPEC["fill_seed"])


def test_both_towers_have_the_golden_numbers(whole):
    assert {key: list(value.shape) for key, value in whole.state_dict().items()} == SPEC["parameter_shapes"]
    with torch.no_grad():
        assert (whole.encode_image(ARRAYS["image"]) - ARRAYS["image_features"]).abs().max() < 1e-5
        assert (whole.encode_text(ARRAYS["tokens"]) - ARRAYS["text_features"]).abs().max() < 1e-5
    assert not whole.training


def test_a_tower_alone_holds_nothing_of_the_other(whole):
    text, image = build_clip(ARCH, towers="text"), build_clip(ARCH, towers="image")
    assert not any(key.startswith("visual") for key in text.state_dict())
    assert image.state_dict() and all(key.startswith("visual.") for key in image.state_dict())
    assert len(text.state_dict()) + len(image.state_dict()) == len(whole.state_dict())
    for tower in (text, image):
        load_clip(tower, whole.state_dict(), "here")
    with torch.no_grad():
        assert torch.equal(text.encode_text(ARRAYS["tokens"]), whole.encode_text(ARRAYS["tokens"]))
        assert torch.equal(image.encode_image(ARRAYS["image"]), whole.encode_image(ARRAYS["image"]))


def test_weights_come_from_a_file_of_open_clips(whole, tmp_path):
    file = tmp_path / "clip.pt"
    torch.save(whole.state_dict(), file)
    text = build_clip(ARCH, str(file), "text")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in text.state_dict().items())
    wider = {**ARCH, "text_cfg": {**ARCH["text_cfg"], "layers": 4}}
    assert "lacks 12 of 54 entries" in complaint(build_clip, wider, str(file), "text")
    narrow = {**ARCH, "embed_dim": 32}
    assert "'text_projection' is [64, 48] there, [64, 32] here" in complaint(build_clip, narrow, str(file), "text")
    (tmp_path / "no.pt").write_text("nothing")
    assert "can't be read as weights of open_clip" in complaint(clip_state, ARCH, str(tmp_path / "no.pt"))


def test_nothing_is_downloaded_in_silence(monkeypatch):
    import open_clip

    asked = []

    def offline(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("no network\nat all")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with torch.device("meta"):
        build_clip("ViT-H-14", towers="text")
    assert not asked
    said = complaint(clip_state, "ViT-H-14", "laion2b_s32b_b79k")
    assert asked and "'laion2b_s32b_b79k' of ViT-H-14 are not on this machine" in said and "no network" in said
    assert "laion2b" in complaint(clip_state, "ViT-H-14", "laion3b")
    assert "of a mapping only a file can be loaded" in complaint(clip_state, ARCH, "laion2b_s32b_b79k")


def test_architectures_that_are_none():
    assert "did you mean ViT-H-14" in complaint(clip_config, "ViT-H14")
    assert "lacks vision_cfg" in complaint(clip_config, {"embed_dim": 8, "text_cfg": {}})
    wrong = {**ARCH, "text_cfg": {**ARCH["text_cfg"], "depth": 3}}
    assert "depth" in complaint(build_clip, wrong)
    assert "text tower is another library's" in complaint(build_clip, "roberta-ViT-B-32", towers="text")


def test_tokens_are_those_of_the_golden_file():
    ids, cut = tokenize(SPEC["texts"])
    assert torch.equal(ids, ARRAYS["tokens"]) and cut == [0, 0, 0]
    padded, _ = tokenize(SPEC["texts"], padding=END)
    assert torch.equal(torch.where(padded == END, 0, padded), torch.where(ids == END, 0, ids))
    assert padded[1].tolist() == [START] + [END] * 76 and ids[1].tolist() == [START, END] + [0] * 75


def test_long_texts_are_cut_and_counted():
    ids, cut = tokenize(["cat " * 75, "cat " * 80])
    assert cut == [0, 5] and ids.shape == (2, 77) and ids[:, -1].tolist() == [END, END]


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "open_clip_torch" in complaint(build_clip, ARCH) and "[text]" in complaint(build_clip, ARCH)


def test_transformers_has_the_same_ids():
    """Its CLIPTokenizer, on open_clip's vocabulary written as the files that it reads."""
    from transformers import CLIPTokenizer

    words, merges = vocabulary()
    theirs = CLIPTokenizer(words, [tuple(merge.split()) for merge in merges])
    texts = [*SPEC["texts"], "Ünïcode naïve -- $5.99!", "a  photograph\tof an ASTRONAUT riding a horse's back"]
    for padding in (0, END):
        theirs.pad_token = theirs.convert_ids_to_tokens(padding)
        wanted = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        assert torch.equal(wanted["input_ids"], tokenize(texts, padding)[0])
