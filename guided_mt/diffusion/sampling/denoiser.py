"""What is known at z_t: one call of the network, and everything that Algorithm 1 makes of it before the step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..network import Denoising
from ..process import GaussianDiffusion
from ..random import SampleStreams
from ..schedules import LEAST_SIGNAL

CONDITIONINGS = ("own-head", "algorithm1", "network")


class Modality(Protocol):
    """What sampling asks of a modality; see `guided_mt.modalities.Modality`."""

    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        """A first value [B, ...] of an unknown x, for z_0 of `shape` (C, H, W)."""

    def encode(self, x: Tensor) -> Tensor:
        """E(x) [B, C, H, W]."""

    def estimate(self, prediction: Tensor) -> Tensor:
        """The mean of p(x | z_t) of a head's prediction: what an unknown x becomes."""

    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """log p(x | z_t) in nats [B] under a head's prediction; t [B] are original timesteps."""


@dataclass(frozen=True)
class Estimate:
    """What the network knows at z_t, all [B, C, H, W].

    x_start: E[z_0 | z_t, what is given], after guidance and clipping. encodings: {name: E_i} of the modalities in the frame.
    variance, log_variance: of the ancestral step. mean_gradient: what an ancestral step adds to its mean, times the variance;
    None without a separate classifier.
    """

    x_start: Tensor
    encodings: dict[str, Tensor]
    variance: Tensor
    log_variance: Tensor
    mean_gradient: Tensor | None = None

    def toward(self, *terms: tuple[float, Estimate]) -> Estimate:
        """self + sum_k w_k (other_k - self), of z_0 and of the encodings alike: both are predictions at z_t.

        All that a linear rule does, from Heun's to UniPC; a negative weight extrapolates.
        """
        x_start, encodings = self.x_start, dict(self.encodings)
        for weight, other in terms:
            x_start = x_start + weight * (other.x_start - self.x_start)
            for name, encoding in self.encodings.items():
                encodings[name] = encodings[name] + weight * (other.encodings[name] - encoding)
        return Estimate(x_start, encodings, self.variance, self.log_variance, self.mean_gradient)


class Denoiser:
    """`denoise(z, step) -> Estimate` for a process, a network and what is known: the stages of Algorithm 1 between two steps.

    known, unknown: {name: x} of all modalities; the values of the unknown ones follow the heads from call to call and are read
    off `unknown` at the end. The options are those of `sample`; shifts_mean: whether the gradient of `cond_fn` is for the mean of
    the step (ADM's algorithm 1) or goes into eps (algorithm 2). arithmetic: what the arithmetic around the network is called
    through, as `torch.compile`; None: nothing. It is called as it is beside a `cond_fn`, which has a network of its own.
    """

    def __init__(
        self,
        network: Denoising,
        diffusion: GaussianDiffusion,
        modalities: Mapping[str, Modality],
        known: Mapping[str, Tensor],
        unknown: Mapping[str, Tensor],
        *,
        conditioning: str = "own-head",
        conditioning_scale: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_channels: int = -1,
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        clip_before_guidance: bool = False,
        shifts_mean: bool = False,
        clip_denoised: bool = True,
        dynamic_threshold: float = 0.0,
        absent: Collection[str] = (),
        arithmetic: Callable[[Callable], Callable] | None = None,
    ):
        self.absent = tuple(absent)
        self.network, self.diffusion, self.modalities = network, diffusion, modalities
        self.given = dict(known) if conditioning == "network" else {}
        in_frame = {name: x for name, x in known.items() if name not in self.given}
        self.guiding = in_frame if conditioning == "own-head" and conditioning_scale != 0 else {}
        self.unknown = dict(unknown)
        self.fixed = {name: modalities[name].encode(x) for name, x in in_frame.items()}
        self.conditioning_scale, self.guidance_scale = conditioning_scale, guidance_scale
        self.guidance_channels = guidance_channels
        self.cond_fn, self.shifts_mean = cond_fn, shifts_mean
        self.clip_before_guidance = clip_before_guidance
        self.clip_denoised, self.dynamic_threshold = clip_denoised, dynamic_threshold
        self.encodings = self._encode(self.unknown)
        self.arithmetic = arithmetic or (lambda function: function)
        self._read_off = self._read if cond_fn is not None else self.arithmetic(self._read)

    def __call__(self, z: Tensor, step: int) -> Estimate:
        """z = z_t [B, C, H, W] at local timestep `step`."""
        t = torch.full((len(z),), step, device=z.device)
        seen = self._call_network(z, t)
        has_signal = bool(self.diffusion.alphas_cumprod[step] >= LEAST_SIGNAL)
        self.unknown, self.encodings, *found = self._read_off(z, t, seen, has_signal)
        return Estimate(found[0], self.encodings, *found[1:])

    def _read(self, z: Tensor, t: Tensor, seen: Seen, has_signal: bool) -> tuple[Any, ...]:
        """(unknown, encodings, and the other fields of Estimate) of what the network says."""
        diffusion, names = self.diffusion, list(self.unknown)
        unknown = {name: self.modalities[name].estimate(head(seen.predictions, name)) for name in names}
        encodings = self._encode(unknown)
        y = z - diffusion.aggregation.shift(encodings, t)
        variance, log_variance = diffusion.p_variance(seen.output, y, t)
        outside = None if self.cond_fn is None else self.cond_fn(y, diffusion.model_timesteps(t))
        in_eps = None if self.shifts_mean else outside
        in_eps, after_clipping = (None, in_eps) if self.clip_before_guidance else (in_eps, None)
        guided = self.fixed or self.guidance_scale != 1 or in_eps is not None
        if guided and has_signal:
            eps = diffusion.predict_eps(seen.output, self._state_seen(z, t, y, encodings, seen.predictions), t)
            if seen.head_gradient is not None:  # own head: eps | x = eps - sqrt(1 - abar) grad log p_head(x | z_t)
                eps = diffusion.condition_eps(eps, self.conditioning_scale * seen.head_gradient, t)
            if seen.unconditional is not None and seen.bare is not None:
                eps_u = diffusion.predict_eps(seen.unconditional, seen.bare, t)
                eps = self._guided(eps, eps_u)
            if in_eps is not None:
                eps = diffusion.condition_eps(eps, in_eps, t)
            x_start = diffusion.predict_xstart_from_eps(y, t, eps)
        else:
            x_start = diffusion.predict_xstart(seen.output, y, t)
            if seen.unconditional is not None and seen.bare is not None:
                # In pure noise (zero terminal SNR) eps says nothing of z_0: guidance by z_0 itself, and none by a gradient.
                x_start_u = diffusion.predict_xstart(seen.unconditional, seen.bare, t)
                x_start = self._guided(x_start, x_start_u)
        # After an outside gradient, unless asked otherwise: at high noise a little error in it is far out of range in z_0.
        x_start = self._limit(x_start)
        if after_clipping is not None and has_signal:
            eps = diffusion.condition_eps(diffusion.predict_eps_from_xstart(y, t, x_start), after_clipping, t)
            x_start = diffusion.predict_xstart_from_eps(y, t, eps)
        return unknown, encodings, x_start, variance, log_variance, outside if self.shifts_mean else None

    def _guided(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Classifier-free guidance of a prediction [B, C, H, W]; channels from `guidance_channels` on stay conditional."""
        guided = unconditional + self.guidance_scale * (conditional - unconditional)
        if self.guidance_channels < 0:
            return guided
        return torch.cat([guided[:, : self.guidance_channels], conditional[:, self.guidance_channels :]], dim=1)

    def _state_seen(
        self, z: Tensor, t: Tensor, y: Tensor, encodings: Mapping[str, Tensor], predictions: Mapping[str, Tensor]
    ) -> Tensor:
        """y_t as the network sees it: a known modality in the frame is to it what its head says, not what is known.

        A prediction of z_0 or v means eps = E[eps | z_t] only together with this state; eps itself needs none.
        """
        if not self.fixed or self.diffusion.predicts_eps:
            return y
        as_seen = {name: self.modalities[name].estimate(head(predictions, name)) for name in self.fixed}
        encodings = {**encodings, **{name: self.modalities[name].encode(x) for name, x in as_seen.items()}}
        return z - self.diffusion.aggregation.shift(encodings, t)

    def _encode(self, unknown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """E_i of everything in the frame: what is known, and what the heads say of the rest."""
        return {**self.fixed, **{name: self.modalities[name].encode(x) for name, x in unknown.items()}}

    def _limit(self, x_start: Tensor) -> Tensor:
        if (
            self.dynamic_threshold > 0
        ):  # Saharia et al. 2022 (Imagen): clip to a sample's own percentile, then scale back
            most = torch.quantile(x_start.flatten(1).abs().float(), self.dynamic_threshold, dim=1).clamp(min=1.0)
            most = most.to(x_start.dtype).view(-1, *[1] * (x_start.ndim - 1))
            return x_start.clamp(-most, most) / most
        return x_start.clamp(-1, 1) if self.clip_denoised else x_start

    def _call_network(self, z: Tensor, t: Tensor) -> Seen:
        """One pass of the network, twice as wide where guidance needs it without any condition too."""
        count, model_t, given = len(z), self.diffusion.model_timesteps(t), self.given
        with torch.set_grad_enabled(bool(self.guiding)):
            state = z = z.detach().requires_grad_(bool(self.guiding))
            options: dict[str, Any] = {}
            bare = None
            if self.guidance_scale != 1:
                bare = z.detach() - self.diffusion.aggregation.shift(self.encodings, t)
                state, model_t = torch.cat([z, bare]), model_t.repeat(2)
                given = {name: torch.cat([x, x]) for name, x in given.items()}
                options["unconditional"] = torch.arange(2 * count, device=z.device) >= count
            if self.absent:
                options["absent"] = dict.fromkeys(self.absent, torch.ones_like(model_t, dtype=torch.bool))
            result = self.network(state, model_t, given, **options)
            predictions = {name: prediction[:count] for name, prediction in result.predictions.items()}
            gradient = None
            if self.guiding:
                original = self.diffusion.network_timesteps(t)
                log_probs = [
                    self.modalities[name].log_prob(head(predictions, name), x, original).sum()
                    for name, x in self.guiding.items()
                ]
                (gradient,) = torch.autograd.grad(torch.stack(log_probs).sum(), z)
        return Seen(
            result.output[:count].detach(),
            {name: prediction.detach() for name, prediction in predictions.items()},
            gradient,
            None if bare is None else result.output[count:].detach(),
            bare,
        )


class Seen(NamedTuple):
    """What one pass of the network says at z_t.

    head_gradient: grad_z sum_i log p_head(x_i | z_t) over the modalities that own head conditions on, or None. unconditional: the
    output without any condition at the state `bare` = y_t, or None where guidance is off.
    """

    output: Tensor
    predictions: Mapping[str, Tensor]
    head_gradient: Tensor | None
    unconditional: Tensor | None
    bare: Tensor | None


def head(predictions: Mapping[str, Tensor], name: str) -> Tensor:
    """A modality's prediction. Raises ValueError where the model has no such head."""
    if name not in predictions:
        raise ValueError(
            f"the model has no head for modality '{name}'; it predicts: {', '.join(predictions) or 'nothing'}"
        )
    return predictions[name]
