"""Generation over the moving frame (Algorithm 1, DESIGN 2.5): any subset of the modalities given, any DDPM sampler inside.

Each step: the network sees z_t; unknown modalities take their heads' estimates and are encoded anew; then
y = z_t - s_t,  y' = an ordinary step of the DDPM in the frame,  z' = y' + s_t'. The samplers know nothing of modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..modalities import Modality
from .process import GaussianDiffusion, call_model
from .random import SampleStreams

CONDITIONINGS = ("own-head", "algorithm1", "network")


@dataclass
class Sample:
    """x_start [B, C, H, W] and the value of every modality: the given ones, and the heads' last word on the others."""

    x_start: Tensor
    modalities: dict[str, Tensor]


# ---------------------------------------------------------------- one step in the frame


class Sampler:
    """A rule y_t -> y_{t-1} given the predicted z_0. One object per run: rules with memory keep it here."""

    shifts_mean = False  # where an outside gradient enters: the mean of the step, or else eps

    def __init__(self, diffusion: GaussianDiffusion, streams: SampleStreams, eta: float):
        self.diffusion, self.streams, self.eta = diffusion, streams, eta

    def hold(self, pred_xstart: Tensor, encodings: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The z_0 and encodings to use over the whole step; first-order rules hold the current ones."""
        return pred_xstart, encodings

    def step(self, y: Tensor, pred_xstart: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def noise(self, y: Tensor) -> Tensor:
        return self.streams.normal(*y.shape[1:]).to(y.dtype)


class Ancestral(Sampler):
    """y_{t-1} ~ p(y_{t-1} | y_t) (DDPM algorithm 2)."""

    shifts_mean = True

    def step(self, y: Tensor, pred_xstart: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        mean, _, _ = self.diffusion.q_posterior_mean_variance(pred_xstart, y, t)
        return self.diffusion.p_sample_step({"mean": mean, "log_variance": log_variance}, t, self.noise(y))


class DDIM(Sampler):
    """DDIM with any eta; 0 is the deterministic rule."""

    def step(self, y: Tensor, pred_xstart: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        return self.diffusion.ddim_step(y, pred_xstart, t, self.noise(y) if self.eta > 0 else None, self.eta)


class DPMSolverPP(Sampler):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: the z_0 prediction extrapolated to the middle of the step in
    lambda = log(sqrt(abar) / sqrt(1 - abar)). The encodings of unknown modalities are predictions too and are treated alike."""

    def __init__(self, diffusion: GaussianDiffusion, streams: SampleStreams, eta: float):
        super().__init__(diffusion, streams, eta)
        self.lambdas = 0.5 * (np.log(diffusion.alphas_cumprod) - np.log(1 - diffusion.alphas_cumprod))
        self.previous: tuple[Tensor, dict[str, Tensor]] | None = None

    def hold(self, pred_xstart: Tensor, encodings: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        previous, self.previous = self.previous, (pred_xstart, encodings)
        if previous is None or step == 0:
            return pred_xstart, encodings  # no history at the first step; the last one ends at lambda = infinity
        h, h_previous = self.lambdas[step - 1] - self.lambdas[step], self.lambdas[step] - self.lambdas[step + 1]
        slope = 0.5 * h / h_previous
        moved = {name: e + slope * (e - previous[1][name]) for name, e in encodings.items()}
        return pred_xstart + slope * (pred_xstart - previous[0]), moved

    def step(self, y: Tensor, pred_xstart: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
        # sigma'/sigma y - sqrt(abar') (exp(-h) - 1) z_0 is DDIM's step with eta = 0, written in lambda.
        return self.diffusion.ddim_step(y, pred_xstart, t)


SAMPLERS: dict[str, type[Sampler]] = {"ddpm": Ancestral, "ddim": DDIM, "dpm++": DPMSolverPP}


# ---------------------------------------------------------------- the loop


def sample(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    shape: Sequence[int],
    *,
    known: Mapping[str, Tensor] | None = None,
    sampler: str = "ddpm",
    conditioning: str = "own-head",
    conditioning_scale: float = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    clip_denoised: bool = True,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    start: tuple[Tensor, int] | None = None,
    guidance_scale: float = 1.0,
    cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Sample:
    """Draw z_0 of `shape` (B, C, H, W) and every unknown modality (Algorithm 1).

    model: (z_t, t, modalities) -> ModelOutput, see `gaussian_diffusion.call_model`. modalities: {name: modality}; known:
    {name: x}, any subset. With conditioning "network" the known ones leave the frame and are handed to the model (forms X
    and any); with "own-head" they stay in the frame and eps is corrected by the gradient of the heads' log probability,
    times `conditioning_scale` (form U); "algorithm1" is the paper's printed rule, which only puts them into the frame. With
    "own-head" and further, unknown modalities these are estimated from z_t alone, not from the known ones: separate heads don't
    hold their dependence; "network" is exact for any mix.
    The number of steps is that of `diffusion`. seeds: one integer per sample (default: drawn from torch's generator); a
    sample depends on its own seed and conditions alone. eta is DDIM's.
    start: (y_t [B, C, H, W], t) begins there instead of with noise at the last timestep (SDEdit).
    guidance_scale: classifier-free guidance, eps = eps_u + scale (eps - eps_u) (Ho and Salimans 2022, with scale = 1 + w);
    other than 1 it needs a model that takes `unconditional` bool [B], the samples to be seen without any condition: see `MTModel`.
    With a further modality unknown it is approximate: y_t is then known only as far as that one is.
    cond_fn: (y_t [B, C, H, W], the network's timesteps [B]) -> scaled gradient of log p(condition | y_t), as an outside classifier's:
    ancestral steps add variance * gradient to their mean (ADM algorithm 1), the others shift eps (algorithm 2).
    Raises ValueError for names, shapes and counts that don't fit.
    """
    known = dict(known or {})
    _check(diffusion, modalities, known, shape, sampler, conditioning, seeds)
    device = torch.device(device) if device is not None else _device_of(model, known)
    known = {name: x.to(device) for name, x in known.items()}
    if seeds is None:
        seeds = torch.randint(2**62, (shape[0],))
    streams = SampleStreams(torch.as_tensor(seeds), device=device)
    rule = SAMPLERS[sampler](diffusion, streams, eta)

    given = known if conditioning == "network" else {}
    framed = {name: x for name, x in known.items() if name not in given}
    guiding = framed if conditioning == "own-head" and conditioning_scale != 0 else {}
    unknown = {name: m.prior(shape[1:], streams) for name, m in modalities.items() if name not in known}
    with torch.no_grad():
        fixed = {name: modalities[name].encode(x) for name, x in framed.items()}
        encodings = {**fixed, **{name: modalities[name].encode(x) for name, x in unknown.items()}}
        y, first = start if start is not None else (streams.normal(*shape[1:]), diffusion.num_timesteps - 1)
        t = torch.full((shape[0],), first, device=device)
        z = y.to(device) + diffusion.aggregation.shift(encodings, t)
        for step in diffusion.reversed_steps(progress, first):
            t = torch.full((shape[0],), step, device=device)
            bare = z - diffusion.aggregation.shift(encodings, t) if guidance_scale != 1 else None
            output, predictions, gradient, unconditional = _denoise(
                model, diffusion, modalities, z, t, given, guiding, bare
            )
            unknown = {name: modalities[name].estimate(_head(predictions, name)) for name in unknown}
            encodings = {**fixed, **{name: modalities[name].encode(x) for name, x in unknown.items()}}
            y = z - diffusion.aggregation.shift(encodings, t)
            variance, log_variance = diffusion.p_variance(output, y, t)
            pred_xstart = diffusion.predict_xstart(output, y, t)
            outside = cond_fn(y, diffusion.model_timesteps(t)) if cond_fn is not None else None
            shifts_eps = outside is not None and not rule.shifts_mean
            if gradient is not None or unconditional is not None or shifts_eps:
                eps = diffusion.predict_eps_from_xstart(y, t, pred_xstart)
                if gradient is not None:
                    eps = diffusion.condition_eps(eps, conditioning_scale * gradient, t)
                if unconditional is not None:
                    eps_unconditional = diffusion.predict_eps_from_xstart(
                        y, t, diffusion.predict_xstart(unconditional, y, t)
                    )
                    eps = eps_unconditional + guidance_scale * (eps - eps_unconditional)
                if shifts_eps:
                    eps = diffusion.condition_eps(eps, outside, t)
                pred_xstart = diffusion.predict_xstart_from_eps(y, t, eps)
            if clip_denoised:
                # Last, where ADM clips before an outside gradient: at high noise a little error in it is far out of range in z_0.
                pred_xstart = pred_xstart.clamp(-1, 1)

            pred_xstart, held = rule.hold(pred_xstart, encodings, step)
            y = rule.step(z - diffusion.aggregation.shift(held, t), pred_xstart, log_variance, t)
            if outside is not None and rule.shifts_mean:
                y = y + variance * outside
            z = y + diffusion.aggregation.shift(held, t - 1)
    return Sample(z, {**known, **unknown})


def _denoise(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    z: Tensor,
    t: Tensor,
    given: Mapping[str, Tensor],
    guiding: Mapping[str, Tensor],
    bare: Tensor | None,
) -> tuple[Tensor, Mapping[str, Tensor], Tensor | None, Tensor | None]:
    """The network at z_t; grad_z sum_i log p_head(x_i | z_t) for the modalities in `guiding` (DESIGN 2.5), or None; and the
    output without any condition at `bare` = y_t in the same pass, or None."""
    count, model_t = len(z), diffusion.model_timesteps(t)
    with torch.set_grad_enabled(bool(guiding)):
        state = z = z.detach().requires_grad_(bool(guiding))
        kwargs = {}
        if bare is not None:
            state, model_t = torch.cat([z, bare]), model_t.repeat(2)
            given = {name: torch.cat([x, x]) for name, x in given.items()}
            kwargs["unconditional"] = torch.arange(2 * count, device=z.device) >= count
        result = call_model(model, state, model_t, given, **kwargs)
        predictions = {name: prediction[:count] for name, prediction in result.predictions.items()}
        gradient = None
        if guiding:
            original = diffusion.network_timesteps(t)
            log_prob = sum(modalities[n].log_prob(_head(predictions, n), x, original).sum() for n, x in guiding.items())
            (gradient,) = torch.autograd.grad(log_prob, z)
    output, unconditional = result.output[:count].detach(), None if bare is None else result.output[count:].detach()
    return output, {n: p.detach() for n, p in predictions.items()}, gradient, unconditional


def _head(predictions: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in predictions:
        raise ValueError(
            f"the model has no head for modality '{name}'; it predicts: {', '.join(predictions) or 'nothing'}"
        )
    return predictions[name]


def _device_of(model: Callable, known: Mapping[str, Tensor]) -> torch.device:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            return parameter.device
    for x in known.values():
        return x.device
    return torch.device("cpu")


def _check(diffusion, modalities, known, shape, sampler, conditioning, seeds) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler '{sampler}'; choose from {', '.join(SAMPLERS)}")
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"unknown conditioning '{conditioning}'; choose from {', '.join(CONDITIONINGS)}")
    for name, x in known.items():
        if name not in modalities:
            raise ValueError(f"unknown modality '{name}' in known; this model has: {', '.join(modalities) or 'none'}")
        if len(x) != shape[0]:
            raise ValueError(f"known['{name}'] has {len(x)} samples, but shape asks for {shape[0]}")
    if seeds is not None and len(seeds) != shape[0]:
        raise ValueError(f"{len(seeds)} seeds for {shape[0]} samples: give one per sample")
