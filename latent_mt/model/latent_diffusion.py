"""Latent-space MT-Diffusion: latent-diffusion's model and configuration keys, with a second image as a modality.

Both images of a pair are encoded by the same frozen first stage; from there on it is guided_mt: `multi_task_losses` in training,
`sampling.sample` in generation. z_0 is the latent of one side, the modality `paired` that of the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guided_mt.data import Batch
from guided_mt.data.images import from_uint8
from guided_mt.diffusion.aggregation import WEIGHTS, Aggregation
from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.process import GaussianDiffusion, LossType, ModelVarType
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.resample import UniformSampler
from guided_mt.diffusion.respacing import kept_timesteps, respace
from guided_mt.diffusion.targets import ModelMeanType
from guided_mt.errors import UserError
from guided_mt.modalities import Images
from guided_mt.networks.heads import HeadVariance, ImageHead
from guided_mt.networks.model import VARIANTS, MTModel
from guided_mt.runs import checkpoint
from guided_mt.training.averages import QUARTILES, Averages
from guided_mt.training.objective import Losses, multi_task_losses
from guided_mt.training.optim import guard_step
from guided_mt.training.record import Record

from ..data.latent_cache import unpack
from ..data.validation import val_batches
from ..first_stage.autoencoder import Autoencoder
from ..runs.configuration import arguments, instantiate
from ..runs.ldm_checkpoint import load_ldm
from ..runs.trained_module import TrainedModule
from .modalities import PAIRED, PairedLatent
from .schedules import check_betas, ddim_timesteps, make_beta_schedule
from .unet import UNetModel, unet_options

FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
LOSSES = {"l1": LossType.L1, "l2": LossType.MSE}
TARGETS = {"eps": ModelMeanType.EPSILON, "x0": ModelMeanType.START_X}
SWAPPED = f"{PAIRED}_swapped"  # the head's tracked variance in role 1, where there are two
SCALE_BATCHES = 8  # on which `scale_by_std` measures
VAL_TIMESTEPS = 8  # evenly spaced, per validation image


class DiffusionWrapper(nn.Module):
    """The network with LDM's ways of conditioning (its `DiffusionWrapper`; the name gives the `diffusion_model.*` entries).

    conditioning_key: None, "concat" (channels beside z_t), "crossattn" (tokens), "hybrid" (both) or "adm" (classes).
    """

    KEYS = (None, "concat", "crossattn", "hybrid", "adm")

    def __init__(self, diffusion_model: MTModel, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in self.KEYS:
            known = ", ".join(str(key) for key in self.KEYS)
            raise UserError(f"model.params.conditioning_key '{conditioning_key}' is none of {known}")
        self.diffusion_model, self.conditioning_key = diffusion_model, conditioning_key

    def forward(
        self,
        z_t: Tensor,
        timesteps: Tensor,
        modalities: Mapping[str, Tensor],
        *,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        **options: Any,
    ) -> ModelOutput:
        """z_t [B, C, h, w], timesteps [B]; c_concat [B, C', h, w]; c_crossattn tokens [B, L, width]; options: as MTModel's."""
        # `unconditional` doubles the batch when guidance is on; LDM's conditions are the same in both halves.
        repeats = 1 if c_concat is None and c_crossattn is None else len(z_t) // len(_first(c_concat, c_crossattn))
        if c_concat is not None:
            z_t = torch.cat([z_t, c_concat.repeat(repeats, 1, 1, 1)], dim=1)
        if c_crossattn is not None:
            options["context"] = c_crossattn.repeat(repeats, 1, 1)
        if options.get("y") is not None:
            options["y"] = options["y"].repeat(len(z_t) // len(options["y"]))
        return self.diffusion_model(z_t, timesteps, modalities, **options)


def _first(*tensors: Tensor | None) -> Tensor:
    return next(x for x in tensors if x is not None)


class LatentMTDiffusion(TrainedModule):
    """LDM's `LatentDiffusion` (its keywords and state-dict names) as a multi-task model of image pairs.

    mt_sides: names of the two images of a pair, or none for a plain LDM. mt_swap_prob: how often the second side is z_0 and the
    first the modality; between 0 and 1 the network is told which by a class embedding, and one network translates both ways.
    mt_variant, mt_weights, mt_loss_weight, mt_given_prob, mt_drop_prob: as in guided_mt (DESIGN 2.3). The rest are LDM's; those
    that only log or that no released model uses are accepted at their defaults.
    Raises UserError for settings that contradict each other.
    """

    prefix = "model."

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
        for name, value, known in [
            ("loss_type", loss_type, LOSSES),
            ("parameterization", parameterization, TARGETS),
            ("conditioning_key", conditioning_key, DiffusionWrapper.KEYS),
            ("mt_variant", mt_variant, VARIANTS),
            ("mt_weights", mt_weights, WEIGHTS),
        ]:
            if value not in known:
                raise UserError(f"model.params.{name} '{value}' is none of {', '.join(map(str, known))}")
        if len(mt_sides) not in (0, 2) or len(set(mt_sides)) != len(mt_sides):
            raise UserError(f"model.params.mt_sides {list(mt_sides)}: name the two sides of a pair, or none")
        for name, value in {
            "mt_given_prob": mt_given_prob,
            "mt_drop_prob": mt_drop_prob,
            "mt_swap_prob": mt_swap_prob,
        }.items():
            if not 0 <= value <= 1:
                raise UserError(f"model.params.{name} must be between 0 and 1, not {value}")
        if not mt_loss_weight >= 0:
            raise UserError(f"model.params.mt_loss_weight must be at least 0, not {mt_loss_weight}")
        if not 0 < scale_factor < float("inf"):
            raise UserError(f"model.params.scale_factor must be a number above 0, not {scale_factor}")
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
        if scheduler_config is not None:
            self.schedule = instantiate(scheduler_config, "model.params.scheduler_config")

        # LDM's order of defaults: no condition wins over everything else.
        key = conditioning_key or ("concat" if concat_mode else "crossattn")
        self.conditioning_key = None if cond_stage_config == UNCONDITIONAL else key
        self.mt_weights = mt_weights
        self.model = DiffusionWrapper(self._network(unet_config, mt_variant, len(betas)), self.conditioning_key)
        self.first_stage_model = instantiate(first_stage_config, "model.params.first_stage_config")
        if not isinstance(self.first_stage_model, Autoencoder):
            raise UserError(f"model.params.first_stage_config: {first_stage_config['target']} is no first stage")
        self.first_stage_model.requires_grad_(False).eval()
        if cond_stage_config not in (FIRST_STAGE, UNCONDITIONAL):
            self.cond_stage_model = instantiate(cond_stage_config, "model.params.cond_stage_config")
            self.cond_stage_model.requires_grad_(cond_stage_trainable)
        self._check_channels()
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        self.scale_known = not scale_by_std

        self.diffusion = GaussianDiffusion(
            betas=betas,
            model_mean_type=TARGETS[parameterization],
            model_var_type=ModelVarType.FIXED_SMALL,  # LDM's v_posterior = 0
            loss_type=LOSSES[loss_type],
            aggregation=Aggregation.from_weights(dict.fromkeys(self.modality_names, mt_weights), betas),
        )
        self.fused = True
        if ckpt_path is not None:
            self.load_ldm(Path(ckpt_path), ignore_keys, only_unet=load_only_unet)

    def _network(self, unet_config: Mapping[str, Any], variant: str, timesteps: int) -> MTModel:
        cls, keywords = arguments(unet_config, "model.params.unet_config")
        if cls is not UNetModel:
            raise UserError(f"model.params.unet_config: {unet_config['target']} is no U-Net")
        if self.both_roles:
            if keywords.get("num_classes") is not None:
                raise UserError(
                    "model.params.unet_config.num_classes: taken by mt_swap_prob, which tells the role as a class"
                )
            keywords["num_classes"] = 2
        options = unet_options(**keywords)
        paired = bool(self.sides)
        network = MTModel(
            heads={PAIRED: lambda unet: ImageHead(unet, self.channels)} if paired else {},
            image_inputs={PAIRED: self.channels} if paired else {},
            tracked=(PAIRED,) if paired else (),
            variant=variant if paired else "U",
            num_timesteps=timesteps,
            conditioned=options["context_dim"] is not None,
            **options,
        )
        if self.both_roles and variant == "U":
            # Own head divides by the head's squared error, which is larger in the direction that leaves more open.
            network.head_variance[SWAPPED] = HeadVariance(timesteps)
        return network

    def _check_channels(self) -> None:
        """UserError where first stage, U-Net and `channels` don't fit."""
        latent, unet = self.first_stage_model.embed_dim, self.network
        if latent is not None and latent != self.channels:
            raise UserError(
                f"the first stage makes latents of {latent} channels (embed_dim), but model.params.channels is {self.channels}"
            )
        extra = unet.in_channels - self.channels
        if (
            unet.out_channels != self.channels
            or extra < 0
            or (extra and self.conditioning_key not in ("concat", "hybrid"))
        ):
            raise UserError(
                f"unet_config: in_channels {unet.in_channels} and out_channels {unet.out_channels} don't fit latents of "
                f"{self.channels} channels (in_channels may be more only for a concatenated condition)"
            )

    @property
    def averaged(self) -> nn.Module:
        return self.model

    @property
    def ema_rates(self) -> list[str]:
        return super().ema_rates if self.use_ema else []

    @property
    def network(self) -> MTModel:
        return self.model.diffusion_model

    @property
    def modality_names(self) -> list[str]:
        return [PAIRED] if self.sides else []

    def modalities(self, role: int = 0) -> dict[str, PairedLatent]:
        """{name: modality}, with the head's tracked variance in this role where it was trained."""
        tracked = self.network.head_variance
        found = {}
        for name in self.modality_names:
            own = tracked[SWAPPED] if role == 1 and SWAPPED in tracked else tracked[name]
            found[name] = PairedLatent(self.channels, own.value() if bool(own.error_count.any()) else None)
        return found

    def respaced(self, timestep_respacing: str = "") -> GaussianDiffusion:
        """The process on fewer timesteps: as guided_mt's `timestep_respacing`, or "ldmN" for LDM's N DDIM steps."""
        if timestep_respacing.startswith("ldm") and timestep_respacing[3:].isdecimal():
            return respace(self.diffusion, ddim_timesteps(int(timestep_respacing[3:]), self.diffusion.num_timesteps))
        return respace(self.diffusion, kept_timesteps(self.diffusion, timestep_respacing))

    def to_fast_layout(self) -> LatentMTDiffusion:
        """Network and first stage in the device's fastest memory format; call after moving. Returns self."""
        self.network.to_fast_layout()
        self.first_stage_model.to_fast_layout()
        return self

    # ------------------------------------------------------------ first stage

    def encode_images(self, images: Tensor, streams: SampleStreams | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w], scaled. streams: draw from the posterior; None: its mean."""
        with self._exact():
            mean, logvar = self.first_stage_model.encode_moments(images)
            return self.scale_factor * _posterior(mean, logvar, streams)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] in [-1, 1]."""
        with self._exact():
            return self.first_stage_model.decode(z / self.scale_factor).clamp(-1, 1)

    @contextlib.contextmanager
    def _exact(self):
        with torch.no_grad(), torch.autocast(self.scale_factor.device.type, enabled=False):
            yield

    def latents(self, batch: Batch, streams: SampleStreams) -> list[Tensor]:
        """The batch's sides as scaled latents [B, C, h, w], mirrored alike; from pixels uint8 [B, 3 per side, H, W], or from a
        cache float [B, sides x mirrorings x moments x C, h, w]."""
        flip = (streams.uniform() < 0.5) & self.random_flip
        count = max(1, len(self.sides))
        if batch.images.dtype == torch.uint8:
            images = from_uint8(batch.images)
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
            return [self.encode_images(side, streams) for side in images.chunk(count, dim=1)]
        mirrored = flip.long()
        rows = torch.arange(len(flip), device=flip.device)
        mean, logvar = unpack(batch.images, count, self.channels)
        means = mean[rows, :, mirrored].unbind(1)
        logvars = [None] * count if logvar is None else logvar[rows, :, mirrored].unbind(1)
        return [self.scale_factor * _posterior(m, v, streams) for m, v in zip(means, logvars, strict=True)]

    # ------------------------------------------------------------ training

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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.dropout and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.seed_dropout()
        streams = SampleStreams(self.run.seed, batch.positions, device=batch.positions.device)
        losses, t, role = self.losses(batch, streams)
        values = {"loss": losses.loss, **{name: losses.terms[name] for name in self.terms}, "role": role.float()}
        record = Record(t, {name: value.detach() for name, value in values.items()}, losses.predicted)
        self._track(record.gathered(self.processes))
        return self.l_simple_weight * losses.loss.mean()

    @torch.no_grad()
    def _track(self, record: Record) -> None:
        self.averages.add(record)
        tracked = self.network.head_variance
        for name in self.modality_names:
            error, seen = record.values[name], record.counts(name)
            if SWAPPED in tracked:
                role = record.values["role"]
                tracked[SWAPPED].update(record.timesteps, error, seen * role)
                seen = seen * (1 - role)
            tracked[name].update(record.timesteps, error, seen)

    @property
    def terms(self) -> list[str]:
        return ["l1" if self.diffusion.loss_type is LossType.L1 else "mse", *self.modality_names]

    @property
    def dropout(self) -> bool:
        return any(module.p > 0 for module in self.network.modules() if isinstance(module, nn.Dropout))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        # The scaler of 16-mixed wants to unscale the gradients itself.
        self.fused = self.trainer.precision != "16-mixed"
        return torch.optim.AdamW(parameters, lr=self.base_rate, weight_decay=self.run.weight_decay, fused=self.fused)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rate(self.steps_done)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.fused:
            norm, bad = guard_step(optimizer, grads, self.run.grad_clip)
        else:  # the scaler has unscaled the gradients, and it is the scaler that skips
            norm = torch.nn.utils.get_total_norm(grads, foreach=True)
            bad = (~torch.isfinite(norm)).float()
            if self.run.grad_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.run.grad_clip, norm, foreach=True)
        self.count(bad)
        self.averages.add_scalars({"grad_norm": norm})
        self.steps_done += 1

    # ------------------------------------------------------------ the run (see trained_module.TrainedModule)

    def prepare(self, data: Any, resumed: bool) -> None:
        precisions = {"bf16-mixed": "bf16", "16-mixed": "fp16"}
        self.network.precision = precisions.get(self.trainer.precision, self.network.precision)
        self.to_fast_layout()
        super().prepare(data, resumed)
        self.first_stage_model.eval()
        self.averages = Averages(["loss", *self.terms], self.diffusion.num_timesteps, self.device)
        if not self.scale_known and not resumed:
            self._measure_scale(data)

    def _measure_scale(self, data: Any) -> None:
        """LDM's `scale_by_std`: 1 / the latents' standard deviation, here over several batches and before the first step."""
        self.scale_factor.fill_(1.0)
        stream = data.stream(
            seed=self.run.seed, rank=0, world_size=1, start_step=0, total_steps=SCALE_BATCHES, accumulate=1
        )
        sums = torch.zeros(3, device=self.device, dtype=torch.float64)
        with stream:
            for batch in stream:
                batch = batch.to(self.device)
                streams = SampleStreams(self.run.seed, batch.positions, device=self.device)
                for z in self.latents(batch, streams):
                    z = z.double()
                    sums += torch.stack([torch.ones_like(z).sum(), z.sum(), z.square().sum()])
        count, total, squares = sums.unbind()
        self.scale_factor.fill_(1 / (squares / count - (total / count) ** 2).sqrt())
        self.scale_known = True

    def columns(self) -> list[str]:
        names = ["loss", *self.terms]
        quartiles = [f"{name}_q{q}" for name in names for q in range(QUARTILES)]
        val = [f"val_{name}" for name in names] if self.run.val_interval else []
        return [*names, *val, "grad_norm", "lr", "skipped_steps", *quartiles]

    def report_row(self) -> dict[str, float]:
        return {**self.averages.pop(), "lr": self.rate(self.steps_done - 1)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean losses of the averaged weights on the validation split, at evenly spaced timesteps and with fixed noise."""
        totals = torch.zeros(2, 1 + len(self.terms), device=self.device)
        flip, self.random_flip = self.random_flip, False
        with self.with_averages():
            for batch in val_batches(self.data):
                batch = batch.to(self.device)
                for k in range(VAL_TIMESTEPS):
                    t = torch.full_like(batch.positions, int((k + 0.5) * self.diffusion.num_timesteps / VAL_TIMESTEPS))
                    losses, *_ = self.losses(batch, SampleStreams(batch.positions, 1 + k, device=self.device), t)
                    values = torch.stack([losses.loss, *(losses.terms[name] for name in self.terms)])
                    kept = torch.stack(
                        [losses.predicted.get(n, torch.ones_like(losses.loss)) for n in ("loss", *self.terms)]
                    )
                    totals += torch.stack([(values * kept).sum(1), kept.sum(1)])
        self.random_flip = flip
        means = (totals[0] / totals[1]).tolist()
        return {f"val_{name}": mean for name, mean in zip(["loss", *self.terms], means, strict=True)}

    def preview(self) -> np.ndarray | None:
        from .generate import preview_grid

        with self.with_averages():
            return preview_grid(self, self.data)

    # ------------------------------------------------------------ checkpoints

    def weights(self) -> dict[str, dict[str, Tensor]]:
        state = self.state_dict()
        averages = {
            f"ema_{rate}": {**state, **{f"model.{k}": v for k, v in self.ema.state_dict(rate, self.model).items()}}
            for rate in self.ema.averages
        }
        return {"model": state, **averages}

    def load_weights_of(self, folder: Path) -> None:
        checkpoint.load_weights(self, folder / "model.safetensors")
        self.scale_known = True
        self.load_averages(folder)

    def load_ldm(
        self, path: Path, ignore_keys: Sequence[str] = (), *, only_unet: bool = False, ema: bool = False
    ) -> None:
        """Load LDM's `.ckpt` (or .safetensors of the same entries, or a run's folder: its averaged weights); heads and condition
        inputs may be new. ema: the averages where the file has some, which LDM samples with. Raises UserError."""
        file = checkpoint.find_weights(path, flag="model.params.ckpt_path")
        found = load_ldm(self, file, ignore_keys, only_unet=only_unet, ema=ema)
        self.scale_known |= found.scale_factor is not None

    def run_state(self) -> dict[str, Any]:
        return {"averages": self.averages.state_dict()}

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        self.averages.load_state_dict(state["averages"])


def _posterior(mean: Tensor, logvar: Tensor | None, streams: SampleStreams | None) -> Tensor:
    """A draw from N(mean, exp(logvar)), or the mean where there is no variance or no source of noise."""
    if logvar is None or streams is None:
        return mean
    return mean + torch.exp(0.5 * logvar) * streams.normal(*mean.shape[1:])
