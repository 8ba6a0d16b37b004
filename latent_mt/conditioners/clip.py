"""Stable Diffusion's text stages: the frozen text towers of CLIP, of open_clip (version 2) and of transformers (version 1).

Constructor keywords and state-dict keys are Stable Diffusion's. Weights come out of a checkpoint; only where none brought them are
those of `version` fetched, at the first text. The tokens of both are made with the vocabulary inside open_clip.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from guided_mt.errors import UserError, how_to_install, nearest, reason
from guided_mt.networks.clip import END, LENGTH, build_clip, clip_config, clip_state, load_clip, tokenize, what_is_cut
from guided_mt.runs.processes.launcher import rank_of_launcher

from .base import Stage, check_ids

log = logging.getLogger("latent_mt")
VOCABULARY = 49408
# transformers' CLIPTextConfig of the towers that Stable Diffusion 1 and its relatives name as `version`.
SIZES: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "openai/clip-vit-base-patch32": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8},
    "openai/clip-vit-base-patch16": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8},
}


class TextTower(Stage):
    """Texts, or their tokens [B, 77], -> [B, 77, width], without gradient where it is frozen."""

    reads_text = True
    padding = 0  # the id behind a text's end
    width: int  # of a token's vector

    def __init__(self, max_length: int, version: str | None):
        super().__init__()
        if max_length != LENGTH:
            raise UserError(f"max_length {max_length}: CLIP's texts have {LENGTH} tokens; leave it out")
        self.version: str | None = version  # what to fetch, until a state dict brings the weights
        self._cut_said = False
        self.register_load_state_dict_pre_hook(_weights_came)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Texts, or token ids [B, 77] -> [B, 77, width]. Raises UserError as `encode_tokens` does."""
        if isinstance(text, Tensor):
            return self.encode_tokens(text)
        tokens, device = self.tokens([text] if isinstance(text, str) else list(text)), next(self.parameters()).device
        if device.type == "cuda":  # a copy from pinned memory doesn't wait for the steps under way
            tokens = tokens.pin_memory()
        return self.encode_tokens(tokens.to(device, non_blocking=True))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, 77] of texts; what is too long is cut, which is said once."""
        ids, cut = tokenize(texts, self.padding)
        line = what_is_cut(texts, cut)
        if line and not self._cut_said and rank_of_launcher() == 0:
            self._cut_said = True
            log.warning("%s", line)
        return ids

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids [B, 77] -> [B, 77, width]. Raises UserError for others, and where the weights can't be had."""
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] != LENGTH:
            raise UserError(f"expected token ids [B, {LENGTH}], got {str(tokens.dtype)[6:]} {list(tokens.shape)}")
        if not tokens.is_cuda:
            check_ids(tokens, VOCABULARY, "token", "CLIP's vocabulary")
        if self.version is not None:
            self.fetch(self.version)
            self.version = None
        return self.context(tokens)

    def context(self, tokens: Tensor) -> Tensor:
        """What `encode_tokens` gives, of tokens that are right."""
        raise NotImplementedError

    def fetch(self, version: str) -> None:
        """Load the weights of that name. Raises UserError where they can't be had."""
        raise NotImplementedError


def _weights_came(module: TextTower, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    if any(key.startswith(prefix) for key in state):
        module.version = None


class FrozenOpenCLIPEmbedder(TextTower):
    """Stable Diffusion 2's text stage: open_clip's text tower, read after its last block or the one before, then normalised.

    arch: a name that open_clip knows, or a mapping {embed_dim, text_cfg, vision_cfg}; version: open_clip's name of weights to fetch
    where no checkpoint brings any, or a file of them; None for untrained ones. layer: "last" or "penultimate". freeze: without
    gradient.
    """

    LAYERS = ("last", "penultimate")

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = LENGTH,
        freeze: bool = True,
        layer: str = "last",
    ):
        """device: Stable Diffusion's, without effect; the stage is where the model is moved to."""
        super().__init__(max_length, version)
        _check_layer(layer, self.LAYERS)
        self.arch, self.layer = arch, layer
        self.model = cast(Any, build_clip(arch, version, "text", weights=False))
        self.width = self.model.ln_final.normalized_shape[0]
        length = clip_config(arch)["text_cfg"].get("context_length", LENGTH)
        if length != LENGTH or self.model.vocab_size != VOCABULARY:
            raise UserError(
                f"text_cfg: context_length {length} and vocab_size {self.model.vocab_size} must be CLIP's {LENGTH} and {VOCABULARY}"
            )
        if freeze:
            self.requires_grad_(False)

    def context(self, tokens: Tensor) -> Tensor:
        """The vectors [B, 77, width] after the chosen block, by the last norm."""
        clip, blocks = self.model, self.model.transformer.resblocks
        x = clip.token_embedding(tokens) + clip.positional_embedding
        for block in blocks if self.layer == "last" else blocks[:-1]:
            x = block(x, attn_mask=clip.attn_mask)
        return clip.ln_final(x)

    def fetch(self, version: str) -> None:
        """Load open_clip's weights of that name. Raises UserError where they can't be had."""
        load_clip(self.model, clip_state(self.arch, version), f"cond_stage_config: version {version}")

    @property
    def unused(self) -> list[str]:
        """Entries that the output doesn't depend on: what compares texts with images, and of "penultimate" the last block."""
        last = f"model.transformer.resblocks.{len(self.model.transformer.resblocks) - 1}."
        names = [key for key in self.state_dict() if self.layer == "penultimate" and key.startswith(last)]
        return [key for key in ("model.text_projection", "model.logit_scale") if key in self.state_dict()] + names

    def leave_out(self, missing: Collection[str]) -> None:
        """See `Stage.leave_out`."""
        for name in ("text_projection", "logit_scale"):
            if f"model.{name}" in missing:
                setattr(self.model, name, None)
        blocks = self.model.transformer.resblocks
        if any(key.startswith(f"model.transformer.resblocks.{len(blocks) - 1}.") for key in missing):
            blocks[len(blocks) - 1] = Unused()


class Unused(nn.Module):
    """In the place of a block that nothing is computed with, and that no checkpoint has weights of."""


class FrozenCLIPEmbedder(TextTower):
    """Stable Diffusion 1's text stage: transformers' CLIPTextModel.

    version: of SIZES, or any with `config`, the keywords of transformers' CLIPTextConfig. Its weights are fetched where no
    checkpoint brings any; None for untrained ones. layer: "last", after the last norm; "penultimate", the block before the last
    and then that norm; "hidden", after `layer_idx` blocks (from the end where negative), as it is; "pooled", the one vector of the
    text's end.
    """

    padding = END
    not_weights = ("transformer.text_model.embeddings.position_ids",)  # 0 to 76, in checkpoints of older versions
    LAYERS = ("last", "penultimate", "hidden", "pooled")

    def __init__(
        self,
        version: str | None = "openai/clip-vit-large-patch14",
        device: str = "cuda",
        max_length: int = LENGTH,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """device: Stable Diffusion's, without effect; the stage is where the model is moved to."""
        super().__init__(max_length, version)
        _check_layer(layer, self.LAYERS)
        if (layer == "hidden") != (layer_idx is not None):
            raise UserError(f"layer {layer} and layer_idx {layer_idx}: hidden takes a layer_idx, the others none")
        if config is None and version not in SIZES:
            raise UserError(
                f"version '{version}' is none of {', '.join(SIZES)}{nearest(str(version), SIZES)}; "
                "of another give its CLIPTextConfig as config"
            )
        self.layer, self.layer_idx = layer, layer_idx
        self.config: Any = _text_config(config if config is not None else SIZES[str(version)])
        blocks = self.config.num_hidden_layers
        if layer_idx is not None and not -blocks - 1 <= layer_idx <= blocks:
            raise UserError(f"layer_idx {layer_idx}: this CLIP has {blocks} blocks")
        self.width = self.config.hidden_size
        model = _transformers().CLIPTextModel(self.config).eval()
        # Its parts stand under `text_model` in checkpoints, and in transformers before version 5.
        self.transformer: Any = nn.Module()
        self.transformer.text_model = getattr(model, "text_model", model)
        if freeze:
            self.requires_grad_(False)

    def context(self, tokens: Tensor) -> Tensor:
        """The vectors of the chosen layer, [B, 77, width], or [B, 1, width] of the text's end."""
        model = self.transformer.text_model
        hidden = self.layer in ("hidden", "penultimate")
        seen = model(input_ids=tokens, output_hidden_states=hidden)
        if self.layer == "last":
            return seen.last_hidden_state
        if self.layer == "pooled":
            return seen.pooler_output[:, None]
        if self.layer == "hidden":
            return seen.hidden_states[self.layer_idx]
        return model.final_layer_norm(seen.hidden_states[-2])

    def fetch(self, version: str) -> None:
        """Load transformers' weights of that name. Raises UserError where they can't be had."""
        try:
            trained = _transformers().CLIPTextModel.from_pretrained(version).float()
        except Exception as error:  # huggingface_hub and transformers raise many kinds
            raise UserError(
                f"the CLIP weights '{version}' are not on this machine and can't be downloaded ({reason(error)[:120]}); load a "
                "checkpoint that holds them, or name a folder of them as version"
            ) from None
        state = getattr(trained, "text_model", trained).state_dict()
        try:
            self.transformer.text_model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"cond_stage_config: version {version}: another architecture ({reason(error)[:120]})"
            ) from None


def _text_config(keywords: Mapping[str, Any]) -> Any:
    width = keywords.get("hidden_size", 512)
    own = {"intermediate_size": 4 * width, "projection_dim": width, "vocab_size": VOCABULARY, **keywords}
    library = _transformers()
    try:
        config = library.CLIPTextConfig(**own)
    except Exception as error:  # transformers validates by means of its own
        raise UserError(f"cond_stage_config: config is no CLIPTextConfig ({reason(error)[:120]})") from None
    if config.max_position_embeddings != LENGTH or config.vocab_size != VOCABULARY:
        raise UserError(
            f"config: max_position_embeddings {config.max_position_embeddings} and vocab_size {config.vocab_size} must be CLIP's "
            f"{LENGTH} and {VOCABULARY}"
        )
    return config


def _check_layer(layer: str, known: Sequence[str]) -> None:
    if layer not in known:
        raise UserError(f"layer '{layer}' is none of {', '.join(known)}{nearest(layer, known)}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"Stable Diffusion 1's text stage needs the package transformers ({error}): {how_to_install('transformers')}"
        ) from None
    return transformers
