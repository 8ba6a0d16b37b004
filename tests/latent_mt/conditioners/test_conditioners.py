"""LDM's conditioning stages: keys, numerics and messages."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from test_unet import fill

from guided_mt.errors import UserError
from latent_mt.conditioners import (
    BERTEmbedder,
    BERTTokenizer,
    ClassEmbedder,
    SpatialRescaler,
    TransformerEmbedder,
    text,
)


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 400, text
    return text


# ---------------------------------------------------------------- classes


def test_classes_become_one_token_each():
    stage = ClassEmbedder(embed_dim=6, n_classes=5)
    assert {k: list(v.shape) for k, v in stage.state_dict().items()} == {"embedding.weight": [5, 6]}
    ids = torch.tensor([4, 0, 4])
    tokens = stage(ids)
    assert tokens.shape == (3, 1, 6) and torch.equal(tokens[:, 0], stage.embedding.weight[ids])
    assert torch.equal(stage({"class": ids}), tokens) and torch.equal(stage.encode({"x": ids}, key="x"), tokens)
    assert ClassEmbedder(6).embedding.num_embeddings == 1000


def test_wrong_classes_are_named():
    stage = ClassEmbedder(embed_dim=6, n_classes=5)
    assert "class id 5 is none of the 5 (0 to 4) that n_classes allows" in complaint(stage, torch.tensor([1, 5]))
    assert "class id -1" in complaint(stage, torch.tensor([-1]))
    assert "expected class ids [B], got float32 [3]" in complaint(stage, torch.zeros(3))
    assert "got int64 [2, 2]" in complaint(stage, torch.zeros(2, 2, dtype=torch.long))


# ---------------------------------------------------------------- image-like conditions


def test_rescaler_is_resizing_then_a_convolution():
    stage = SpatialRescaler(n_stages=2, in_channels=5, out_channels=3)
    assert {k: list(v.shape) for k, v in stage.state_dict().items()} == {"channel_mapper.weight": [3, 5, 1, 1]}
    assert "channel_mapper.bias" in SpatialRescaler(1, in_channels=5, out_channels=3, bias=True).state_dict()
    x = torch.randn(2, 5, 16, 8)
    means = F.avg_pool2d(x, 4)  # bilinear halving is the mean of each 2 x 2
    expected = torch.einsum("oi,bihw->bohw", stage.channel_mapper.weight[:, :, 0, 0], means)
    assert torch.allclose(stage.encode(x), expected, atol=1e-6)
    assert stage(x).shape == (2, 3, 4, 2)


def test_rescaler_without_channels_has_no_weights():
    stage = SpatialRescaler(n_stages=1, method="nearest", multiplier=2.0, in_channels=2)
    assert not stage.state_dict()
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(stage(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_rescaler_says_what_it_cannot_do():
    assert "method 'bilineer' is none of nearest" in complaint(SpatialRescaler, method="bilineer")
    assert "did you mean bilinear" in complaint(SpatialRescaler, method="bilineer")
    assert "n_stages -1" in complaint(SpatialRescaler, n_stages=-1)
    assert "[B, 3, H, W], got [1, 4, 8, 8]" in complaint(SpatialRescaler(), torch.zeros(1, 4, 8, 8))


# ---------------------------------------------------------------- text

TINY = {"n_embed": 32, "n_layer": 2, "vocab_size": 50, "max_seq_len": 8}


def test_text_transformer_gives_the_numbers_of_x_transformers():
    """tests/golden/ldm_text_transformer.npz: x-transformers 0.12.1, TransformerWrapper(50, 8, Encoder(dim=32, depth=2))."""
    golden = np.load(GOLDEN / "ldm_text_transformer.npz")
    tokens, expected = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["output"])
    for stage in (TransformerEmbedder(**TINY), BERTEmbedder(**TINY), BERTEmbedder(**TINY, use_tokenizer=False)):
        fill(stage.eval().transformer, 31)
        with torch.no_grad():
            assert (stage.encode(tokens) - expected).abs().max() < 1e-5


def test_text_transformer_has_ldms_keys():
    with torch.device("meta"):
        stage = BERTEmbedder(n_embed=640, n_layer=32)
    shapes = {key: list(value.shape) for key, value in stage.state_dict().items()}
    assert len(shapes) == 2 + 32 * (2 + 5 + 2 + 4) + 2 + 2
    expected = {
        "transformer.token_emb.weight": [30522, 640],
        "transformer.pos_emb.emb.weight": [77, 640],
        "transformer.attn_layers.layers.0.0.weight": [640],
        "transformer.attn_layers.layers.62.1.to_q.weight": [512, 640],
        "transformer.attn_layers.layers.62.1.to_k.weight": [512, 640],
        "transformer.attn_layers.layers.62.1.to_v.weight": [512, 640],
        "transformer.attn_layers.layers.62.1.to_out.weight": [640, 512],
        "transformer.attn_layers.layers.62.1.to_out.bias": [640],
        "transformer.attn_layers.layers.63.0.bias": [640],
        "transformer.attn_layers.layers.63.1.net.0.0.weight": [2560, 640],
        "transformer.attn_layers.layers.63.1.net.2.weight": [640, 2560],
        "transformer.norm.weight": [640],
        "transformer.to_logits.weight": [30522, 640],
    }
    assert {key: shapes.get(key) for key in expected} == expected


def test_shorter_texts_are_read_with_the_first_positions():
    stage = TransformerEmbedder(**TINY)
    assert stage(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 32)
    moved = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])
    assert not torch.allclose(stage(moved[0])[:, 1], stage(moved[1])[:, 1])  # attention reads the other places


def test_gradients_reach_every_weight_but_the_logits():
    stage = TransformerEmbedder(**TINY)
    stage(torch.arange(8)[None]).square().sum().backward()
    without = [name for name, p in stage.named_parameters() if p.grad is None]
    assert without == ["transformer.to_logits.weight", "transformer.to_logits.bias"]


def test_wrong_ids_are_named():
    stage = TransformerEmbedder(**TINY)
    assert "token id 50 is none of the 50" in complaint(stage, torch.tensor([[50]]))
    assert "9 tokens are more than max_seq_len 8" in complaint(stage, torch.zeros(1, 9, dtype=torch.long))
    assert "expected token ids [B, L], got float32 [1, 2]" in complaint(stage, torch.zeros(1, 2))
    assert "expected token ids" in complaint(stage, torch.zeros(3, dtype=torch.long))


class FakeTokenizer:
    """What a tokenizer of `transformers` returns, for texts whose characters are the tokens."""

    def __call__(self, texts, truncation, max_length, padding, return_tensors):
        assert truncation and padding == "max_length" and return_tensors == "pt"
        rows = [[ord(c) - 96 for c in text][:max_length] for text in texts]
        return {"input_ids": torch.tensor([row + [0] * (max_length - len(row)) for row in rows])}


def test_text_goes_through_the_tokenizer(monkeypatch):
    monkeypatch.setattr(text, "load_tokenizer", FakeTokenizer)
    stage = BERTEmbedder(**TINY).eval()
    ids = torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0], [1] * 8])
    assert torch.equal(BERTTokenizer(max_length=8)(["abc", "a" * 20]), ids)
    assert torch.equal(stage(["abc", "a" * 20]), stage(ids)) and stage("abc").shape == (1, 8, 32)


def test_text_without_a_tokenizer_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where it is not installed
    text = complaint(BERTEmbedder(**TINY), ["a cat"])
    assert "pip install transformers" in text and "token ids instead of text" in text
    assert "use_tokenizer: false" in complaint(BERTEmbedder(**TINY, use_tokenizer=False), ["a cat"])


@pytest.mark.parametrize("words", [5, None])
def test_text_without_the_tokenizers_files_says_so(monkeypatch, words):
    """words: of the tokenizer that transformers 5 makes without files; None: what transformers 4 raises."""

    class Missing:
        vocab_size = words

        @classmethod
        def from_pretrained(cls, name, local_files_only):
            assert name == "bert-base-uncased" and local_files_only
            if words is None:
                raise OSError("can't load the tokenizer")
            return cls()

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(BertTokenizerFast=Missing))
    text = complaint(BERTTokenizer(), "a cat")
    assert "tokenizer files of bert-base-uncased" in text and ("5 words" if words else "can't load") in text


def test_text_with_the_package_itself():
    """Where the files are, words have BERT's ids; where they aren't, that is said."""
    pytest.importorskip("transformers", reason="needs the package transformers")
    try:
        ids = BERTTokenizer()("a cat")
    except UserError as error:
        assert "tokenizer files of" in str(error)
    else:
        assert ids[0, :5].tolist() == [101, 1037, 4937, 102, 0]
