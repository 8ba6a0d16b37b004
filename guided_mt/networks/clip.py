"""CLIP's towers, built by the library open_clip (pip's open_clip_torch): the one place where such a model comes from.

    clip = build_clip("ViT-H-14", towers="text")                     untrained, no image tower
    clip = build_clip("ViT-H-14", "laion2b_s32b_b79k", "image")      trained, no text tower: `clip.visual(images)`
    ids = tokenize(["a cat"])                                        [B, 77], padded with 0

Nothing is downloaded unless `version` names weights that this machine lacks. open_clip is imported when it is first needed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, how_to_install, nearest, reason

LENGTH = 77  # tokens of a text, with those of its start and end
START, END = 49406, 49407
SIZE = 49408  # of its vocabulary
PARTS = ("embed_dim", "vision_cfg", "text_cfg")
TOWERS = ("both", "text", "image")
# In the place of a tower that is not wanted: built, and thrown away at once.
_NO_VISION = {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def open_clip() -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import open_clip as library
    except ImportError as error:
        raise UserError(f"CLIP needs the package open_clip_torch ({error}): {how_to_install('open_clip')}") from None
    return library


def clip_config(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """{embed_dim, vision_cfg, text_cfg, ...} of an architecture: a name that open_clip knows, or such a mapping itself, as in
    open_clip's `model_configs`. Raises UserError for another name, and for a mapping without these parts."""
    if isinstance(arch, str):
        library = open_clip()
        config = library.get_model_config(arch) if arch in library.list_models() else None
        if config is None:
            raise UserError(
                f"CLIP of the architecture '{arch}' is none of open_clip's{nearest(arch, library.list_models())}"
            )
        return dict(config)
    missing = [part for part in PARTS if part not in arch]
    if missing:
        raise UserError(
            f"a CLIP architecture is a name or a mapping with {', '.join(PARTS)}; it lacks {', '.join(missing)}"
        )
    size, *towers = (arch[part] for part in PARTS)
    if not isinstance(size, int) or size < 1 or not all(isinstance(tower, Mapping) for tower in towers):
        raise UserError(
            f"a CLIP architecture has a whole number as {PARTS[0]} and mappings as {' and '.join(PARTS[1:])}"
        )
    return dict(arch)


def build_clip(
    arch: str | Mapping[str, Any], version: str | None = None, towers: str = "both", *, weights: bool = True
) -> nn.Module:
    """open_clip's `CLIP` in float32, in evaluation mode, on torch's default device.

    arch: as in `clip_config`. towers: of TOWERS; without "image" it has no `visual`, and with "image" alone `visual` is all that
    has weights. version: None for untrained weights, else as in `clip_state`. weights False: built as `version` wants it, with its
    activation, for weights that come from elsewhere. Raises UserError for what open_clip can't build.
    """
    library, config = open_clip(), clip_config(arch)
    if towers not in TOWERS:
        raise ValueError(f"towers '{towers}' is none of {', '.join(TOWERS)}")
    if towers != "text" and config["vision_cfg"].get("timm_model_pretrained"):
        config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    name = arch if isinstance(arch, str) else "the mapping"
    outside = "multimodal_cfg" in config or config["text_cfg"].get("hf_model_name")
    if towers != "image" and outside:
        raise UserError(
            f"CLIP of {name}: its text tower is another library's; take one whose text_cfg is open_clip's own"
        )
    keywords = {key: config[key] for key in ("quick_gelu", "init_logit_bias") if key in config}
    if version and "quick_gelu" not in keywords and not Path(version).is_file():
        keywords["quick_gelu"] = bool((library.get_pretrained_cfg(name, version) or {}).get("quick_gelu", False))
    vision = config["vision_cfg"] if towers != "text" else _NO_VISION
    text = config["text_cfg"] if towers != "image" else _NO_TEXT
    try:
        clip = library.CLIP(config["embed_dim"], vision, text, **keywords)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"CLIP of {name}: open_clip can't build it ({reason(error)})") from None  # type: ignore[arg-type]
    if towers == "text":
        del clip.visual
    if towers == "image":
        for part in (
            "transformer",
            "token_embedding",
            "ln_final",
            "positional_embedding",
            "text_projection",
            "logit_scale",
        ):
            setattr(clip, part, None)
    if version and weights:
        load_clip(clip, clip_state(arch, version), f"CLIP {version} of {name}")
    return clip.eval()


def clip_state(arch: str | Mapping[str, Any], version: str) -> dict[str, Tensor]:
    """The entries of trained weights, both towers. version: a file of open_clip's on this machine, or a name under which open_clip
    lists weights of this `arch`, which are taken from the machine's cache or downloaded.

    Raises UserError for a name that it doesn't list, and where the weights can't be had.
    """
    library = open_clip()
    from open_clip.factory import load_state_dict

    file = version
    if not Path(version).is_file():
        listed = library.list_pretrained_tags_by_model(arch) if isinstance(arch, str) else []
        if Path(version).suffix or Path(version).is_absolute():  # the name of a file, not of weights
            raise UserError(f"CLIP weights {version}: no such file; name one, or weights that open_clip lists")
        if version not in listed:
            known = f"; open_clip lists {', '.join(listed)}" if listed else "; of a mapping only a file can be loaded"
            raise UserError(
                f"CLIP weights '{version}' of {arch if isinstance(arch, str) else 'a mapping'} are unknown{known}"
            )
        try:
            file = library.download_pretrained(library.get_pretrained_cfg(arch, version))
        except Exception as error:  # huggingface_hub, urllib and open_clip raise many kinds
            raise UserError(
                f"the CLIP weights '{version}' of {arch} are not on this machine and can't be downloaded "
                f"({reason(error)[:120]}); load a checkpoint that holds them, or name a file of them as version"
            ) from None
    try:
        return dict(load_state_dict(str(file), weights_only=True))
    except Exception as error:  # pickle, zip and safetensors raise many kinds
        raise UserError(
            f"{file}: can't be read as weights of open_clip ({reason(error)[:120]}); copy it again, or take another file"
        ) from None


def load_clip(clip: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load those entries that `clip` has a place for; another tower's are left out. Raises UserError where some are missing or
    have another shape."""
    own = clip.state_dict()
    absent = [key for key in own if key not in state]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if absent:
        raise UserError(
            f"{where}: another architecture: it lacks {len(absent)} of {len(own)} entries, first '{absent[0]}'"
        )
    if shapes:
        key = shapes[0]
        raise UserError(
            f"{where}: another architecture: '{key}' is {list(state[key].shape)} there, {list(own[key].shape)} here"
        )
    clip.load_state_dict({key: state[key] for key in own})


def tokenize(texts: Sequence[str], padding: int = 0) -> tuple[Tensor, list[int]]:
    """(ids [B, 77] of CLIP's vocabulary, which comes with open_clip; how many tokens each text has that were cut off, 0 for none).

    padding: the id behind a text's end: 0 in open_clip's models, END in OpenAI's as transformers has them.
    """
    encode, cut = (
        _tokenizer().encode,
        [],
    )  # the slow part, which open_clip's own call would do without telling the length
    ids = torch.full((len(texts), LENGTH), padding)
    for row, text in zip(ids, texts, strict=True):
        words = encode(text)
        cut.append(max(0, len(words) + 2 - LENGTH))
        words = [START, *words[: LENGTH - 2], END]
        row[: len(words)] = torch.tensor(words)
    return ids, cut


def encode(text: str) -> list[int]:
    """The tokens of a text, without those of its start and end, however many they are."""
    return list(_tokenizer().encode(text))


def decode(ids: Sequence[int]) -> str:
    """What tokens spell."""
    return str(_tokenizer().decode(ids)).strip()


def what_is_cut(texts: Sequence[str], cut: Sequence[int]) -> str:
    """What to say of texts that lost tokens, by `tokenize`'s second value; '' where none did."""
    longest = max(range(len(cut)), key=cut.__getitem__, default=0)
    if not cut or not cut[longest]:
        return ""
    start = " ".join(texts[longest].split())[:40]
    return f"a text is cut to the {LENGTH} tokens that CLIP reads: '{start}...' loses its last {cut[longest]}; others are cut alike"


@functools.cache
def _tokenizer() -> Any:
    return open_clip().SimpleTokenizer()


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """({token: id}, merges "a b" in their order) of CLIP; special tokens by the names of transformers' CLIPTokenizer."""
    tokenizer, named = _tokenizer(), {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {named.get(word, word): i for word, i in tokenizer.encoder.items()}
    return words, [" ".join(pair) for pair in tokenizer.bpe_ranks]
