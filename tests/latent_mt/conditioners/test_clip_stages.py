"""Stable Diffusion's text stages: numbers, checkpoint entries, what is left out, where weights come from, and messages."""

from __future__ import annotations

import gzip
import json
import logging
import sys

import pytest
import torch
from conftest import GOLDEN
from test_unet import fill, golden

from guided_mt.errors import UserError
from guided_mt.networks.clip import END, build_clip, load_clip, tokenize
from latent_mt.conditioners import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, clip

SPEC, ARRAYS = golden("openclip_tiny")
ARCH = {key: SPEC[key] for key in ("embed_dim", "text_cfg", "vision_cfg")}
RELEASED = json.loads(gzip.decompress((GOLDEN / "sd2_text_encoder_keys.json.gz").read_bytes()))
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 500, text
    return text


def stage_of_oracle(layer: str) -> FrozenOpenCLIPEmbedder:
    stage = FrozenOpenCLIPEmbedder(ARCH, None, layer=layer)
    load_clip(stage.model, fill(build_clip(ARCH), SPEC["fill_seed"]).state_dict(), "here")
    return stage


# ---------------------------------------------------------------- Stable Diffusion 2


def test_penultimate_has_the_golden_numbers():
    stage = stage_of_oracle(SPEC["layer"])
    assert (stage.encode_tokens(ARRAYS["tokens"]) - ARRAYS["context"]).abs().max() < 1e-5
    assert torch.equal(stage(SPEC["texts"]), stage.encode_tokens(ARRAYS["tokens"])) and stage.width == 64
    assert torch.equal(stage.encode(SPEC["texts"][0]), stage(SPEC["texts"][:1]))
    assert not any(p.requires_grad for p in stage.parameters())
    assert all(p.requires_grad for p in FrozenOpenCLIPEmbedder(ARCH, None, freeze=False).parameters())


def test_last_is_what_the_text_features_are_projected_from():
    stage = stage_of_oracle("last")
    context = stage.encode_tokens(ARRAYS["tokens"])
    ends = ARRAYS["tokens"].argmax(dim=1)
    features = context[torch.arange(3), ends] @ stage.model.text_projection
    assert (features - ARRAYS["text_features"]).abs().max() < 1e-5
    assert (context - ARRAYS["context"]).abs().max() > 1e-2


def test_released_entries():
    with torch.device("meta"):
        stage = FrozenOpenCLIPEmbedder(freeze=True, layer="penultimate")  # as in v2-inference.yaml
    shapes = {key: list(value.shape) for key, value in stage.state_dict().items()}
    assert shapes == RELEASED["cond_stage_model"] and len(shapes) == 294


def test_what_is_not_used_can_be_left_out():
    stage = stage_of_oracle("penultimate")
    before, tokens = stage.encode_tokens(ARRAYS["tokens"]), ARRAYS["tokens"]
    unused = stage.unused
    assert len(unused) == 14 and unused[2].startswith("model.transformer.resblocks.2.")
    with torch.no_grad():  # it is not used indeed
        for key in unused:
            stage.state_dict()[key].fill_(float("nan"))
    assert torch.equal(stage.encode_tokens(tokens), before)
    entries = set(stage.state_dict())
    stage.leave_out(unused)
    assert set(stage.state_dict()) == entries - set(unused) and torch.equal(stage.encode_tokens(tokens), before)
    assert not stage.unused
    with torch.no_grad():  # and all else is
        for key, value in stage.state_dict().items():
            kept = value.clone()
            value.fill_(float("nan"))
            assert stage.encode_tokens(tokens).isnan().any(), key
            value.copy_(kept)
    last = stage_of_oracle("last")
    assert last.unused == ["model.text_projection", "model.logit_scale"]


# ---------------------------------------------------------------- Stable Diffusion 1


def reference(stage: FrozenCLIPEmbedder):
    """transformers' own class with the stage's weights."""
    from transformers import CLIPTextModel

    model = CLIPTextModel(stage.config).eval()
    getattr(model, "text_model", model).load_state_dict(stage.transformer.text_model.state_dict())
    return model


@pytest.mark.parametrize("layer", FrozenCLIPEmbedder.LAYERS)
def test_the_layers_of_transformers(layer):
    torch.manual_seed(0)
    stage = FrozenCLIPEmbedder(None, layer=layer, layer_idx=-2 if layer == "hidden" else None, config=TINY)
    texts = ["a photo of a small cat", ""]
    seen = reference(stage)(input_ids=tokenize(texts, END)[0], output_hidden_states=True)
    wanted = {
        "last": seen.last_hidden_state,
        "pooled": seen.pooler_output[:, None],
        "hidden": seen.hidden_states[-2],
        "penultimate": stage.transformer.text_model.final_layer_norm(seen.hidden_states[-2]),
    }[layer]
    assert torch.equal(stage(texts), wanted) and wanted.shape == (2, 1 if layer == "pooled" else 77, 32)


def test_released_entries_of_the_first_version():
    with torch.device("meta"):
        stage = FrozenCLIPEmbedder()  # as in v1-inference.yaml
    shapes = {key: list(value.shape) for key, value in stage.state_dict().items()}
    # 2 embeddings, 12 blocks of 4 + 2 linear layers and 2 norms, the last norm; checkpoints hold position_ids too
    assert len(shapes) == 2 + 12 * (6 * 2 + 2 * 2) + 2 == 196
    prefix = "transformer.text_model."
    expected = {
        "embeddings.token_embedding.weight": [49408, 768],
        "embeddings.position_embedding.weight": [77, 768],
        "encoder.layers.11.self_attn.k_proj.weight": [768, 768],
        "encoder.layers.11.self_attn.out_proj.bias": [768],
        "encoder.layers.11.layer_norm1.weight": [768],
        "encoder.layers.11.mlp.fc1.weight": [3072, 768],
        "encoder.layers.11.mlp.fc2.weight": [768, 3072],
        "encoder.layers.11.layer_norm2.bias": [768],
        "final_layer_norm.weight": [768],
    }
    assert {key: shapes.get(prefix + key) for key in expected} == expected
    assert (
        stage.config.hidden_act == "quick_gelu"
        and "transformer.text_model.embeddings.position_ids" in stage.not_weights
    )


# ---------------------------------------------------------------- where weights come from, and messages


def test_weights_are_fetched_only_where_none_came(monkeypatch):
    asked, trained = [], fill(build_clip(ARCH), 5).state_dict()
    monkeypatch.setattr(clip, "clip_state", lambda arch, version: asked.append(version) or trained)
    stage, tokens = FrozenOpenCLIPEmbedder(ARCH, "a-version"), ARRAYS["tokens"]
    assert not asked
    context = stage.encode_tokens(tokens)
    assert asked == ["a-version"] and torch.equal(stage.encode_tokens(tokens), context) and len(asked) == 1
    other = FrozenOpenCLIPEmbedder(ARCH, "a-version")
    whole = torch.nn.ModuleDict({"cond_stage_model": other})
    whole.load_state_dict({f"cond_stage_model.{key}": value for key, value in stage.state_dict().items()})
    assert torch.equal(other.encode_tokens(tokens), context) and len(asked) == 1


def test_the_activation_is_that_of_the_version():
    """OpenAI's weights were trained with quick GELU, which the architecture's name doesn't say."""
    with torch.device("meta"):
        kinds = [
            type(FrozenOpenCLIPEmbedder("ViT-B-32", version).model.transformer.resblocks[0].mlp.gelu).__name__
            for version in ("openai", "laion2b_s34b_b79k", None)
        ]
    assert kinds == ["QuickGELU", "GELU", "GELU"]


def test_what_cannot_be_fetched_is_one_line(monkeypatch):
    import transformers

    def offline(*arguments, **keywords):
        raise OSError("We couldn't connect\nto anything")

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", offline)
    stage = FrozenCLIPEmbedder("openai/clip-vit-large-patch14", config=TINY)
    said = complaint(stage, "a cat")
    assert "'openai/clip-vit-large-patch14' are not on this machine" in said and "We couldn't connect" in said


def test_a_long_text_is_cut_and_said_once(caplog):
    stage = FrozenOpenCLIPEmbedder(ARCH, None)
    with caplog.at_level(logging.WARNING, "latent_mt"):
        ids = stage.tokens(["short", "very " * 90 + "long"])
        stage.tokens(["cat " * 99])
    assert len(caplog.messages) == 1 and "cut to the 77 tokens" in caplog.text and "loses its last 16" in caplog.text
    assert ids[1, -1] == END


def test_wrong_settings_are_named():
    assert "did you mean penultimate" in complaint(FrozenOpenCLIPEmbedder, ARCH, None, layer="penultimte")
    assert "layer_idx" in complaint(FrozenCLIPEmbedder, None, layer="hidden", config=TINY)
    assert "this CLIP has 3 blocks" in complaint(FrozenCLIPEmbedder, None, layer="hidden", layer_idx=9, config=TINY)
    assert "of another give its CLIPTextConfig" in complaint(FrozenCLIPEmbedder, "openai/clip-vit-large-patch15")
    assert "max_length 20" in complaint(FrozenCLIPEmbedder, max_length=20)
    short = {**ARCH, "text_cfg": {**ARCH["text_cfg"], "context_length": 16}}
    assert "context_length 16" in complaint(FrozenOpenCLIPEmbedder, short, None)
    assert "vocab_size 99" in complaint(FrozenCLIPEmbedder, None, config={**TINY, "vocab_size": 99})
    stage = FrozenOpenCLIPEmbedder(ARCH, None)
    assert "expected token ids [B, 77], got int64 [2, 76]" in complaint(stage, torch.zeros(2, 76, dtype=torch.long))
    assert "token id 49408" in complaint(stage, torch.full((1, 77), 49408))


def test_the_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    said = complaint(FrozenCLIPEmbedder)
    assert "package transformers" in said and "[text]" in said
    assert "open_clip_torch" in complaint(FrozenOpenCLIPEmbedder, ARCH, None)
