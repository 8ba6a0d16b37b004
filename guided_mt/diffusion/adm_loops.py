"""ADM's own sampling methods, for its users and its numbers: no modalities, torch's random numbers. Ours is `sampling.sample`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .schedules import LEAST_SIGNAL


class ADMLoops:
    """The part of ADM's `GaussianDiffusion` that draws samples; arguments and returned keys as there."""

    # What it needs of the process.
    num_timesteps: int
    model_timesteps: Callable[[Tensor], Tensor]
    predict_eps_from_xstart: Callable[[Tensor, Tensor, Tensor], Tensor]
    predict_xstart_from_eps: Callable[[Tensor, Tensor, Tensor], Tensor]
    condition_eps: Callable[[Tensor, Tensor, Tensor], Tensor]
    at: Callable[[str, Tensor, Tensor], Tensor]
    q_posterior_mean_variance: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    p_mean_variance: Callable[..., dict[str, Tensor]]
    p_sample_step: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
    ddim_step: Callable[..., Tensor]

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
        # In pure noise (zero terminal SNR) eps says nothing of z_0, so that no gradient can move it.
        pred_xstart = torch.where(self.at("alphas_cumprod", t, x) < LEAST_SIGNAL, p["pred_xstart"], pred_xstart)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p, "pred_xstart": pred_xstart, "mean": mean}

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
        model: Any,
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
