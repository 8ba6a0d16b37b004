"""Latent-space MT-Diffusion: latent-diffusion's model and configuration keys, with a second image as a modality.

Both images of a pair are encoded by the same frozen first stage; from there on it is guided_mt: `multi_task_losses` in training,
`sampling.sample` in generation. z_0 is the latent of one side, the modality `paired` that of the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_mt.data import Batch
from guided_mt.diffusion.aggregation import WEIGHTS, Aggregation
from guided_mt.diffusion.process import GaussianDiffusion, LossType, ModelVarType
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.resample import UniformSampler
from guided_mt.diffusion.targets import TARGETS
from guided_mt.errors import UserError
from guided_mt.generation.drawing import respaced
from guided_mt.modalities import Images
from guided_mt.networks.model import VARIANTS, MTModel
from guided_mt.runs import checkpoint
from guided_mt.training.objective import Losses, multi_task_losses

from ..runs.ldm_checkpoint import load_ldm
from ..runs.targets import instantiate
from .codec import LatentCodec
from .modalities import PAIRED, SWAPPED, PairedLatent
from .network import DiffusionWrapper, build_network, check_channels
from .schedules import check_betas, ddim_timesteps, make_beta_schedule

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
LOSSES = {"l1": LossType.L1, "l2": LossType.MSE}


class LatentMTDiffusion(LatentCodec):
    """LDM's `LatentDiffusion` (its keywords and state-dict names) as a multi-task model of image pairs.

    mt_sides: names of the two images of a pair, or none for a plain LDM. mt_swap_prob: how often the second side is z_0 and the
    first the modality; between 0 and 1 the network is told which by a class embedding, and one network translates both ways.
    mt_variant, mt_weights, mt_loss_weight, mt_given_prob, mt_drop_prob: as in guided_mt (docs/method.md, section 3). The rest are
    LDM's; those that only log or that no released model uses are accepted at their defaults. How it is trained is in
    training.latent_diffusion. Raises UserError for settings that contradict each other.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        unet_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str = UNCONDITIONAL,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        *,
        mt_sides: Sequence[str] = (),
        mt_variant: str = "any",
        mt_weights: str = "paper",
        mt_loss_weight: float = 0.1,
        mt_given_prob: float = 0.5,
        mt_drop_prob: float = 0.0,
        mt_swap_prob: float = 0.0,
    ):
        super().__init__()
        refused = {
            "original_elbo_weight": original_elbo_weight != 0,
            "v_posterior": v_posterior != 0,
            "use_positional_encodings": use_positional_encodings,
            "learn_logvar": learn_logvar,
            "num_timesteps_cond": num_timesteps_cond not in (None, 1),
            "cond_stage_forward": cond_stage_forward is not None,
        }
        for name, wrong in refused.items():
            if wrong:
                raise UserError(f"model.params.{name}: only its default is supported; leave it out")
        choices: dict[str, tuple[Any, Collection[Any]]] = {
            "loss_type": (loss_type, LOSSES),
            "parameterization": (parameterization, TARGETS),
            "conditioning_key": (conditioning_key, DiffusionWrapper.KEYS),
            "mt_variant": (mt_variant, VARIANTS),
            "mt_weights": (mt_weights, WEIGHTS),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise UserError(f"model.params.{name} '{value}' is none of {', '.join(map(str, known))}")
        shares = {"mt_given_prob": mt_given_prob, "mt_drop_prob": mt_drop_prob, "mt_swap_prob": mt_swap_prob}
        _check_numbers(mt_sides, shares, mt_loss_weight, scale_factor)
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = check_betas(given_betas, "model.params.given_betas")
        self.sides, self.swap_prob = tuple(mt_sides), mt_swap_prob if mt_sides else 0.0
        self.both_roles = 0 < self.swap_prob < 1
        self.loss_weight, self.given_prob, self.drop_prob = mt_loss_weight, mt_given_prob, mt_drop_prob
        self.channels, self.image_size, self.l_simple_weight = channels, image_size, l_simple_weight
        self.cond_stage_key, self.first_stage_key = cond_stage_key, first_stage_key
        self.use_ema = use_ema
        self.scheduler_config = scheduler_config

        # LDM's order of defaults: no condition wins over everything else.
        key = conditioning_key or ("concat" if concat_mode else "crossattn")
        self.conditioning_key = None if cond_stage_config == UNCONDITIONAL else key
        self.mt_weights = mt_weights
        network = build_network(
            unet_config,
            channels,
            paired=bool(self.sides),
            both_roles=self.both_roles,
            variant=mt_variant,
            timesteps=len(betas),
        )
        self.model = DiffusionWrapper(network, self.conditioning_key)
        self._add_first_stage(first_stage_config)
        if cond_stage_config not in (FIRST_STAGE, UNCONDITIONAL):
            self.cond_stage_model = instantiate(cond_stage_config, "model.params.cond_stage_config")
            self.cond_stage_model.requires_grad_(cond_stage_trainable)
        check_channels(network, self.first_stage_model.embed_dim, channels, self.conditioning_key)
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        self.scale_known = not scale_by_std

        self.diffusion = GaussianDiffusion(
            betas=betas,
            model_mean_type=parameterization,
            model_var_type=ModelVarType.FIXED_SMALL,  # LDM's v_posterior = 0
            loss_type=LOSSES[loss_type],
            aggregation=Aggregation.from_weights(dict.fromkeys(self.modality_names, mt_weights), betas),
        )
        if ckpt_path is not None:
            self.load_ldm(Path(ckpt_path), ignore_keys, only_unet=load_only_unet)

    @property
    def network(self) -> MTModel:
        return self.model.diffusion_model

    @property
    def modality_names(self) -> list[str]:
        return [PAIRED] if self.sides else []

    def modalities(self, role: int = 0) -> dict[str, PairedLatent]:
        """{name: modality}, with the head's tracked variance in this role where it was trained."""
        tracked: Any = self.network.head_variance
        found = {}
        for name in self.modality_names:
            own = tracked[SWAPPED] if role == 1 and SWAPPED in tracked else tracked[name]
            found[name] = PairedLatent(self.channels, own.value() if bool(own.error_count.any()) else None)
        return found

    def respaced(self, timestep_respacing: str = "") -> GaussianDiffusion:
        """The process on fewer timesteps: as guided_mt's `timestep_respacing`, or "ldmN" for LDM's N DDIM steps.

        Raises UserError where the counts can't be had.
        """
        if timestep_respacing.startswith("ldm") and timestep_respacing[3:].isdecimal():
            return self.diffusion.respace(ddim_timesteps(int(timestep_respacing[3:]), self.diffusion.num_timesteps))
        return respaced(self.diffusion, timestep_respacing)

    def to_fast_layout(self) -> LatentMTDiffusion:
        """Network and first stage in the device's fastest memory format; call after moving. Returns self."""
        self.network.to_fast_layout()
        self.first_stage_model.to_fast_layout()
        return self

    @property
    def terms(self) -> list[str]:
        return ["l1" if self.diffusion.loss_type is LossType.L1 else "mse", *self.modality_names]

    # ------------------------------------------------------------ losses

    def losses(self, batch: Batch, streams: SampleStreams, t: Tensor | None = None) -> tuple[Losses, Tensor, Tensor]:
        """(losses, timesteps [B], roles [B]) of a batch: Algorithm 2 on its latents. t: these timesteps instead of drawn ones."""
        first, *others = self.latents(batch, streams)
        kwargs = self._conditions(batch)
        loaded = {}
        swap = torch.zeros_like(batch.positions, dtype=torch.bool)
        if others:
            swap = streams.uniform() < self.swap_prob  # (B,)
            chosen = swap.view(-1, 1, 1, 1)
            first, other = torch.where(chosen, others[0], first), torch.where(chosen, first, others[0])
            loaded[PAIRED] = other
            if self.both_roles:
                kwargs["y"] = swap.long()
        drawn, _ = UniformSampler(self.diffusion.num_timesteps)(streams.uniform())
        t = drawn if t is None else t
        noise = streams.normal(*first.shape[1:])
        modalities = {name: PairedLatent(self.channels) for name in self.modality_names}
        losses = multi_task_losses(
            self.model,
            self.diffusion,
            modalities,
            Images(first, batch.labels, loaded),
            t,
            noise,
            streams,
            variant=self.network.variant,
            loss_weight=self.loss_weight,
            drop_prob=self.drop_prob,
            given_prob=self.given_prob,
            model_kwargs=kwargs,
        )
        return losses, t, swap.long()

    def _conditions(self, batch: Batch) -> dict[str, Tensor]:
        """LDM's own condition of a training batch. Raises UserError for a `cond_stage_key` that the data don't have."""
        if self.conditioning_key is None:
            return {}
        if self.cond_stage_key == "class_label" and batch.labels is not None:
            if self.conditioning_key == "adm":
                return {"y": batch.labels}
            return {"c_crossattn": self.cond_stage_model({self.cond_stage_model.key: batch.labels})}
        raise UserError(
            f"model.params.cond_stage_key '{self.cond_stage_key}': training data of this kind aren't supported, only class_label; "
            "such a model can be loaded and sampled from with its condition given"
        )

    # ------------------------------------------------------------ checkpoints

    def load_ldm(
        self, path: Path, ignore_keys: Sequence[str] = (), *, only_unet: bool = False, ema: bool = False
    ) -> None:
        """Load LDM's `.ckpt` (or .safetensors of the same entries, or a run's folder: its averaged weights); heads and condition
        inputs may be new. ema: the averages where the file has some, which LDM samples with. Raises UserError."""
        file = checkpoint.find_weights(path, flag="model.params.ckpt_path")
        found = load_ldm(self, file, ignore_keys, only_unet=only_unet, ema=ema)
        self.scale_known |= found.scale_factor is not None


def _check_numbers(sides: Sequence[str], shares: Mapping[str, float], loss_weight: float, scale_factor: float) -> None:
    """Raises UserError naming the key of model.params that is out of its range. shares: {key: value in 0..1}."""
    if len(sides) not in (0, 2) or len(set(sides)) != len(sides):
        raise UserError(f"model.params.mt_sides {list(sides)}: name the two sides of a pair, or none")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"model.params.{name} must be between 0 and 1, not {value}")
    if not loss_weight >= 0:
        raise UserError(f"model.params.mt_loss_weight must be at least 0, not {loss_weight}")
    if not 0 < scale_factor < float("inf"):
        raise UserError(f"model.params.scale_factor must be a number above 0, not {scale_factor}")
