"""Which timestep each training sample gets, and its importance weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .intervals import timestep_intervals

STRATA = 5  # intervals of the timesteps, unless a run says which


class UniformSampler(nn.Module):
    """Every timestep alike, weight 1."""

    by_interval = False  # whether it draws by intervals of the timesteps

    learns = False  # whether `update` has to be told the losses

    def __init__(self, num_timesteps: int):
        super().__init__()
        self.num_timesteps = num_timesteps

    def forward(self, u: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B] in [0, 1) -> timesteps [B] and weights [B]. positions: int64 [B], of the samples in the run."""
        return (u * self.num_timesteps).long().clamp_(max=self.num_timesteps - 1), torch.ones_like(u)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the losses [B] of all processes at t [B]; nothing to learn here."""


class LossSecondMomentResampler(UniformSampler):
    """IDDPM eq. 18: p_t proportional to sqrt(E[L_t^2]) over the last `history` losses of each t, once all t have that many.

    A ring of losses per timestep lives on the device and takes a whole batch at once.
    """

    learns = True
    losses: Tensor  # [T, history]
    counts: Tensor  # [T], losses seen at each timestep

    def __init__(self, num_timesteps: int, history: int = 10, uniform_prob: float = 0.001):
        super().__init__(num_timesteps)
        self.history, self.uniform_prob = history, uniform_prob
        self.register_buffer("losses", torch.zeros(num_timesteps, history))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def weights(self) -> Tensor:
        """The probabilities p_t [T]; uniform while warming up."""
        learned = self.losses.square().mean(dim=1).sqrt()
        learned = (
            learned / learned.sum().clamp(min=1e-30) * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        )
        warm = (self.counts >= self.history).all()
        return torch.where(warm, learned, torch.full_like(learned, 1.0 / self.num_timesteps))

    def forward(self, u: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B] in [0, 1) -> (t int64 [B], loss weights [B]), with t drawn in proportion to `weights`."""
        p = self.weights()
        t = torch.searchsorted(p.double().cumsum(0), u.double() * p.double().sum()).clamp_(max=self.num_timesteps - 1)
        return t, 1.0 / (self.num_timesteps * p[t])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Note the losses [B] of the timesteps t [B].

        Of each timestep the last `history` are kept; losses that are not finite are left out.
        """
        order = torch.argsort(t, stable=True)
        t, losses = t[order], losses[order]
        repeats = torch.zeros_like(self.counts).index_add_(
            0, t, torch.ones_like(t)
        )  # how often each t is in this batch
        first = repeats.cumsum(0) - repeats
        nth = torch.arange(len(t), device=t.device) - first[t]  # 0, 1, ... among the equal ones
        # Of more than `history` equal timesteps only the last ones stay, as if they had come one by one.
        stays = (nth >= repeats[t] - self.history) & torch.isfinite(losses)
        slot = (self.counts[t] + nth) % self.history
        flat, where = self.losses.view(-1), t * self.history + slot
        kept = torch.where(stays, losses, flat[where])
        # Left-out entries share a slot with one that stays: send them to a slot of their own beyond the end.
        padded = torch.cat([flat, torch.zeros(1, device=flat.device)])
        padded[torch.where(stays, where, flat.numel())] = kept
        flat.copy_(padded[:-1])
        self.counts.add_(repeats)


class StratifiedSampler(UniformSampler):
    """Each of k intervals of the timesteps as often as the others (Go et al. 2023, ANT): sample number n of the run is of interval
    n mod k, and uniform in it. The weight k |interval| / T of a sample keeps the mean over all timesteps.

    Samples follow each other in a batch, so a batch of any multiple of k has all intervals alike often, on any number of processes.
    """

    by_interval = True
    sizes: Tensor  # [k], timesteps of each interval
    starts: Tensor  # [k], the first of each

    def __init__(self, num_timesteps: int, interval_of: Tensor | None = None):
        super().__init__(num_timesteps)
        if interval_of is None:
            count = min(STRATA, num_timesteps)
            interval_of = torch.from_numpy(timestep_intervals("uniform", np.ones(num_timesteps), count))
        sizes = interval_of.bincount()
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)

    def forward(self, u: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B] in [0, 1) -> (t int64 [B], loss weights [B]). Without positions, those of a run's first samples."""
        positions = torch.arange(len(u), device=u.device) if positions is None else positions
        mine = positions % len(self.sizes)
        size = self.sizes[mine]
        within = torch.minimum((u * size).long(), size - 1)
        return self.starts[mine] + within, (len(self.sizes) * size / self.num_timesteps).to(u.dtype)


SCHEDULE_SAMPLERS: dict[str, type[UniformSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
    "stratified": StratifiedSampler,
}


def create_named_schedule_sampler(name: str, num_timesteps: int, interval_of: Tensor | None = None) -> UniformSampler:
    """ADM's `--schedule_sampler`. interval_of: int64 [T], for a sampler that draws by intervals, see `intervals`.

    Raises ValueError for a name that is not in SCHEDULE_SAMPLERS.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(f"schedule_sampler: unknown '{name}'; choose from {', '.join(SCHEDULE_SAMPLERS)}")
    row = SCHEDULE_SAMPLERS[name]
    if issubclass(row, StratifiedSampler):
        return row(num_timesteps, interval_of)
    return row(num_timesteps)
