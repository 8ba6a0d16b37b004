"""LDM's learning-rate factors: `schedule(step)` is what the learning rate is multiplied by; steps count from 0.

Keyword arguments as in latent-diffusion's `scheduler_config`; as there, the objects can be called themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from guided_mt.errors import UserError


class Schedule:
    """A factor on the learning rate, by step: what latent-diffusion's `scheduler_config` builds."""

    def schedule(self, step: int) -> float:
        """The factor at a step."""
        raise NotImplementedError

    def __call__(self, step: int) -> float:
        """The factor at a step, for torch's LambdaLR."""
        return self.schedule(step)


class LambdaWarmUpCosineScheduler(Schedule):
    """From lr_start linearly to lr_max over warm_up_steps, then along half a cosine to lr_min at max_decay_steps, and stays."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        """verbosity_interval: LDM's, without effect; progress.csv holds the learning rate."""
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start

    def schedule(self, step: int) -> float:
        """Linear from `lr_start` to `lr_max`, then a cosine down to `lr_min`, where it stays."""
        if step < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * step / self.warm_up_steps
        decay = max(self.max_decay_steps - self.warm_up_steps, 1)
        return cosine(self.lr_max, self.lr_min, min((step - self.warm_up_steps) / decay, 1.0))


class LambdaWarmUpCosineScheduler2(Schedule):
    """Cycles of the above: entry k of every list belongs to cycle k. The last cycle goes on where they end."""

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        """verbosity_interval: LDM's, without effect. Raises UserError for lists of different lengths."""
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        for name, values in lists.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(warm_up_steps):
                raise UserError(
                    f"scheduler_config.params.{name} must be a list with one entry per cycle, not '{values}'"
                )
        self.cycles = list(zip(warm_up_steps, f_start, f_max, f_min, cycle_lengths, strict=True))
        self.ends = list(accumulate(cycle_lengths))

    def schedule(self, step: int) -> float:
        """Linear at the start of each cycle, then `decay` to its end; the last cycle goes on."""
        index = next((k for k, end in enumerate(self.ends) if step <= end), len(self.ends) - 1)
        warm_up, start, high, low, length = self.cycles[index]
        step -= self.ends[index] - length
        if step < warm_up:
            return start + (high - start) * step / warm_up
        return self.decay(high, low, step, warm_up, length)

    def decay(self, high: float, low: float, step: int, warm_up: int, length: int) -> float:
        """From `high` after `warm_up` steps to `low` at `length`, by a cosine."""
        return cosine(high, low, min((step - warm_up) / max(length - warm_up, 1), 1.0))


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Cycles that fall linearly; as in LDM the line starts from f_max at step 0 of the cycle, before its warm-up. After
    the last cycle it stays at f_min."""

    def decay(self, high: float, low: float, step: int, warm_up: int, length: int) -> float:
        """From `high` at the first step to `low` at `length`, by a straight line."""
        return low + (high - low) * max(length - step, 0) / length


def cosine(high: float, low: float, share: float) -> float:
    """Half a cosine from `high` at share 0 to `low` at share 1."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * share))
