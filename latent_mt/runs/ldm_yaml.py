"""The YAML file that latent-diffusion's own code reads beside an exported checkpoint: our configuration in LDM's keywords alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from guided_mt.errors import UserError, reason

HEADER = "# written by the export of MT-Diffusion, for latent-diffusion's own code\n"
NO_LOSS = {"target": "torch.nn.Identity"}


def _words(text: str) -> list[str]:
    return text.split()


_DDPM = _words(
    "unet_config timesteps beta_schedule loss_type monitor use_ema first_stage_key image_size channels log_every_t "
    "clip_denoised linear_start linear_end cosine_s given_betas original_elbo_weight v_posterior l_simple_weight "
    "conditioning_key parameterization use_positional_encodings learn_logvar logvar_init first_stage_config "
    "cond_stage_config num_timesteps_cond cond_stage_key cond_stage_trainable concat_mode cond_stage_forward scale_factor "
    "scale_by_std"
)
_UNET = _words(
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult "
    "conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels num_heads_upsample "
    "use_scale_shift_norm resblock_updown use_new_attention_order use_spatial_transformer transformer_depth context_dim "
    "n_embed legacy"
)
_KL = _words("ddconfig lossconfig embed_dim image_key colorize_nlabels monitor")
_VQ = [*_KL, *_words("n_embed batch_resize_range lr_g_factor remap sane_index_shape")]
# Keywords of LDM's classes by their names' last part; what is not here is handed on as it is.
KEYWORDS: dict[str, list[str]] = {
    "LatentDiffusion": _DDPM,
    "UNetModel": _UNET,
    "AutoencoderKL": _KL,
    "VQModel": _VQ,
    "VQModelInterface": _VQ,
    "IdentityFirstStage": ["vq_interface"],
}
# Of Stable Diffusion's code alone: kept where the model needs them.
STABLE_DIFFUSION = ("use_linear_in_transformer",)
# LDM's names of the classes that our configurations may name otherwise.
NAMES = {
    "LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "LatentMTDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "UNetModel": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    **{name: f"ldm.models.autoencoder.{name}" for name in ("AutoencoderKL", "VQModel", "VQModelInterface", "IdentityFirstStage")},
    **{
        name: f"ldm.modules.encoders.modules.{name}"
        for name in _words(
            "ClassEmbedder TransformerEmbedder BERTTokenizer BERTEmbedder SpatialRescaler FrozenOpenCLIPEmbedder FrozenCLIPEmbedder"
        )
    },
}  # fmt: skip


def translated(part: Any) -> Any:
    """A {target, params} and all in it, with LDM's name and keywords alone; first stages without their losses."""
    if isinstance(part, Mapping) and isinstance(part.get("target"), str):
        target = str(part["target"])
        target = NAMES.get(target.rpartition(".")[2], target)
        known = KEYWORDS.get(target.rpartition(".")[2])
        given = (part.get("params") or {}).items()
        kept = [*(known or ()), *(key for key, value in given if key in STABLE_DIFFUSION and value)]
        params = {k: translated(v) for k, v in given if known is None or k in kept}
        if "lossconfig" in (known or ()):
            params["lossconfig"] = NO_LOSS
        return {"target": target, "params": params}
    if isinstance(part, Mapping):
        return {key: translated(value) for key, value in part.items()}
    return part


def ldm_yaml(config: Mapping[str, Any], **params: Any) -> str:
    """The text of LDM's YAML file for a run's `config`, with these values of model.params. A value of None leaves the key out."""
    model = translated({key: config["model"][key] for key in ("target", "params") if key in config["model"]})
    if isinstance(
        model["params"].get("cond_stage_config"), str
    ):  # a mark, which LDM takes only where nothing of it is trained
        params = {**params, "cond_stage_trainable": None}
    for dotted, value in params.items():
        place, *inner = dotted.split("__")[::-1]
        holder = model["params"]
        for key in inner[::-1]:
            holder = holder[key]
        holder.pop(place, None)
        if value is not None:
            holder[place] = value
    rate = next(
        (config["model"][key] for key in ("base_learning_rate", "learning_rate") if key in config["model"]), 1e-4
    )
    return HEADER + OmegaConf.to_yaml(OmegaConf.create({"model": {"base_learning_rate": rate, **model}}))


def check_beside(checkpoint: Path) -> Path:
    """The YAML file beside a checkpoint to be written. Raises UserError where somebody else's is there."""
    file = checkpoint.with_suffix(".yaml")
    try:
        if file.exists() and not file.read_text(errors="replace").startswith(HEADER):
            raise UserError(f"{file}: is there and was not written by an export; move it, or name another --out")
    except OSError as error:
        raise UserError(f"{file}: can't be read ({reason(error)})") from None
    return file


def refuse_changed_network(params: Mapping[str, Any], weights: Path, code: str) -> None:
    """Raises UserError where `model.params` of the weights say a network that computes otherwise than that of `code`."""
    for key, plain in (("mt_routing", "none"), ("mt_time", "steps")):
        if (value := params.get(key, plain)) != plain:
            raise UserError(
                f"{weights}: was trained with {key} {value}, which {code} does not have: it would draw something else"
            )


def refuse_flow(params: Mapping[str, Any], weights: Path) -> None:
    """Raises UserError for a prediction or a noise schedule that neither latent-diffusion's code nor Stable Diffusion's has."""
    for key, known in (
        ("parameterization", ("eps", "x0", "v")),
        ("beta_schedule", ("linear", "cosine", "sqrt_linear", "sqrt")),
    ):
        value = params.get(key) or known[0]
        if value not in known and not (key == "beta_schedule" and params.get("given_betas") is not None):
            raise UserError(f"{weights}: was trained with {key} {value}, which latent-diffusion's code does not have")


def missing_in_ldm(params: Mapping[str, Any]) -> Iterable[str]:
    """What latent-diffusion's code has no counterpart for, in words."""
    if params.get("parameterization") not in (None, "eps", "x0"):
        yield f"parameterization {params['parameterization']}"
    unet = (params.get("unet_config") or {}).get("params") or {}
    if unet.get("use_linear_in_transformer"):
        yield "unet_config.use_linear_in_transformer"
