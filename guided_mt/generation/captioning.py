"""The caption of an image by a model's head: read off at little noise, or drawn a few tokens at a time.

Positions of a caption are independent given z_t, so that the likeliest token of each need not make a text. Drawing commits those
that the head is surest of, and shows them to the network in the frame before the others are asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.network import as_denoising
from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..modalities import CaptionModality, Modality
from ..networks import caption_head
from .drawing import refuse_not_finite


@torch.no_grad()
def drawn_captions(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    x_start: Tensor,
    reading: Sequence[int],
    timesteps: Sequence[int],
    streams: SampleStreams,
    name: str = "caption",
    temperature: float = 1.0,
) -> Tensor:
    """Captions, token ids [B, L], of images x_start [B, C, H, W] by the head of modality `name`, of form U or any given nothing.

    First all is read at the timesteps `reading`, where the frame is small (`classification.read_timesteps`): what is taken for the
    caption colours what the head sees at others. Then, at each of `timesteps`, the largest first, z_t holds the image under new
    noise and the encodings of all unknown modalities, of the caption its committed tokens and the mean of the others. Of the open
    positions those are committed whose tokens are the likeliest, with the probability that the caption reaches them: the share
    1 - cos(pi / 2 k / K) after k of K timesteps. What stands behind an end is one too.
    temperature: 1 draws tokens by the head's law, 0 takes the likeliest.
    """
    caption = modalities[name]
    assert isinstance(caption, CaptionModality)
    network, device, count = as_denoising(model), x_start.device, len(x_start)
    unknown = {n: modality.prior(x_start.shape[1:], streams) for n, modality in modalities.items()}
    ids = torch.full((count, caption.length), caption.end, device=device)
    fixed = torch.zeros_like(ids, dtype=torch.bool)
    first, steps = sorted(reading, reverse=True), sorted(timesteps, reverse=True)
    for k, step in enumerate([*first, *steps], 1 - len(first)):
        t = torch.full((count,), step, device=device)
        encodings = {n: modalities[n].encode(x) for n, x in unknown.items() if n != name}
        encodings[name] = caption.encode_partly(unknown[name], (ids, fixed))
        y_t = diffusion.q_sample(x_start, t, streams.normal(*x_start.shape[1:]))
        z_t = y_t + diffusion.aggregation.shift({n: encodings[n] for n in modalities}, t)
        predictions = network(z_t, diffusion.model_timesteps(t), {}).predictions
        unknown = {n: modality.estimate(predictions[n]) for n, modality in modalities.items()}
        if k < 1:
            continue
        chosen, p = _tokens(caption, unknown[name], streams, temperature)
        p = p * _reached(caption, unknown[name], ids, fixed)
        share = 1.0 if k == len(steps) else 1 - math.cos(math.pi / 2 * k / len(steps))
        order = torch.where(fixed, torch.inf, p).argsort(dim=1, descending=True, stable=True)
        sure = order.argsort(dim=1) < math.ceil(share * caption.length)
        new = sure & ~fixed
        ids, fixed = torch.where(new, chosen, ids), fixed | new
        behind = _behind_end(ids, fixed, caption.end)
        ids, fixed = torch.where(behind, caption.end, ids), fixed | behind
    refuse_not_finite("what the head says", *unknown.values())
    return ids


def _tokens(
    caption: CaptionModality, said: Tensor, streams: SampleStreams, temperature: float
) -> tuple[Tensor, Tensor]:
    """(a token of each position [B, L], its probability [B, L])."""
    if temperature == 0:
        return caption.head.best(said)
    u = streams.uniform(caption.length)
    ids = caption.head.drawn(said, u, temperature)
    return ids, caption.head.token_log_probs(said, ids).exp()


def _reached(caption: CaptionModality, said: Tensor, ids: Tensor, fixed: Tensor) -> Tensor:
    """The probability that the caption has not ended before each position, [B, L]."""
    p_end = caption.head.token_log_probs(said, torch.full_like(ids, caption.end)).exp()
    going_on = 1 - torch.where(fixed, (ids == caption.end).float(), p_end)
    return torch.cat([torch.ones_like(going_on[:, :1]), going_on[:, :-1].cumprod(dim=1)], dim=1)


def _behind_end(ids: Tensor, fixed: Tensor, end: int) -> Tensor:
    """Positions behind a committed end, bool [B, L]."""
    ends = (fixed & (ids == end)).long()
    return ends.cumsum(dim=1) - ends > 0


@torch.no_grad()
def log_probs_of(caption: CaptionModality, said: Tensor, ids: Tensor) -> Tensor:
    """log p(caption n | image b) [B, N] of captions ids [N, L] under what the head said of images [B, L, width], nats."""
    own = caption.own_tokens(ids)  # (N, L)
    rows = max(1, caption_head.LOGITS // (caption.length * max(len(ids), caption.head.vocabulary.out_features)))
    positions = torch.arange(caption.length, device=ids.device)
    found = []
    for part in said.split(rows):
        log_p = caption.head.logits(part).log_softmax(dim=-1)  # (b, L, V)
        found.append((log_p[:, positions, ids] * own).sum(dim=-1))
    return torch.cat(found)
