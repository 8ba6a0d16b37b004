"""Gaussian diffusion with ADM's process, losses and names, and the frame of MT-Diffusion around it.

In the frame y_t = z_t - s_t the chain of MT-Diffusion *is* DDPM's (docs/method.md, section 2.2), so every formula below is the
published one: Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (IDDPM: learned variances, hybrid loss), Dhariwal and Nichol 2021
(ADM: guidance), Song et al. 2021 (DDIM). Here `x_t` is the state in the frame; only `training_losses` and `calc_bpd_loop` put
it into z-space for the network, by adding `aggregation.shift`.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adm_loops import ADMLoops
from .aggregation import Aggregation
from .likelihood import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .network import ModelOutput, as_denoising, as_output
from .schedules import refuse_pure_noise, with_signal
from .targets import TARGETS, ModelMeanType
from .weighting import timestep_weights as weights_of


class ModelVarType(enum.Enum):
    """Where the variance of a step comes from: the network, or one of the two ends of the range that DDPM allows."""

    LEARNED = "learned"
    FIXED_SMALL = "fixed_small"
    FIXED_LARGE = "fixed_large"
    LEARNED_RANGE = "learned_range"


class LossType(enum.Enum):
    """The loss of the image, under guided-diffusion's names."""

    MSE = "mse"
    L1 = "l1"  # latent-diffusion's loss_type l1: absolute errors
    RESCALED_MSE = "rescaled_mse"  # the bound of the hybrid loss scaled to steps of 1/1000
    KL = "kl"
    RESCALED_KL = "rescaled_kl"  # an unbiased estimate of the whole bound

    @property
    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself and not a squared or absolute error."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(ADMLoops):
    """ADM's diffusion process for betas [T], carrying the Aggregation of the same timesteps.

    timestep_map [T]: the timestep that the network is told, one of 0..original_num_steps-1; identity unless respaced.
    final_alpha_cumprod: the abar at which DDIM's last step ends, 1 unless respaced to another. model_mean_type: what the network
    predicts, a name of `targets.TARGETS`. timestep_weights: one of `weighting.TIMESTEP_WEIGHTS`. All arrays are float64 numpy [T],
    with ADM's names. Raises ValueError for betas outside (0, 1], an unknown name, timestep weights where no squared error is
    weighted, and eps on a schedule that ends in pure noise.
    """

    final_alpha_cumprod = 1.0

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: str = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.FIXED_LARGE,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        aggregation: Aggregation | None = None,
        timestep_map: np.ndarray | None = None,
        original_num_steps: int | None = None,
        timestep_weights: str = "uniform",
    ):
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps, self.timestep_weights = rescale_timesteps, timestep_weights
        if model_mean_type not in TARGETS:
            raise ValueError(f"unknown prediction '{model_mean_type}'; choose from {', '.join(TARGETS)}")
        self.target = TARGETS[model_mean_type]
        if timestep_weights != "uniform" and (loss_type.is_vb or self.target.eps_error is None):
            raise ValueError(
                f"timestep weights '{timestep_weights}' weigh a squared error of eps, x_0 or v; this loss has none"
            )
        self.original_num_steps = original_num_steps or len(betas)
        map_of = np.arange(len(betas)) if timestep_map is None else np.asarray(timestep_map, dtype=np.int64)
        self._tabulate(betas, aggregation or Aggregation(), map_of)

    def respace(self, timesteps: Sequence[int], *, final_alpha_cumprod: float = 1.0) -> GaussianDiffusion:
        """The process that keeps abar_t and alpha-tilde_t at `timesteps` (local indices), so all kept marginals; nothing else
        changes (docs/method.md, section 2.3), but for `final_alpha_cumprod`."""
        kept = sorted(set(timesteps))
        abar = self.alphas_cumprod[kept]
        respaced = copy.copy(self)
        respaced.final_alpha_cumprod = final_alpha_cumprod
        respaced._tabulate(
            1 - abar / np.append(1.0, abar[:-1]), self.aggregation.respace(kept), self.timestep_map[kept]
        )
        return respaced

    def _tabulate(self, betas: np.ndarray, aggregation: Aggregation, timestep_map: np.ndarray) -> None:
        """Everything that follows from the timesteps."""
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0).all() and (betas <= 1).all() and (betas[:-1] < 1).all()):
            raise ValueError("betas must be a vector of numbers in (0, 1], of which the last alone may be 1")
        self.betas, self.num_timesteps = betas, len(betas)
        self.aggregation, self.timestep_map = aggregation, timestep_map

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        if self.predicts_eps:
            refuse_pure_noise(self.alphas_cumprod)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.ddim_alphas_cumprod_prev = np.append(self.final_alpha_cumprod, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        recip = 1.0 / with_signal(
            self.alphas_cumprod
        )  # in pure noise eps = y - z_0 / sqrt(recip) is y, as it should be
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(recip), np.sqrt(recip - 1)
        # q(y_{t-1} | y_t, z_0), DDPM eq. 6 and 7. Its variance at t = 0 is 0; the clipped logarithm uses that of t = 1.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        self.log_betas = np.log(betas)
        self.large_variance = np.append(first, betas[1:])
        self.log_large_variance = np.log(self.large_variance)
        self.xstart_of_state, self.xstart_of_output = self.target.xstart_coefficients(self)
        if self.timestep_weights != "uniform":
            self.loss_weights = weights_of(self.timestep_weights, self.alphas_cumprod, self.model_mean_type)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entry t [B] of the array `name`, shaped to broadcast over `like` [B, ...]; copied to the device only once."""
        dtype = like.dtype if like.is_floating_point() and like.dtype.itemsize >= 4 else torch.float32
        key = (name, like.device, dtype)
        if key not in self._tables:
            self._tables[key] = self._table(*key)
        return self._tables[key][t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        table = torch.from_numpy(np.asarray(getattr(self, name))).to(device)
        return table if name == "timestep_map" else table.to(dtype)

    def prepare(self, device: torch.device) -> None:
        """Copy all arrays to the device now, in float32: a compiled function finds them there, and can't make them."""
        device = torch.empty(0, device=device).device  # with its number
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                self._tables[name, device, torch.float32] = self._table(name, device, torch.float32)
        self.aggregation.prepare(device)

    def network_timesteps(self, t: Tensor) -> Tensor:
        """The original timestep [B] of local t [B]: what is trained on, and the index of per-timestep head statistics."""
        return self.at("timestep_map", t, torch.empty(len(t), device=t.device))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The value [B] that the network is told: the original timestep, scaled to 0..1000 with `rescale_timesteps`."""
        original = self.network_timesteps(t)
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original

    # ------------------------------------------------------------ forward process (in the frame)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(y_t | z_0)."""
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self.at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, log_variance.exp(), log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """y_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps; z_t is this plus `aggregation.shift` (Theorem 2)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        if noise.shape != x_start.shape:
            raise ValueError(f"noise {tuple(noise.shape)} and x_start {tuple(x_start.shape)} must have the same shape")
        signal = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(y_{t-1} | y_t, z_0)."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        variance = self.at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    # ------------------------------------------------------------ reverse process (in the frame)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_0 = (y_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The eps [B, C, H, W] of y_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, for `x_t` = y_t and a predicted z_0; t [B]."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - pred_xstart) / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def xstart_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(a, b), each [T], with z_0 = a_t y_t + b_t output[:, :C]: `predict_xstart` as one linear map."""
        return self.xstart_of_state, self.xstart_of_output

    def predict_xstart(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """z_0 from the first C channels of a network output."""
        of_state, of_output = (self.at(f"xstart_of_{what}", t, x_t) for what in ("state", "output"))
        return of_state * x_t + of_output * output[:, : x_t.shape[1]]

    def predict_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """eps from the first C channels of a network output."""
        if self.predicts_eps:
            return output[:, : x_t.shape[1]]
        return self.predict_eps_from_xstart(x_t, t, self.predict_xstart(output, x_t, t))

    @property
    def predicts_eps(self) -> bool:
        """Whether the network's output is eps itself. Any other prediction means eps only together with the state y_t."""
        return self.model_mean_type == ModelMeanType.EPSILON

    def p_variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log variance of p(y_{t-1} | y_t), each of the shape of x_t."""
        channels = x_t.shape[1]
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            if output.shape[1] != 2 * channels:
                raise ValueError(
                    f"learned variances need {2 * channels} output channels, the model returned {output.shape[1]}"
                )
            values = output[:, channels:]
            if self.model_var_type is ModelVarType.LEARNED:
                return values.exp(), values
            low, high = self.at("posterior_log_variance_clipped", t, x_t), self.at("log_betas", t, x_t)
            fraction = (values + 1) / 2  # IDDPM eq. 15, on [-1, 1]
            log_variance = fraction * high + (1 - fraction) * low
            return log_variance.exp(), log_variance
        if output.shape[1] != channels:
            raise ValueError(f"fixed variances need {channels} output channels, the model returned {output.shape[1]}")
        small = self.model_var_type is ModelVarType.FIXED_SMALL
        variance = self.at("posterior_variance" if small else "large_variance", t, x_t)
        log_variance = self.at("posterior_log_variance_clipped" if small else "log_large_variance", t, x_t)
        return variance.expand_as(x_t), log_variance.expand_as(x_t)

    def p_mean_variance_from_output(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """p(y_{t-1} | y_t) for a network output: mean, variance, log_variance, pred_xstart, each [B, C, H, W]."""
        variance, log_variance = self.p_variance(output, x_t, t)
        pred_xstart = self.predict_xstart(output, x_t, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output[:, : x_t.shape[1]]
        else:
            mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x_t, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def p_mean_variance(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Run the model at x = y_t [B, C, H, W], t [B]; see `p_mean_variance_from_output`. Arguments and keys as in ADM."""
        output = self._run(model, x, t, model_kwargs).output
        return self.p_mean_variance_from_output(output, x, t, clip_denoised, denoised_fn)

    def _run(self, model: Callable, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None) -> ModelOutput:
        kwargs, timesteps = dict(model_kwargs or {}), self.model_timesteps(t)
        if "modalities" in kwargs:
            return as_output(model(x, timesteps, kwargs.pop("modalities"), **kwargs))
        return as_denoising(model)(x, timesteps, {}, **kwargs)

    def p_sample_step(self, p: Mapping[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        """y_{t-1} ~ N(mean, variance); no noise is added at t = 0."""
        not_last = (t != 0).to(noise.dtype).view(-1, *[1] * (noise.ndim - 1))
        return p["mean"] + not_last * torch.exp(0.5 * p["log_variance"]) * noise

    def ddim_step(
        self,
        x: Tensor,
        pred_xstart: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        eta: float = 0.0,
        to: Tensor | None = None,
    ) -> Tensor:
        """y at the timestep `to` [B] (default t - 1; -1: z_0, see `final_alpha_cumprod`) by DDIM eq. 12; noise: None if eta = 0."""
        eps = self.predict_eps_from_xstart(x, t, pred_xstart)
        abar = self.at("alphas_cumprod", t, x)
        abar_to = self.at("ddim_alphas_cumprod_prev", t if to is None else to + 1, x)
        sigma = eta * torch.sqrt((1 - abar_to) / (1 - abar)) * torch.sqrt(1 - abar / abar_to)
        # From pure noise with eta = 1 nothing of eps is left, and rounding must not make it less than nothing.
        rest = (1 - abar_to - sigma**2).clamp(min=0)
        mean = pred_xstart * torch.sqrt(abar_to) + torch.sqrt(rest) * eps
        return mean if noise is None else mean + sigma * noise  # sigma is 0 in a step to abar = 1

    def condition_eps(self, eps: Tensor, gradient: Tensor, t: Tensor) -> Tensor:
        """eps | condition = eps - sqrt(1 - abar_t) grad log p(condition | state): Bayes' rule for the score."""
        return eps - self.at("sqrt_one_minus_alphas_cumprod", t, eps) * gradient

    # ------------------------------------------------------------ losses

    def vb_terms_bpd(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool
    ) -> dict[str, Tensor]:
        """One term of the variational bound: KL(q || p) for t > 0, the decoder's NLL at t = 0. bits per dimension, [B]."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self.p_mean_variance_from_output(output, x_t, t, clip_denoised)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"])) / math.log(2.0)
        decoder_nll = -discretized_gaussian_log_likelihood(x_start, means=p["mean"], log_scales=0.5 * p["log_variance"])
        decoder_nll = mean_flat(decoder_nll) / math.log(2.0)
        return {"output": torch.where(t == 0, decoder_nll, kl), "pred_xstart": p["pred_xstart"]}

    def losses_from_output(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """ADM's loss terms, each [B]: `loss`, and `mse` (or `l1`) and `vb` where they are part of it. The timestep weights are in
        `loss` alone."""
        if self.loss_type.is_vb:
            loss = self.vb_terms_bpd(output, x_start, x_t, t, clip_denoised=False)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else loss}
        terms = {}
        prediction = output
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            prediction, values = output.chunk(2, dim=1)
            # The bound teaches the variance only; the mean learns from the mse (IDDPM section 3.3).
            frozen = torch.cat([prediction.detach(), values], dim=1)
            terms["vb"] = self.vb_terms_bpd(frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        error = self.target.wanted(self, x_start, noise, x_t, t) - prediction
        name, values = ("l1", error.abs()) if self.loss_type is LossType.L1 else ("mse", error**2)
        terms[name] = weighted = mean_flat(values)
        if self.timestep_weights != "uniform":
            weighted = self.at("loss_weights", t, weighted) * weighted
        terms["loss"] = weighted + terms["vb"] if "vb" in terms else weighted
        return terms

    def training_losses(
        self,
        model: Callable,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        encodings: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """ADM's losses [B] for x_start [B, C, H, W] and t [B], with the network at z_t = y_t + s_t (eq. 4).

        encodings: {name: E_i(x_i)} of the modalities that stand in the frame. Keys: loss, mse and vb as in ADM, and
        `predictions` {name: tensor} where the model has modality heads, and `middle`, its middle features, where it returns them.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        z_t = x_t + self.aggregation.shift(encodings, t) if encodings else x_t
        result = self._run(model, z_t, t, model_kwargs)
        terms: dict[str, Any] = self.losses_from_output(result.output, x_start, x_t, t, noise)
        if result.predictions:
            terms["predictions"] = result.predictions
        if result.middle is not None:
            terms["middle"] = result.middle
        return terms

    # ------------------------------------------------------------ bits per dimension (Theorem 1)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """L_0 = KL(q(y_T | z_0) || N(0, I)) in bits per dimension, [B]."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Callable,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        encodings: Mapping[str, Tensor] | None = None,
        noise_fn: Callable[[int], Tensor] | None = None,
        on_predictions: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """The whole variational bound for x_start [B, C, H, W]: total_bpd [B], prior_bpd [B], vb, xstart_mse, mse [B, T].

        The columns run as ADM's, from t = T - 1 down to 0: vb[:, -1] is the decoder's term. `encodings` puts modalities into the
        frame, `noise_fn(step)` replaces the random draw, `on_predictions(predictions, t)` sees what the modality heads say at
        every timestep.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for step in self.reversed_steps(progress):
            t = torch.full((len(x_start),), step, device=x_start.device)
            noise = torch.randn_like(x_start) if noise_fn is None else noise_fn(step)
            x_t = self.q_sample(x_start, t, noise)
            result = self._run(model, x_t + self.aggregation.shift(encodings, t) if encodings else x_t, t, model_kwargs)
            if on_predictions is not None:
                on_predictions(result.predictions, t)
            out = self.vb_terms_bpd(result.output, x_start, x_t, t, clip_denoised)
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            eps = self.predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {key: torch.stack(values, dim=1) for key, values in columns.items()}
        prior_bpd = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}
