"""Latent-space MT-Diffusion: latent-diffusion's model and configuration keys, with modalities beside the image.

The images of an item are encoded by the same frozen first stage; from there on it is guided_mt: `multi_task_losses` in training,
`sampling.sample` in generation. z_0 is the latent of one image; what its modalities are says `tasks`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_mt.data import Batch
from guided_mt.diffusion.aggregation import Aggregation
from guided_mt.diffusion.process import GaussianDiffusion, LossType, ModelVarType
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.resample import UniformSampler
from guided_mt.diffusion.targets import TARGETS
from guided_mt.errors import UserError
from guided_mt.generation.build import bind, build_modalities, complete, respaced, track_variances
from guided_mt.modalities import Modality
from guided_mt.modalities.settings import loss_weights, roles_of, row_of, task_names, weights_names
from guided_mt.modalities.weighting.settings import Weighting
from guided_mt.networks.multi_task import MultiTask
from guided_mt.runs import checkpoint
from guided_mt.runs.config import ModelConfig
from guided_mt.training.objective import Losses, multi_task_losses

from ..runs.ldm_checkpoint import load_ldm
from ..runs.targets import arguments, instantiate
from .backbones import described
from .codec import LatentCodec
from .network import DiffusionWrapper, build_network, check_channels, check_context
from .schedules import check_betas, ddim_timesteps, make_beta_schedule
from .tasks import TaskKeys, read_tasks

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
# Values of cond_stage_key that mean the data's captions, in Stable Diffusion's and LDM's files.
TEXT_KEYS = ("txt", "caption")
LOSSES = {"l1": LossType.L1, "l2": LossType.MSE}


class LatentMTDiffusion(LatentCodec):
    """LDM's `LatentDiffusion` (its keywords and state-dict names) as a multi-task model.

    mt_tasks: the modalities, see `tasks`. mt_sides: names of the images of an item in the order of the data, where there are
    several: the first is the image, each other one a modality; two of them without mt_tasks are the short form of a pair.
    mt_swap_prob: how often another side than the first is z_0 and the first the modality in its place, shared by them, or
    {side: share}; between 0 and 1 the network is told which by a class embedding, and one network translates every way.
    mt_variant, mt_weights, mt_loss_weight, mt_given_prob, mt_drop_prob, mt_context_dim: as in guided_mt (docs/method.md, section
    3); from mt_timestep_weights on: what the terms weigh and which channels compute (section 7). mt_time: what the network is told
    of time (section 6.2). The rest are LDM's; those that only log or that no released model uses are accepted at their defaults.
    How it is trained is in training.latent_diffusion. Raises UserError for settings that contradict each other.
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
        mt_tasks: Mapping[str, Any] | None = None,
        mt_sides: Sequence[str] = (),
        mt_variant: str = "any",
        mt_weights: str = "paper",
        mt_loss_weight: float = 0.1,
        mt_given_prob: float = 0.5,
        mt_drop_prob: float = 0.0,
        mt_swap_prob: float | Mapping[str, float] = 0.0,
        mt_context_dim: int = -1,
        mt_timestep_weights: str = "uniform",
        mt_task_weighting: str = "fixed",
        mt_task_weighting_interval: int = 25,
        mt_timestep_intervals: int = 5,
        mt_interval_rule: str = "uniform",
        mt_routing: str = "none",
        mt_routing_alpha: float = 4.0,
        mt_routing_beta: float = 0.8,
        mt_time: str = "steps",
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
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise UserError(f"model.params.{name} '{value}' is none of {', '.join(map(str, known))}")
        if not 0 < scale_factor < float("inf"):
            raise UserError(f"model.params.scale_factor must be a number above 0, not {scale_factor}")
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = check_betas(given_betas, "model.params.given_betas")
        keys = TaskKeys(
            mt_tasks,
            mt_sides,
            mt_variant,
            mt_weights,
            mt_loss_weight,
            mt_given_prob,
            mt_drop_prob,
            mt_swap_prob,
            mt_context_dim,
            mt_timestep_weights,
            mt_task_weighting,
            mt_task_weighting_interval,
            mt_timestep_intervals,
            mt_interval_rule,
            mt_routing,
            mt_routing_alpha,
            mt_routing_beta,
            mt_time,
        )
        network_read = described(unet_config)
        self.config = config = read_tasks(keys, precision=network_read.precision)
        complete(config)
        self.roles, self.modality_names, self.loss_weight = roles_of(config), task_names(config), loss_weights(config)
        self.sides = self.roles.sides if self.roles.slots else ()
        self.channels, self.size, self.l_simple_weight = channels, image_size, l_simple_weight
        self.cond_stage_key, self.first_stage_key = cond_stage_key, first_stage_key
        self.use_ema = use_ema
        self.scheduler_config = scheduler_config

        # LDM's order of defaults: no condition wins over everything else.
        key = conditioning_key or ("concat" if concat_mode else "crossattn")
        self.conditioning_key = None if cond_stage_config == UNCONDITIONAL else key
        if mt_time != "steps" and self.conditioning_key in ("concat", "hybrid"):
            raise UserError(
                f"model.params.mt_time {mt_time}: the network would see what conditioning_key {self.conditioning_key} puts beside "
                "the latents on the straight path too; take crossattn or adm, or mt_time steps"
            )
        try:
            self.diffusion = GaussianDiffusion(
                betas=betas,
                model_mean_type=parameterization,
                # LDM's v_posterior = 0, and what ADM and DiT learn
                model_var_type=ModelVarType.LEARNED_RANGE if network_read.learn_sigma else ModelVarType.FIXED_SMALL,
                loss_type=LOSSES[loss_type],
                aggregation=Aggregation.from_weights(weights_names(config), betas),
            )
        except ValueError as error:
            raise UserError(f"model.params: {error}") from None
        stages: dict[str, Any] = {"first_stage_config": first_stage_config}
        if cond_stage_config not in (FIRST_STAGE, UNCONDITIONAL):
            stages["cond_stage_config"] = cond_stage_config
        # What is wrong there is told before the network is built, which can take minutes.
        for name, stage in stages.items():
            arguments(stage, f"model.params.{name}")
        network = build_network(network_read, config, self.diffusion, self)
        self.model = DiffusionWrapper(network, self.conditioning_key)
        self._add_first_stage(first_stage_config)
        if cond_stage_config not in (FIRST_STAGE, UNCONDITIONAL):
            self.cond_stage_model = instantiate(cond_stage_config, "model.params.cond_stage_config")
            self.cond_stage_model.requires_grad_(cond_stage_trainable)
            check_context(self.cond_stage_model, network_read.context_dim, self.conditioning_key)
        check_channels(
            network, network_read.learn_sigma, self.first_stage_model.embed_dim, channels, self.conditioning_key
        )
        self._check_classes()
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        self.scale_known = not scale_by_std

        config[ModelConfig].image_size = (
            image_size * self.first_stage_model.downsampling
        )  # in pixels, as modalities ask
        self.modalities: dict[str, Modality] = build_modalities(config, space=self)
        track_variances(network, config, self.modalities)
        self.bind()
        if mt_drop_prob == 1:
            network.freeze_context()
        if ckpt_path is not None:
            self.load_ldm(Path(ckpt_path), ignore_keys, only_unet=load_only_unet)

    @property
    def network(self) -> MultiTask:
        """The network with its heads; LDM's name for it is `model.diffusion_model`."""
        return self.model.diffusion_model

    def bind(self, role: int = 0) -> None:
        """Let the modalities know of the network as it is by now, and of their heads' variances in `role`."""
        bind(self.modalities, self.config, self.network, role)

    def respaced(self, timestep_respacing: str = "", sampler: str = "ddim") -> GaussianDiffusion:
        """The process on fewer timesteps: as guided_mt's `timestep_respacing`, or "ldmN" for LDM's N DDIM steps.

        The last of these ends at abar_0, as LDM's, where the sampler is DDIM; other rules go on to z_0.
        Raises UserError where the counts can't be had.
        """
        full = self.diffusion
        if timestep_respacing.startswith("ldm") and timestep_respacing[3:].isdecimal():
            kept = ddim_timesteps(int(timestep_respacing[3:]), full.num_timesteps)
            final = float(full.alphas_cumprod[0]) if sampler == "ddim" else 1.0
            return full.respace(kept, final_alpha_cumprod=final)
        return respaced(full, timestep_respacing)

    def to_fast_layout(self) -> LatentMTDiffusion:
        """Network and first stage in the device's fastest memory format; call after moving. Returns self."""
        self.network.to_fast_layout()
        self.first_stage_model.to_fast_layout()
        return self

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms, the image's first: `mse` or `l1`, `vb` of learned variances, then one for each modality."""
        error = "l1" if self.diffusion.loss_type is LossType.L1 else "mse"
        learned = self.diffusion.model_var_type is ModelVarType.LEARNED_RANGE
        return [error, *(["vb"] if learned else []), *self.modality_names]

    @property
    def classes_told(self) -> int:
        """Of how many classes the network is told each image's, beside conditioning stages; 0: it is told none. One with a null
        class is told where cond_stage_key is class_label, and else sees the null class."""
        untold = self.network.has_null_class and self.cond_stage_key != "class_label"
        return 0 if self.roles.told or untold else self.network.num_classes or 0

    def _check_classes(self) -> None:
        """Raises UserError where the network is told the class that a modality is to predict."""
        predicted = [name for name in self.modality_names if row_of(self.config, name).needs_labels]
        if predicted and self.conditioning_key is None and self.classes_told:
            raise UserError(
                f"model.params: cond_stage_key class_label tells the network the class that mt_tasks.{predicted[0]} is to predict; "
                "leave one of them out"
            )

    # ------------------------------------------------------------ losses

    def losses(
        self, batch: Batch, streams: SampleStreams, t: Tensor | None = None, weighting: Weighting | None = None
    ) -> tuple[Losses, Tensor]:
        """(losses, timesteps [B]) of a batch: Algorithm 2 on its latents. t: these timesteps instead of drawn ones.

        weighting: of the terms; None: eq. 6 as it stands.
        """
        images, kwargs, config = self.images(batch, streams), self._conditions(batch), self.config
        role = self.roles.draw(streams) if self.roles.slots else None
        drawn, _ = UniformSampler(self.diffusion.num_timesteps)(streams.uniform())
        t = drawn if t is None else t
        noise = streams.normal(*images.x_start.shape[1:])
        losses = multi_task_losses(
            self.model,
            self.diffusion,
            self.modalities,
            images,
            t,
            noise,
            streams,
            variant=self.network.variant,
            loss_weight=self.loss_weight,
            drop_prob=config.mt_drop_prob,
            given_prob=config.mt_given_prob,
            model_kwargs=kwargs,
            roles=self.roles,
            role=role,
            weighting=weighting,
        )
        return losses, t

    def _conditions(self, batch: Batch) -> dict[str, Tensor]:
        """LDM's own condition of a training batch. Raises UserError for a `cond_stage_key` that the data don't have."""
        if self.conditioning_key is None and not self.classes_told:
            return {}
        if self.conditioning_key is None and batch.labels is not None:
            return {"y": batch.labels}
        if self.cond_stage_key == "class_label" and batch.labels is not None:
            if self.conditioning_key == "adm":
                return {"y": batch.labels}
            return {"c_crossattn": self.cond_stage_model({self.cond_stage_model.key: batch.labels})}
        if self.cond_stage_key in TEXT_KEYS and batch.captions is not None:
            found = {"c_crossattn": self.cond_stage_model(batch.captions)}
            # Seen without any condition, a sample has the empty text, as when it is drawn.
            if self.config.mt_drop_prob > 0:
                found["c_unconditional"] = self.cond_stage_model([""])
            return found
        raise UserError(
            f"model.params.cond_stage_key '{self.cond_stage_key}': training data of this kind aren't supported, only class_label "
            f"and captions ({', '.join(TEXT_KEYS)}); "
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
