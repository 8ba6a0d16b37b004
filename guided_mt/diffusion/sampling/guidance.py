"""Classifier guidance with a separate network (ADM, section 4): the gradient that a sampler adds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_guidance(
    classifier: Callable[[Tensor, Tensor], Tensor], labels: Tensor, scale: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """cond_fn(y_t [B, C, H, W], timesteps [B]) -> scale * grad log p(labels | y_t), of the shape of y_t.

    classifier: (y_t, timesteps as the network is told them) -> logits [B, K]; labels: class ids [B]. `sampling.sample` shifts the
    mean of an ancestral step by its variance times this (ADM algorithm 1), and eps in the other rules (algorithm 2).
    """

    def cond_fn(y_t: Tensor, timesteps: Tensor) -> Tensor:
        with torch.enable_grad():  # samplers run without
            y_t = y_t.detach().requires_grad_()
            log_p = torch.log_softmax(classifier(y_t, timesteps), dim=-1)
            chosen = log_p.gather(1, labels[:, None]).sum()  # samples don't meet: the sum's gradient is each one's
            (gradient,) = torch.autograd.grad(chosen, y_t)
        return scale * gradient

    return cond_fn
