"""What a state dict looks like, from the names and shapes of its entries, and what a run is, from its configuration.

Weights may be ours, the parents' or other projects': a further kind is one row of KINDS. Runs are ours: RUNS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, Sequence[int]]

DIT_PATCHES = "x_embedder.proj.weight"  # a transformer's first entry, [width, channels, patch, patch]
DIT_CLASSES = "y_embedder.embedding_table.weight"
LDM_UNET, OWN_HEAD = "model.diffusion_model.", ("heads.", "condition_in.", "context_in.", "null_token.")


@dataclass(frozen=True)
class Kind:
    """name: with its article, as in "has the keys of a Stable Diffusion 2 model". loads_it: what to do with it, an imperative.

    family: which part of this project it is for: "pixel", "latent", "first stage", "classifier", or "" for none.
    """

    name: str
    loads_it: str
    family: str = ""


@dataclass(frozen=True)
class Signature:
    """One row: what tells a kind by its entries. The first row that accepts a state dict names it."""

    accepts: Callable[[Shapes], bool]
    name: str
    loads_it: str
    family: str = ""


def recognise(shapes: Shapes) -> Kind | None:
    """The kind of a state dict {name: shape}, without prefixes of wrappers (see `weights.unwrapped`); None: none that is known."""
    row = next((row for row in KINDS if row.accepts(shapes)), None)
    return None if row is None else Kind(row.name, row.loads_it, row.family)


def looks_like(shapes: Shapes) -> str:
    """ "has the keys of X; to use it: Y" for an error message, '' where nothing known looks like it."""
    kind = recognise(shapes)
    return f"has the keys of {kind.name}; {kind.loads_it}" if kind else ""


# ---------------------------------------------------------------- runs

# By their family (see `Kind`): what a run holds, and what takes it.
RUNS: dict[str, tuple[str, str]] = {
    "pixel": ("a pixel-space model", "sample, restore, classify and nll take it as --model_path"),
    "classifier": (
        "a classifier",
        "classifier-sample and classify take it as --classifier_path",
    ),
    "latent": ("a latent model", "latent-sample, latent-restore and latent-classify take it as --model_path"),
    "first stage": (
        "a first stage",
        "encode takes it as --first_stage, and a YAML file as ckpt_path of first_stage_config.params",
    ),
}


def run_family(config: Mapping[str, Any]) -> str:
    """The key of RUNS that a run's config.yaml is of; "" for a class of one's own, or settings of something else."""
    model = config.get("model")
    if isinstance(model, Mapping):
        params = model.get("params") or {}
        if "first_stage_config" in params or "unet_config" in params:
            return "latent"
        return "first stage" if "ddconfig" in params else ""
    if "mt_task" not in config and "classifier_width" in config:
        return "classifier"
    return "pixel" if "num_channels" in config else ""


# ---------------------------------------------------------------- what rows ask


def _has(*beginnings: str) -> Callable[[Shapes], bool]:
    """Accepts where, for each of `beginnings`, some entry begins with it."""
    return lambda shapes: all(any(key.startswith(begin) for key in shapes) for begin in beginnings)


def _holds(*parts: str) -> Callable[[Shapes], bool]:
    """Accepts where each of `parts` stands in some entry's name."""
    return lambda shapes: all(any(part in key for key in shapes) for part in parts)


def _all(*tests: Callable[[Shapes], bool]) -> Callable[[Shapes], bool]:
    return lambda shapes: all(test(shapes) for test in tests)


def _none(*beginnings: str) -> Callable[[Shapes], bool]:
    return lambda shapes: not any(key.startswith(beginnings) for key in shapes)


def _takes(prefix: str, channels: int) -> Callable[[Shapes], bool]:
    """Accepts a U-Net whose first convolution takes this many channels."""

    def accepts(shapes: Shapes) -> bool:
        shape = shapes.get(f"{prefix}input_blocks.0.0.weight", ())
        return len(shape) == 4 and shape[1] == channels

    return accepts


def _patches(channels: int) -> Callable[[Shapes], bool]:
    """Accepts a transformer whose patches have this many channels."""

    def accepts(shapes: Shapes) -> bool:
        shape = shapes.get(DIT_PATCHES, ())
        return len(shape) == 4 and shape[1] == channels

    return accepts


def _context(width: int) -> Callable[[Shapes], bool]:
    """Accepts a latent U-Net whose cross-attention reads tokens of this width."""
    return lambda shapes: any(
        key.startswith(LDM_UNET) and key.endswith("attn2.to_k.weight") and len(shape) == 2 and shape[1] == width
        for key, shape in shapes.items()
    )


def _bare_latent_unet(shapes: Shapes) -> bool:
    """Accepts LDM's spatial transformers, and an input of four channels, which no pixels have."""
    return any("transformer_blocks.0." in key for key in shapes) or _takes("", 4)(shapes)


_ADM = _has("input_blocks.0.0.", "time_embed.")
_DIT = _all(_has(DIT_PATCHES, "blocks.0."), _holds("adaLN_modulation"))
_LDM = _has(LDM_UNET)
_OUR_HEADS = _has(*OWN_HEAD[:1])

# ---------------------------------------------------------------- what to do with them

_TEXT = "give it to latent-sample as --model_path with --config FILE ({}) and --prompt TEXT"
_SD1, _SD2 = _TEXT.format("v1-inference.yaml"), _TEXT.format("v2-inference.yaml, of the 768 model v2-inference-v.yaml")
_BARE_SD2 = (
    "load it by latent-train (model.params.ckpt_path, load_only_unet: true); the text encoder is then that of "
    "cond_stage_config's version"
)
_ELSEWHERE = "nothing here loads it"
_SD_VARIANT = f"no class of this package stands for it: {_ELSEWHERE}"

KINDS: tuple[Signature, ...] = (
    # Stable Diffusion, the special ones first
    Signature(
        _all(_LDM, _has("conditioner.embedders.")),
        "a Stable Diffusion XL model",
        f"its DiffusionEngine is not built here: {_ELSEWHERE}",
    ),
    Signature(
        _all(_LDM, _has("noise_augmentor.")),
        "a Stable Diffusion unCLIP model",
        f"ImageEmbeddingConditionedLatentDiffusion is missing here: {_ELSEWHERE}",
    ),
    Signature(
        _all(_LDM, _has("depth_model.")),
        "a Stable Diffusion depth (MiDaS) model",
        f"LatentDepth2ImageDiffusion is missing here: {_ELSEWHERE}",
    ),
    Signature(
        _all(_LDM, _has("low_scale_model.")),
        "a Stable Diffusion upscaling model",
        f"LatentUpscaleDiffusion is missing here: {_ELSEWHERE}",
    ),
    Signature(
        _all(_LDM, _takes(LDM_UNET, 9), _has("cond_stage_model.")),
        "a Stable Diffusion inpainting model",
        f"LatentInpaintDiffusion is missing here: {_ELSEWHERE}",
    ),
    Signature(
        _all(_LDM, _takes(LDM_UNET, 8), _has("cond_stage_model.transformer.text_model.")),
        "an InstructPix2Pix model",
        _SD_VARIANT,
    ),
    Signature(_has("control_model.input_blocks."), "a ControlNet", _SD_VARIANT),
    Signature(_all(_LDM, _has("cond_stage_model.model.")), "a Stable Diffusion 2 model", _SD2, "latent"),
    Signature(
        _all(_LDM, _has("cond_stage_model.transformer.text_model.")), "a Stable Diffusion 1 model", _SD1, "latent"
    ),
    Signature(_all(_LDM, _context(1024)), "a Stable Diffusion 2 U-Net without its text encoder", _BARE_SD2, "latent"),
    Signature(_has("joint_blocks.0."), "a Stable Diffusion 3 transformer", _ELSEWHERE),
    Signature(_has("model.diffusion_model.joint_blocks."), "a Stable Diffusion 3 model", _ELSEWHERE),
    Signature(_holds("double_blocks.0.", "single_blocks.0."), "a FLUX transformer", _ELSEWHERE),
    Signature(_holds("lora_"), "a LoRA of another model", f"it is a change of another file's weights: {_ELSEWHERE}"),
    # latent-diffusion, and ours in latents
    Signature(
        _all(_LDM, _has(*(f"{LDM_UNET}{OWN_HEAD[0]}",))),
        "a latent model of this project",
        "give it to latent-sample, latent-restore or latent-classify as --model_path, with its config.yaml beside it",
        "latent",
    ),
    Signature(
        _LDM,
        "a latent-diffusion (LDM) model",
        "give it to latent-sample as --model_path with --config FILE (its YAML file), or to latent-train as model.params.ckpt_path",
        "latent",
    ),
    Signature(
        _all(_has("encoder.down.", "decoder.up."), _has("quantize.embedding.")),
        "a latent-diffusion (LDM) VQ autoencoder",
        "name it as ckpt_path of first_stage_config.params with target ldm.models.autoencoder.VQModelInterface",
        "first stage",
    ),
    Signature(
        _has("encoder.down.", "decoder.up."),
        "a latent-diffusion (LDM) KL autoencoder",
        "name it as ckpt_path of first_stage_config.params with target ldm.models.autoencoder.AutoencoderKL",
        "first stage",
    ),
    Signature(
        _all(_has("input_blocks.0.0.", "output_blocks."), _bare_latent_unet, _none("heads.")),
        "a latent-diffusion (LDM) U-Net alone",
        f"prefix its entries with {LDM_UNET} and load it as model.params.ckpt_path of latent-train",
    ),
    # ADM and DiT, and ours in pixels
    Signature(
        _all(_DIT, _OUR_HEADS),
        "a pixel-space model of this project",
        "give it to sample, restore or classify as --model_path, with config.yaml beside it or the training's model flags",
        "pixel",
    ),
    Signature(
        _all(_ADM, _OUR_HEADS),
        "a pixel-space model of this project",
        "give it to sample, restore or classify as --model_path, with config.yaml beside it or the training's model flags",
        "pixel",
    ),
    Signature(
        _all(_ADM, _has("output_blocks.", "label_emb."), _takes("", 6)),
        "an upsampler of guided-diffusion (ADM)",
        f"SuperResModel is missing here: {_ELSEWHERE}",
    ),
    Signature(
        _all(_ADM, _has("output_blocks.", "token_embedding.")),
        "a GLIDE text-to-image model",
        _ELSEWHERE,
    ),
    Signature(
        _all(_ADM, _has("output_blocks.", "label_emb.")),
        "a class-conditional model of guided-diffusion (ADM)",
        "give it to sample as --model_path with its model flags, --class_cond True among them",
        "pixel",
    ),
    Signature(
        _all(_ADM, _has("output_blocks.")),
        "an unconditional model of guided-diffusion (ADM)",
        "give it to sample as --model_path with its model flags and --class_cond False",
        "pixel",
    ),
    Signature(
        _ADM,
        "a noisy classifier of guided-diffusion (ADM)",
        "give it to classifier-sample or classify as --classifier_path, with its classifier flags",
        "classifier",
    ),
    # other diffusion projects
    Signature(
        _all(_DIT, _patches(4)),
        "a DiT or SiT transformer for latents",
        "give it to latent-sample as --model_path with --config FILE (imagenet256_dit_xl, or for SiT imagenet256_sit_xl) and "
        "--first_stage FOLDER, or to latent-train as model.params.ckpt_path",
        "latent",
    ),
    Signature(
        _DIT,
        "a DiT transformer for pixels",
        "give it to sample as --model_path with its model flags, --mt_backbone dit among them, or to train as --resume_checkpoint",
        "pixel",
    ),
    Signature(
        _has("down_blocks.0.", "up_blocks.0.", "time_embedding."),
        "a diffusers U-Net",
        "of a Stable Diffusion give the whole folder, which holds model_index.json; bring another into its original layout first",
    ),
    Signature(
        _has("encoder.down_blocks.0.", "decoder.up_blocks.0."),
        "a diffusers autoencoder",
        "name it, or its folder, as ckpt_path of first_stage_config.params with target ldm.models.autoencoder.AutoencoderKL; of a "
        "Stable Diffusion give the whole folder, which holds model_index.json",
        "first stage",
    ),
    Signature(_has("transformer_blocks.0."), "a diffusers transformer", _ELSEWHERE),
    Signature(_has("model.map_noise.", "model.map_layer0."), "an EDM network", _ELSEWHERE),
    Signature(_has("map_noise.", "map_layer0."), "an EDM network", _ELSEWHERE),
    Signature(_has("downs.0.", "ups.0.", "init_conv."), "a denoising-diffusion-pytorch U-Net", _ELSEWHERE),
    Signature(_has("in_blocks.0.", "mid_block.", "out_blocks.0."), "a U-ViT", _ELSEWHERE),
    # encoders and what scores images
    Signature(
        _has("visual.", "token_embedding.", "text_projection"),
        "a CLIP model (OpenAI's or open_clip's)",
        "encode the data with it once and give the vectors to --mt_task representation",
    ),
    Signature(
        _has("text_model.", "vision_model."),
        "a CLIP model (transformers')",
        "encode the data with it once and give the vectors to --mt_task representation",
    ),
    Signature(_has("text_model.embeddings."), "a CLIP text encoder (transformers')", _ELSEWHERE),
    Signature(
        _has("Mixed_5b.", "AuxLogits."),
        "torchvision's Inception v3",
        "FID needs the Inception of 2015: leave --inception out, and evaluate fetches it",
    ),
    Signature(
        _has("Mixed_5b.", "Mixed_7c."),
        "an Inception network",
        "it scores images: give it to evaluate as --inception",
    ),
    Signature(
        _has("blocks.0.", "patch_embed.proj.", "mask_token"),
        "a DINOv2 encoder",
        "it scores images: evaluate --metrics fd_dinov2 finds it in torch.hub's folder",
    ),
    Signature(
        _has("conv_proj.", "encoder.layers.encoder_layer_0."), "a vision transformer (torchvision's)", _ELSEWHERE
    ),
    Signature(_has("blocks.0.attn.", "patch_embed.proj."), "a vision transformer (timm's)", _ELSEWHERE),
    Signature(_has("layer1.0.conv1.", "layer4.0.conv1.", "fc."), "a torchvision ResNet", _ELSEWHERE),
    Signature(
        _all(_has("features.0.", "classifier.1."), _none("features.1.")),
        "a torchvision AlexNet",
        "it scores restorations: give it to score restoration as --lpips_weights",
    ),
    Signature(_has("features.0.", "classifier."), "a classifier of torchvision (VGG or its like)", _ELSEWHERE),
    Signature(_has("lin0.model.", "lin4.model."), "LPIPS' linear layers", "they come with the lpips package"),
    Signature(_has("synthesis.", "mapping.fc"), "a StyleGAN generator", _ELSEWHERE),
)
