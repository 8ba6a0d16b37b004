"""Gaussian diffusion with ADM's process, losses and names, and the frame of MT-Diffusion around it.

In the frame y_t = z_t - s_t (DESIGN 2.2) the chain of MT-Diffusion *is* DDPM's, so every formula below is the published one:
Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (IDDPM: cosine schedule, learned variances, hybrid loss), Dhariwal and
Nichol 2021 (ADM: guidance), Song et al. 2021 (DDIM). Here `x_t` is the state in the frame; only `training_losses` and
`bpd_terms` put it into z-space for the network, by adding `aggregation.shift`.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .aggregation import Aggregation


class ModelOutput(NamedTuple):
    """What a denoiser returns: ADM's output [B, C or 2C, H, W] and one prediction per modality head."""

    output: Tensor
    predictions: Mapping[str, Tensor] = {}


class ModelMeanType(enum.Enum):
    EPSILON = "epsilon"
    START_X = "start_x"
    PREVIOUS_X = "previous_x"


class ModelVarType(enum.Enum):
    LEARNED = "learned"
    FIXED_SMALL = "fixed_small"
    FIXED_LARGE = "fixed_large"
    LEARNED_RANGE = "learned_range"


class LossType(enum.Enum):
    MSE = "mse"
    L1 = "l1"  # latent-diffusion's loss_type l1: absolute errors
    RESCALED_MSE = "rescaled_mse"  # the bound of the hybrid loss scaled to steps of 1/1000
    KL = "kl"
    RESCALED_KL = "rescaled_kl"  # an unbiased estimate of the whole bound

    @property
    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


# ---------------------------------------------------------------- schedules


def _linear_betas(steps: int) -> np.ndarray:
    """Ho et al.'s 1e-4 .. 0.02 over 1000 steps, rescaled to any number of steps."""
    return np.linspace(0.0001, 0.02, steps, dtype=np.float64) * (1000 / steps)


def _cosine_betas(steps: int, max_beta: float = 0.999) -> np.ndarray:
    """IDDPM eq. 17, with beta clipped at 0.999."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    abar = np.array([math.cos((v + 0.008) / 1.008 * math.pi / 2) ** 2 for v in u])
    return np.minimum(1 - abar[1:] / abar[:-1], max_beta)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": _linear_betas, "cosine": _cosine_betas}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """beta_t, float64 [T]. Raises ValueError for a name that is not in SCHEDULES."""
    if schedule_name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule '{schedule_name}'; choose from {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule_name](num_diffusion_timesteps)


# ---------------------------------------------------------------- likelihood terms


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all dimensions but the batch, [B]."""
    return x.mean(dim=tuple(range(1, x.ndim)))


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, element by element, in nats."""
    logvar2 = torch.as_tensor(logvar2, device=mean1.device, dtype=mean1.dtype)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def _approx_standard_normal_cdf(x: Tensor) -> Tensor:
    # The tanh form, not erf: DDPM and ADM report their likelihoods with it.
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p of 8-bit data x in [-1, 1] under a Gaussian integrated over bins of width 2/255, in nats (DDPM eq. 13)."""
    centered, inv_std = x - means, torch.exp(-log_scales)
    cdf_plus = _approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_min = _approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    log_cdf_plus = torch.log(cdf_plus.clamp(min=1e-12))
    log_one_minus_cdf_min = torch.log((1.0 - cdf_min).clamp(min=1e-12))
    log_middle = torch.log((cdf_plus - cdf_min).clamp(min=1e-12))
    return torch.where(x < -0.999, log_cdf_plus, torch.where(x > 0.999, log_one_minus_cdf_min, log_middle))


# ---------------------------------------------------------------- the network, seen from the process


def call_model(
    model: Callable, z_t: Tensor, t: Tensor, modalities: Mapping[str, Tensor], **model_kwargs: Any
) -> ModelOutput:
    """Run `model(z_t, t, modalities) -> ModelOutput`, or ADM's `model(x, t, **kwargs) -> Tensor` (no modalities)."""
    if takes_modalities(model):
        result = model(z_t, t, modalities, **model_kwargs)
    elif modalities:
        raise ValueError(f"this model takes no modalities, but {', '.join(modalities)} was given to it")
    else:
        result = model(z_t, t, **model_kwargs)
    return result if isinstance(result, ModelOutput) else ModelOutput(result)


def takes_modalities(model: Callable) -> bool:
    """True for (z_t, t, modalities, ...), False for ADM's (x, timesteps, y=None, ...) whose third argument has a default."""
    while True:  # partial, DistributedDataParallel and torch.compile hide the signature
        if isinstance(model, functools.partial) and isinstance(model.func, torch.nn.Module):
            model = model.func
        elif isinstance(model, torch.nn.Module) and ("module" in model._modules or "_orig_mod" in model._modules):
            model = model._modules.get("module", model._modules.get("_orig_mod"))
        else:
            break
    signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    if "modalities" in signature.parameters:
        return True
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        return True
    return len(positional) > 2 and positional[2].default is inspect.Parameter.empty and positional[2].name != "y"


# ---------------------------------------------------------------- the process


class GaussianDiffusion:
    """ADM's diffusion process for betas [T], carrying the Aggregation of the same timesteps.

    timestep_map [T]: the timestep that the network is told, one of 0..original_num_steps-1; identity unless respaced.
    All arrays are float64 numpy [T], with ADM's names.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.FIXED_LARGE,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        aggregation: Aggregation | None = None,
        timestep_map: np.ndarray | None = None,
        original_num_steps: int | None = None,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0).all() and (betas <= 1).all()):
            raise ValueError("betas must be a vector of numbers in (0, 1]")
        self.betas = betas
        self.num_timesteps = len(betas)
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self.aggregation = aggregation or Aggregation()
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.asarray(timestep_map, dtype=np.int64)
        self.original_num_steps = original_num_steps or self.num_timesteps

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        # q(y_{t-1} | y_t, z_0), DDPM eq. 6 and 7. Its variance at t = 0 is 0; the clipped logarithm uses that of t = 1.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        self.log_betas = np.log(betas)
        self.large_variance = np.append(first, betas[1:])
        self.log_large_variance = np.log(self.large_variance)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entry t [B] of the array `name`, shaped to broadcast over `like` [B, ...]; copied to the device only once."""
        dtype = like.dtype if like.is_floating_point() and like.dtype.itemsize >= 4 else torch.float32
        key = (name, like.device, dtype)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(np.asarray(getattr(self, name))).to(like.device)
            if name != "timestep_map":
                self._tables[key] = self._tables[key].to(dtype)
        return self._tables[key][t].view(-1, *[1] * (like.ndim - 1))

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
        return self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - pred_xstart) / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def xstart_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(a, b), each [T], with z_0 = a_t y_t + b_t output[:, :C]: `predict_xstart` as one linear map."""
        if self.model_mean_type is ModelMeanType.START_X:
            return np.zeros(self.num_timesteps), np.ones(self.num_timesteps)
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self.sqrt_recip_alphas_cumprod, -self.sqrt_recipm1_alphas_cumprod
        return -self.posterior_mean_coef2 / self.posterior_mean_coef1, 1.0 / self.posterior_mean_coef1

    def predict_xstart(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """z_0 from the first C channels of a network output."""
        prediction = output[:, : x_t.shape[1]]
        if self.model_mean_type is ModelMeanType.START_X:
            return prediction
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self.predict_xstart_from_eps(x_t, t, prediction)
        scale = 1.0 / self.at("posterior_mean_coef1", t, x_t)  # y_{t-1} is predicted: solve the posterior mean for z_0
        return scale * (prediction - self.at("posterior_mean_coef2", t, x_t) * x_t)

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
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
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
        kwargs = dict(model_kwargs or {})
        return call_model(model, x, self.model_timesteps(t), kwargs.pop("modalities", {}), **kwargs)

    def p_sample_step(self, p: Mapping[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        """y_{t-1} ~ N(mean, variance); no noise is added at t = 0."""
        return p["mean"] + self._unless_last(t, noise) * torch.exp(0.5 * p["log_variance"]) * noise

    def ddim_step(
        self, x: Tensor, pred_xstart: Tensor, t: Tensor, noise: Tensor | None = None, eta: float = 0.0
    ) -> Tensor:
        """y_{t-1} by DDIM eq. 12. noise may be None where eta = 0."""
        eps = self.predict_eps_from_xstart(x, t, pred_xstart)
        abar, abar_prev = self.at("alphas_cumprod", t, x), self.at("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - abar_prev) / (1 - abar)) * torch.sqrt(1 - abar / abar_prev)
        mean = pred_xstart * torch.sqrt(abar_prev) + torch.sqrt(1 - abar_prev - sigma**2) * eps
        return mean if noise is None else mean + self._unless_last(t, x) * sigma * noise

    @staticmethod
    def _unless_last(t: Tensor, like: Tensor) -> Tensor:
        return (t != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def condition_mean(
        self,
        cond_fn: Callable,
        p: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The mean of p shifted by variance * grad log p(y | x_t) (ADM algorithm 1)."""
        return p["mean"] + p["variance"] * cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))

    def condition_score(
        self,
        cond_fn: Callable,
        p: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Shift eps by -sqrt(1 - abar_t) grad log p(y | x_t) (ADM algorithm 2, for DDIM and other ODE samplers)."""
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        eps = self.predict_eps_from_xstart(x, t, p["pred_xstart"])
        pred_xstart = self.predict_xstart_from_eps(x, t, self.condition_eps(eps, gradient, t))
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p, "pred_xstart": pred_xstart, "mean": mean}

    def condition_eps(self, eps: Tensor, gradient: Tensor, t: Tensor) -> Tensor:
        """eps | condition = eps - sqrt(1 - abar_t) grad log p(condition | state): Bayes' rule for the score."""
        return eps - self.at("sqrt_one_minus_alphas_cumprod", t, eps) * gradient

    # ------------------------------------------------------------ ADM's sampling (no modalities; for those see samplers.py)

    def p_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step from x = y_t [B, C, H, W]: `sample` and `pred_xstart`."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        if cond_fn is not None:
            p = {**p, "mean": self.condition_mean(cond_fn, p, x, t, model_kwargs)}
        return {"sample": self.p_sample_step(p, t, noise), "pred_xstart": p["pred_xstart"]}

    def ddim_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step from x = y_t [B, C, H, W]: `sample` and `pred_xstart`."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            p = self.condition_score(cond_fn, p, x, t, model_kwargs)
        noise = torch.randn_like(x)
        return {"sample": self.ddim_step(x, p["pred_xstart"], t, noise, eta), "pred_xstart": p["pred_xstart"]}

    def p_sample_loop(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Ancestral sampling from noise, [B, C, H, W]."""
        step = functools.partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )
        return self._sample_loop(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """DDIM sampling from noise, [B, C, H, W]."""
        step = functools.partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )
        return self._sample_loop(step, model, shape, noise, device, progress)

    @torch.no_grad()
    def _sample_loop(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Tensor:
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in self.reversed_steps(progress):
            x = step(x, torch.full((shape[0],), i, device=device))["sample"]
        return x

    def reversed_steps(self, progress: bool = False, first: int | None = None) -> Iterable[int]:
        """T-1 (or `first`), ..., 0, with a progress bar on request."""
        steps = range(self.num_timesteps - 1 if first is None else first, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            return tqdm(steps, leave=False)
        return steps

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

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    def losses_from_output(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """ADM's loss terms, each [B]: `loss`, and `mse` (or `l1`) and `vb` where they are part of it."""
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
        error = self._target(x_start, x_t, t, noise) - prediction
        name, values = ("l1", error.abs()) if self.loss_type is LossType.L1 else ("mse", error**2)
        terms[name] = mean_flat(values)
        terms["loss"] = terms[name] + terms["vb"] if "vb" in terms else terms[name]
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
        `predictions` {name: tensor} where the model has modality heads.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        z_t = x_t + self.aggregation.shift(encodings, t) if encodings else x_t
        result = self._run(model, z_t, t, model_kwargs)
        terms: dict[str, Any] = self.losses_from_output(result.output, x_start, x_t, t, noise)
        if result.predictions:
            terms["predictions"] = result.predictions
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

        `encodings` puts modalities into the frame, `noise_fn(step)` replaces the random draw, `on_predictions(predictions,
        t)` sees what the modality heads say at every timestep. vb[:, 0] is the decoder term of t = 0.
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
        terms = {key: torch.stack(values[::-1], dim=1) for key, values in columns.items()}
        prior_bpd = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}
