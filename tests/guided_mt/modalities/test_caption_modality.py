"""Captions: what a label is, with more positions; a law over texts of any length; a vocabulary in the weights; bounded memory."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import DIGITS, MODEL, PROCESS, adm_unet, assert_same, column, contents, flags, step_folder, words

from guided_mt.commands import caption, sample, train
from guided_mt.data import open_source
from guided_mt.data.captions import OfLabels, find_captions
from guided_mt.data.images import make_grid, written
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.errors import UserError
from guided_mt.generation.build import build_modalities, build_model, model_sections
from guided_mt.generation.captioning import drawn_captions, log_probs_of
from guided_mt.modalities import CaptionModality, Images, LabelModality
from guided_mt.modalities.captions import scores
from guided_mt.modalities.captions.counted import count_captions
from guided_mt.modalities.captions.vocabulary import BytePairs, Words, words_of
from guided_mt.networks import caption_head
from guided_mt.networks.caption_head import CaptionHead
from guided_mt.networks.multi_task import VARIANTS
from guided_mt.runs.config import parse

B, L, V, WIDTH = 5, 3, 7, 12
BACKBONE = SimpleNamespace(middle_channels=8)


def head_of(size: int = V, length: int = L, words: int = 0) -> CaptionHead:
    torch.manual_seed(0)
    return CaptionHead(BACKBONE, size, length, WIDTH, words)


def caption_of(head: CaptionHead, length: int = L, kind: str = "words") -> CaptionModality:
    caption = CaptionModality("caption", kind, length, WIDTH)
    caption.use_network(SimpleNamespace(heads={"caption": head}))
    return caption


def said(length: int = L) -> torch.Tensor:
    return torch.randn(B, length, WIDTH, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the law


def test_of_one_token_it_is_a_label():
    """Loss, log probability, probabilities and expected embedding are those of a label with the same logits."""
    head, label, x = head_of(length=1), LabelModality(V), said(1)
    law, ids, t = caption_of(head, 1), torch.tensor([2, 0, 6, 3, 2]), torch.zeros(B).long()
    logits = head.logits(x)[:, 0]
    for of_caption, of_label in (
        (law.loss(x, ids[:, None]), label.loss(logits, ids)),
        (law.log_prob(x, ids[:, None], t), label.log_prob(logits, ids, t)),
        (head.expected(law.estimate(x), torch.eye(V), 0)[:, 0], label.estimate(logits)),
    ):
        torch.testing.assert_close(of_caption, of_label)


def captions_of_length(most: int) -> torch.Tensor:
    """All token sequences that captions of at most `most` tokens of V make, [N, most]; token 0 ends one."""
    found = []
    for length in range(most + 1):
        for tokens in itertools.product(range(1, V), repeat=length):
            found.append([*tokens, *[0] * (most - length)])
    return torch.tensor(found)


def test_the_law_of_a_caption():
    """The probabilities of all captions sum to 1, their mean embedding is `expected`, and loss is the mean per own token."""
    head, x = head_of(), said()[:1]
    law, ids = caption_of(head), captions_of_length(L)
    log_p = law.log_prob(x.expand(len(ids), -1, -1), ids, torch.zeros(len(ids)).long())
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    embedding = torch.randn(V, 4, generator=torch.Generator().manual_seed(2))
    mean = (log_p.exp()[:, None, None] * embedding[ids]).sum(dim=0)
    torch.testing.assert_close(head.expected(x, embedding, 0)[0], mean)
    own = (ids > 0).sum(dim=1).add(1).clamp(max=L)
    torch.testing.assert_close(law.loss(x.expand(len(ids), -1, -1), ids), -log_p / own)


def test_a_certain_estimate_is_encoded_as_its_caption(monkeypatch):
    head = head_of()
    embedding, ids = torch.randn(V, 4), torch.tensor([[3, 0, 0], [2, 5, 0], [1, 6, 4]])
    monkeypatch.setattr(head, "logits", lambda said: 200.0 * F.one_hot(said.argmax(-1), V))
    certain = F.one_hot(ids, V).float()
    certain[0, 2] = certain[0, 2].roll(3)  # what stands behind the end is never read
    torch.testing.assert_close(head.expected(certain, embedding, 0), embedding[ids])


def test_few_rows_at_a_time_change_nothing(monkeypatch):
    """Values and gradients; and no tensor of all logits is kept for the backward pass."""
    head, x, ids = head_of(), said().requires_grad_(), torch.randint(0, V, (B, L))
    embedding, u = torch.randn(V, 4), torch.rand(B, L)

    def everything() -> list[torch.Tensor]:
        log_p = head.token_log_probs(x, ids)
        grads = torch.autograd.grad(log_p.square().sum(), [x, *head.vocabulary.parameters()])
        with torch.no_grad():
            return [log_p, *grads, head.expected(x, embedding, 0), *head.best(x), head.drawn(x, u)]

    whole = everything()
    monkeypatch.setattr(caption_head, "LOGITS", 4 * V)
    for a, b in zip(whole, everything(), strict=True):
        torch.testing.assert_close(a, b)


def saved_floats(batch: int, length: int, size: int) -> int:
    """How many numbers are kept between forward and backward pass, beside the weights."""
    head = CaptionHead(BACKBONE, size, length, WIDTH)
    weights, kept = {p.untyped_storage().data_ptr() for p in head.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    x = torch.randn(batch, length, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        head.token_log_probs(x, torch.zeros(batch, length, dtype=torch.int64)).sum()
    return sum(kept.values())


def test_memory_of_a_large_vocabulary(monkeypatch):
    """With many rows none of the logits is kept, whatever the vocabulary: what is kept is of the size of the input."""
    monkeypatch.setattr(caption_head, "LOGITS", 2**14)
    assert saved_floats(8, 77, 2048) < 3 * 8 * 77 * WIDTH < 8 * 77 * 2048 / 10


def test_what_is_drawn_has_the_probabilities():
    head, x, count = head_of(), said()[:1], 20_000
    u = SampleStreams(torch.arange(count)).uniform(L)
    drawn = head.drawn(x.expand(count, -1, -1), u)
    p = torch.stack([F.one_hot(drawn[:, k], V).float().mean(dim=0) for k in range(L)])
    torch.testing.assert_close(p, head.logits(x)[0].softmax(-1), rtol=0, atol=0.015)
    ids, best = head.best(x)
    torch.testing.assert_close(best, head.logits(x).softmax(-1).gather(2, ids[..., None])[..., 0])


# ---------------------------------------------------------------- vocabularies


def test_words():
    assert words_of("A small, RED car's wheel\u2019s e\u0301!") == [
        *("a", "small", ",", "red", "car's", "wheel\u2019s", "\xe9", "!")
    ]
    words = Words(["a", "cat", ",", "red"])
    assert words.ids("A red, cat dog") == [2, 5, 4, 3, 1] and words.ids(" \n") == []
    assert words.text([2, 5, 4, 3, 1, 0, 2]) == "a red, cat <unknown>"
    assert words.ids(words.text([2, 5, 4, 3])) == [2, 5, 4, 3]
    assert words.unknown("a rad dog") == ["'rad' (did you mean red?)", "'dog'"]
    long = "\u20ac" * 20 + "x"
    assert all(len(word.encode()) <= caption_head.WORD_BYTES for word in words_of("z" * 100 + " \xe9" * 3 + long))


def test_byte_pairs():
    pytest.importorskip("open_clip")
    pairs = BytePairs()
    ids = pairs.ids("a small red car")
    assert pairs.text([*ids, pairs.end, 7]) == "a small red car" and pairs.unknown("xyzzy") == []
    assert CaptionModality("caption", "bpe", L, WIDTH).end == 49407


def test_words_are_in_the_weights():
    head = head_of(words=3)
    assert head.words.words() == []
    head.words.set(["a", "\xe9t\xe9", "z" * caption_head.WORD_BYTES, "one too many"])
    assert head.words.words() == ["a", "\xe9t\xe9", "z" * caption_head.WORD_BYTES]
    other = head_of(words=3)
    other.load_state_dict(head.state_dict())
    assert caption_of(other).vocabulary.ids("a z") == [2, 1]
    with pytest.raises(UserError, match="'caption' has no vocabulary yet"):
        _ = caption_of(head_of(words=3)).vocabulary


# ---------------------------------------------------------------- data


def write_images(folder: Path, names: tuple[str, ...]) -> Path:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * k, np.uint8)).save(folder / name)
    return folder


NAMES = ("a/0.png", "a/1.png", "b/2.png", "b/3.png")
TEXTS = {"a/0.png": ["A red cat.", "a cat"], "a/1.png": ["a dog, a cat"], "b/2.png": ["..."]}


def captioned(folder: Path, kind: str) -> Path:
    """Images of which the last has no caption, as the kind of data wants them."""
    write_images(folder, NAMES)
    if kind == "csv":
        with open(folder / "captions.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([("file", "caption"), *((name, text) for name in TEXTS for text in TEXTS[name])])
    elif kind == "txt":
        for name, texts in TEXTS.items():
            (folder / name).with_suffix(".txt").write_text("\n".join(texts))
    else:
        images = np.zeros((len(NAMES), 8, 8, 3), np.uint8)
        np.savez(folder / "x.npz", arr_0=images, captions=np.array([" ".join(TEXTS.get(n, [])) for n in NAMES]))
        return folder / "x.npz"
    return folder


@pytest.mark.parametrize("kind", ["csv", "txt", "npz"])
def test_captions_are_found(kind, tmp_path):
    path = str(captioned(tmp_path / "d", kind))
    source = open_source(path)
    source.captions = find_captions(path, source, "--caption_file")
    texts = [list(source.captions[k]) for k in range(4)]
    joined = [[" ".join(TEXTS[n])] if n in TEXTS else [] for n in NAMES]
    assert texts == (joined if kind == "npz" else [TEXTS.get(name, []) for name in NAMES])
    found = count_captions(source, "words")
    assert found.words[:2] == ["a", "cat"] and found.missing == 2
    assert found.shown == [source.name(2), source.name(3)] and found.longer_than(4) == (1 if kind != "npz" else 2)


def test_no_captions_are_refused(tmp_path):
    path = str(write_images(tmp_path, NAMES))
    with pytest.raises(UserError, match="has no captions: neither"):
        find_captions(path, open_source(path), "--caption_file")
    with pytest.raises(UserError, match=r"\{colour\}' is no field; write the class's name as \{class\}"):
        OfLabels("a {colour} {class}", open_source(path), "--caption_template")
    with pytest.raises(UserError, match="it has no field, so that all captions would be one"):
        OfLabels("a cat", open_source(path), "--caption_template")
    made = OfLabels("a {class}", open_source(path), "--caption_template")
    assert [list(made[k]) for k in (0, 3)] == [["a a"], ["a b"]]


def test_tokens_of_a_batch():
    law = caption_of(head_of(words=V - 2))
    law.counted, law.partly = ["a", "cat"], True
    ids = law.load_texts(["a cat a cat", "", "dog", "!?"])
    assert ids.tolist() == [[2, 3, 2], [-1, -1, -1], [1, 0, 0], [-1, -1, -1]]
    images = Images(torch.zeros(4, 3, 8, 8), loaded={"caption": ids})
    assert law.present(images).tolist() == [True, False, True, False]
    assert law.from_batch(images, SampleStreams(0))[:2].tolist() == [[2, 3, 2], [0, 0, 0]]
    assert law.texts(ids[:1]) == ["a cat a"] and law.read("cat", 8, None).tolist() == [[3, 0, 0]]
    with pytest.raises(
        UserError, match=r"caption=a cot: this model's captions have no word 'cot' \(did you mean cat\?\)"
    ):
        law.read("a cot", 8, None)
    with pytest.raises(UserError, match="a caption has no word"):
        law.read("", 8, None)


# ---------------------------------------------------------------- the network


def test_shapes_in_a_network():
    """As for a label, the encoding is of the image's shape, whether the caption is known or estimated."""
    config = parse(
        words(**MODEL, **PROCESS, mt_task="caption,label", mt_variant="any"), model_sections(), description=""
    )
    torch.manual_seed(0)
    model = build_model(config)
    modalities = build_modalities(config, model)
    law, label = modalities["caption"], modalities["label"]
    ids = torch.randint(0, 9, (2, law.length))
    expected = label.encode(torch.tensor([1, 2])).shape
    soft = torch.randn(2, law.length, law.width)
    assert law.encode(ids).shape == law.encode(soft).shape == expected == (2, 3, 8, 8)
    assert law.prior((3, 8, 8), SampleStreams(torch.arange(2))).shape == soft.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vocabulary_and_absent_images(variant, tmp_path, caplog):
    """V and L are the data's, the words lie in every weights file, and a run that goes on keeps them."""
    data = captioned(tmp_path / "data", "csv")
    run = {"mt_task": "caption,random-caption", "mt_variant": variant, "data_dir": data, "global_batch_size": 4}
    train.main(flags(**run, total_steps=2, log_dir=tmp_path / "whole", ema_rate="0.5"))
    assert all(np.isfinite(column(tmp_path / "whole", name)).all() for name in ("caption", "random-caption"))
    assert "2 of 4 images have no caption and count as absent: b/2.png, b/3.png" in caplog.text
    saved = (tmp_path / "whole" / "config.yaml").read_text()
    assert "caption_size: 8" in saved and "caption_length: 5" in saved and "mt_absent: caption\n" in saved
    for stem in ("model", "ema_0.5"):
        state = contents(step_folder(tmp_path / "whole", 2))[f"{stem}.safetensors"]
        table = caption_head.WordTable(6)
        table.load_state_dict({"table": state["heads.caption.words.table"]})
        assert table.words() == ["a", "cat", ",", ".", "dog", "red"]
    train.main(flags(**run, total_steps=1, log_dir=tmp_path / "parts", ema_rate="0.5"))
    train.main(flags(**run, total_steps=2, log_dir=tmp_path / "parts", ema_rate="0.5"))
    whole, parts = (contents(step_folder(tmp_path / name, 2)) for name in ("whole", "parts"))
    for each in (whole, parts):
        del each["config.yaml"]
    assert_same(whole, parts)


def test_other_words_than_the_checkpoints(tmp_path):
    """Where the captions changed, the vocabulary of the run decides: it is refused, or told its size."""
    run = {"mt_task": "caption", "mt_variant": "U", "log_dir": tmp_path, "total_steps": 1}
    train.main(flags(**run, caption_template="a {class}"))
    again = flags(**{**run, "total_steps": 2}, caption_template="the digit {class}")
    with pytest.raises(UserError, match=r"caption_template \(a \{class\} there, the digit \{class\} here\)"):
        train.main(again)


def test_a_template_says_what_the_label_says(tmp_path, caplog):
    source = open_source("builtin:digits")
    made = OfLabels("the digit {class}", source, "--caption_template")
    assert len(made) == DIGITS and list(made[0]) == [f"the digit {source.labels[0]}"]
    train.main(
        flags(mt_task="caption,label", total_steps=1, log_dir=tmp_path, num_classes=10, caption_template="a {class}")
    )
    assert "the captions are made of the classes" in caplog.text


BAD = [
    ({"caption_file": "none.csv"}, r"--caption_file none\.csv: no such file"),
    ({"caption_vocabulary": "bpe", "caption_size": 5}, "--caption_size 5: the byte pairs are 49408"),
    ({"caption_width": 100}, "--caption_width 100: take a multiple of 64"),
    (
        {"caption_file": "txt", "caption_template": "a {class}"},
        "--caption_template makes the captions, which --caption_file",
    ),
    ({}, "builtin:digits: has no captions"),
]


@pytest.mark.parametrize(("values", "expected"), BAD)
def test_bad_flags(values, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        train.main([*flags(mt_task="caption", total_steps=1, log_dir=tmp_path), *words(**values)])


# ---------------------------------------------------------------- use


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A few steps on captions of four words in each form."""
    folder = tmp_path_factory.mktemp("captions")
    data = captioned(folder / "data", "csv")
    for variant in VARIANTS:
        run = {"mt_task": "caption,label", "mt_variant": variant, "data_dir": data, "global_batch_size": 4, "lr": 5e-3}
        train.main(
            flags(**run, num_classes=2, predict_xstart=True, total_steps=4, ema_rate="0", log_dir=folder / variant)
        )
    return {variant: folder / variant for variant in VARIANTS} | {"data": data}


def drawn(run: Path, out: Path, *given: str, count: int = 4, **values) -> dict[str, np.ndarray]:
    sample.main([*words(model_path=run, num_samples=count, steps=3, device="cpu", out=out, **values), *given])
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_a_caption(variant, runs, tmp_path):
    """What is given comes back, and the images depend on it; unknown words are refused with the nearest ones."""
    a = drawn(runs[variant], tmp_path / "a.npz", "--given", "caption=A red cat, a dog")
    b = drawn(runs[variant], tmp_path / "b.npz", "--given", "caption=dog", "--given", "label=a")
    assert a["caption"].tolist() == 4 * ["a red cat, a"] and b["caption"].tolist() == 4 * ["dog"]
    assert (a["arr_0"] != b["arr_0"]).any()
    with pytest.raises(UserError, match=r"--given caption=a dag: .* have no word 'dag' \(did you mean dog\?\)"):
        drawn(runs[variant], tmp_path / "c.npz", "--given", "caption=a dag")
    (tmp_path / "texts.txt").write_text("a dog\na cat\n\na red dog\ncat\n")
    several = drawn(runs[variant], tmp_path / "d.npz", "--given", f"caption={tmp_path / 'texts.txt'}")
    assert several["caption"].tolist() == ["a dog", "a cat", "a red dog", "cat"]


@pytest.mark.parametrize("variant", ["U", "any"])
def test_images_with_their_captions(variant, runs, tmp_path):
    """As texts in the file, and under the pictures."""
    found = drawn(runs[variant], tmp_path / "a.npz", label_draw=True, count=16)
    assert found["caption"].dtype.kind == found["caption_draw"].dtype.kind == "U" and found["caption"].shape == (16,)
    own = Words(["a", "cat", ",", ".", "dog", "red"])
    assert all(own.text(own.ids(text)) == text for text in found["caption"] if text)
    plain = make_grid(found["arr_0"], 8)
    assert np.asarray(Image.open(tmp_path / "a.png")).shape[0] > plain.shape[0]
    few = drawn(runs[variant], tmp_path / "b.npz", count=16, batch_size=3)
    assert found["caption"].tolist() == few["caption"].tolist()


def test_text_under_pictures():
    strips = written(["a", "two words that are long", "\u4e2d"], 64)
    assert strips.shape[0::2] == (3, 64) and strips.shape[1] >= 24
    assert (strips[:, :, :, 0] < 128).any(axis=(1, 2)).all() and (strips[0, 12:] == 255).all()


@pytest.mark.parametrize("how", ["read", "drawn"])
@pytest.mark.parametrize("variant", ["U", "any"])
def test_captions_of_images(variant, how, runs, tmp_path, capsys):
    """The same in any batch; the scores are of those that have a caption."""
    options = {"model_path": runs[variant], "data_dir": runs["data"], "how": how, "device": "cpu", "draws": 1}
    for name, batch in (("a", 64), ("b", 3)):
        caption.main(words(**options, out=tmp_path / f"{name}.npz", batch_size=batch))
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        for name in ("caption", "ids", "said"):
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == list(NAMES) and rows[1]["true"] == "a dog, a cat"
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["images"] == 2 and 0 <= found["token accuracy"] <= 1 and found["different captions"] == 2
    assert 1 <= found["caption of image: median rank"] <= 2
    assert "token accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("variant", VARIANTS)
def test_adms_weights_start_a_run(variant, runs, tmp_path):
    """The image's half of the network is ADM's afterwards; the head, its words and what reads captions are new."""
    torch.save(adm_unet().state_dict(), tmp_path / "adm.pt")
    start = {"resume_checkpoint": tmp_path / "adm.pt", "lr": 0, "data_dir": runs["data"], "global_batch_size": 4}
    train.main(flags(mt_task="caption", mt_variant=variant, total_steps=1, log_dir=tmp_path / "run", **start))
    state = contents(step_folder(tmp_path / "run", 1))["model.safetensors"]
    assert all(torch.equal(state[key], value) for key, value in adm_unet().state_dict().items())
    assert bool(state["heads.caption.words.table"].any())


def test_what_cannot_write_captions(runs, tmp_path):
    with pytest.raises(UserError, match="form X is told the caption"):
        caption.main(words(model_path=runs["X"], data_dir=runs["data"]))
    with pytest.raises(UserError, match="so it has no caption other; it has caption"):
        caption.main(words(model_path=runs["U"], data_dir=runs["data"], name="other"))


def test_what_is_committed_is_shown():
    """A network that reads the frame makes the second token fit the first, which reading each by itself does not."""
    head = head_of(3, 2)
    law = caption_of(head, 2)
    law.prior = lambda shape, streams: torch.zeros(len(streams), 2, 3)
    head.logits = lambda said: said
    law.encode_partly = lambda x, known=None: shown_of(known)

    def shown_of(known) -> torch.Tensor:
        ids, fixed = known
        return (F.one_hot(ids, 3).float() * fixed[..., None]).flatten(1)[:, None, None, :].expand(-1, 3, 1, -1)

    def network(z_t, t, modalities):
        """The committed token of one position, read off the frame, tells that of the other."""
        first, second = z_t[:, 0, 0, 1:3], z_t[:, 0, 0, 4:6]
        logits = torch.full((len(z_t), 2, 3), -30.0)
        logits[:, 0, 1:] = 30 * second.flip(1)
        logits[:, 1, 1:] = 30 * first.flip(1)
        return ModelOutput(z_t, {"caption": logits})

    diffusion = create_gaussian_diffusion(steps=10, noise_schedule="cosine", mt_weights={"caption": "constant"})
    diffusion.aggregation.shift = lambda encodings, t: encodings["caption"]
    diffusion.q_sample = lambda x_start, t, noise: 0 * x_start
    x_start, streams = torch.zeros(64, 3, 1, 6), SampleStreams(torch.arange(64))
    ids = drawn_captions(network, diffusion, {"caption": law}, x_start, [0], [8, 5, 2, 0], streams, temperature=1.0)
    assert set(map(tuple, ids.tolist())) == {(1, 2), (2, 1)} and 20 < int((ids[:, 0] == 1).sum()) < 44


# ---------------------------------------------------------------- scores


def test_scores():
    ids, best = np.array([[2, 3, 0], [4, 0, 0]]), np.array([[2, 2, 0], [4, 0, 5]])
    own = np.array([[1, 1, 1], [1, 1, 0]], dtype=bool)
    assert scores.token_accuracy(ids, best, own) == 4 / 5
    assert scores.exact_match(["a b", "c"], ["a", "c"]) == 0.5
    # The second and third caption are the same text; images find 1st, 2nd, 3rd.
    log_p = np.log(np.array([[0.5, 0.3, 0.3], [0.2, 0.1, 0.1], [0.1, 0.6, 0.6]]))
    found = scores.retrieval(log_p, ["x", "y", "y"])
    assert found.caption_of_image.tolist() == [1, 2, 1] and found.different == 2
    assert found.image_of_caption.tolist() == [1, 2, 1]
    assert scores.recall(found.caption_of_image, 1) == 2 / 3


def test_log_probs_of_all_pairs():
    """Row by row those that the modality says."""
    head = head_of()
    law, x, ids = caption_of(head), said(), captions_of_length(L)[:40]
    pairs = log_probs_of(law, x, ids)
    for b in range(B):
        alone = law.log_prob(x[b : b + 1].expand(len(ids), -1, -1), ids, torch.zeros(len(ids)).long())
        torch.testing.assert_close(pairs[b], alone)
