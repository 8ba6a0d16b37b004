"""Averaged weights: beside the weights in float32, or where memory is short on the host, or in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..runs.processes.shards import cut, gathered, is_shard, joined, own_part

DEVICES = ("same", "cpu")  # the values of --ema_device
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the values of --ema_dtype


class Ema:
    """Averaged copies of the weights, one per rate: average <- rate * average + (1 - rate) * weights.

    device: of DEVICES; "cpu" keeps the averages in the host's memory, which every update then waits for. dtype: of DTYPES; a
    bfloat16 has 8 bits, so that a step of 1 - rate would nearly always be rounded away: averages in bf16 are rounded up or down at
    random, by how near either is, which is right in the mean (stochastic rounding; the draws belong to the step). Of weights that
    are spread over the processes each process averages its part.
    """

    def __init__(self, model: nn.Module, rates: Iterable[str], device: str = "same", dtype: str = "fp32"):
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters: list[Tensor] = list(model.parameters())
        self.on_host, self.dtype = device == "cpu", DTYPES[dtype]
        self.plain = not self.on_host and self.dtype is torch.float32
        self.averages = {rate: [self._place(part) for part in self._own()] for rate in rates}
        self._aside: list[Tensor] | None = None  # the weights, while averages stand in their place

    def _own(self) -> list[Tensor]:
        """The weights, or this process's parts of them."""
        return [own_part(parameter) for parameter in self.parameters]

    def _place(self, value: Tensor) -> Tensor:
        """A copy where the averages lie and as they are kept."""
        device = torch.device("cpu") if self.on_host else value.device
        return value.detach().to(device, self.dtype, copy=True)

    @torch.no_grad()
    def update(self, warming: int | None = None, step: int = 0) -> None:
        """Move each average towards the parameters: average = rate average + (1 - rate) parameter.

        warming: the number of this update, from 1 on, where averages warm up: see `warmed`. None: the plain rate, as ADM. step: the
        optimiser's, which the draws of stochastic rounding belong to.
        """
        for rate, average in self.averages.items():
            kept = float(rate) if warming is None else warmed(float(rate), warming)
            if self.plain:
                torch._foreach_lerp_(average, self._own(), 1.0 - kept)
            else:
                self._update_slowly(average, 1.0 - kept, step)

    def _update_slowly(self, averages: list[Tensor], share: float, step: int) -> None:
        """Weight by weight, so that no more than one is there twice."""
        draws = None
        for average, parameter in zip(averages, self.parameters, strict=True):
            weight = own_part(parameter).to(average.device, torch.float32)
            moved = torch.lerp(average.float(), weight, share)
            if self.dtype is torch.float32:
                average.copy_(moved)
                continue
            if draws is None:
                draws = torch.Generator(average.device).manual_seed(step)
            average.copy_(rounded_at_random(moved, draws, parameter))

    def state_dict(self, rate: str, model: nn.Module) -> dict[str, Tensor]:
        """A whole state dict of `model` with the averaged weights of `rate`, in float32, in the place of its own. Of weights that
        are spread as `shards.gathered` has it."""
        pairs = zip(self.averages[rate], self.parameters, strict=True)
        averages = (gathered(joined(average.to(p.dtype), p)) for average, p in pairs)
        return {**model.state_dict(), **dict(zip(self.names, averages, strict=True))}

    @torch.no_grad()
    def load(self, rate: str, state: Mapping[str, Tensor]) -> None:
        """Set the average of `rate` to a saved state {parameter name: tensor}."""
        for name, average in zip(self.names, self.averages[rate], strict=True):
            average.copy_(state[name])

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averages to where the parameters were moved, and into their memory format; from whole ones, each process
        keeps its part where the parameters were spread since."""
        self.parameters = list(self.model.parameters())
        for rate, average in self.averages.items():
            pairs = zip(self._own(), average, self.parameters, strict=True)
            self.averages[rate] = [self._place(own).copy_(cut(a, p)) for own, a, p in pairs]

    @contextlib.contextmanager
    def slowest_in(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module`, which has the averaged weights, runs with the slowest of them (where there are any) in eval mode."""
        rate = max(self.averages, key=float, default=None)
        training = module.training
        module.eval()
        if rate is not None:
            self.swap(rate)
        try:
            yield
        finally:
            if rate is not None:
                self.swap(rate)
            module.train(training)

    @torch.no_grad()
    def swap(self, rate: str) -> None:
        """Exchange the model's weights and the average, in place; a second call exchanges them back."""
        if self.plain:
            for parameter, average in zip(self.parameters, self.averages[rate], strict=True):
                if is_shard(parameter):  # FSDP knows its memory
                    own = own_part(parameter)
                    aside = own.clone()
                    own.copy_(average)
                    average.copy_(aside)
                else:
                    parameter.data, average.data = average.data, parameter.data
            return
        values = self.averages[rate] if self._aside is None else self._aside
        self._aside = [own.to("cpu", copy=True) for own in self._own()] if self._aside is None else None
        for own, value in zip(self._own(), values, strict=True):
            own.copy_(value)


def rounded_at_random(values: Tensor, draws: torch.Generator, parameter: Tensor | None = None) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, to the nearer one more often: right in the mean.

    A bfloat16 is a float32 without its last 16 bits. With a random number of 16 bits added to them, what is cut off afterwards has
    carried over with the probability of its share. parameter: where values are this process's part of what has its shape; the
    draws are those of the whole, so that they don't depend on the number of processes.
    """
    whole = values if parameter is None else parameter
    noise = torch.randint(0, 1 << 16, whole.shape, generator=draws, device=values.device, dtype=torch.int32)
    noise = cut(noise, whole)
    bits = values.contiguous().view(torch.int32) + noise
    return (bits & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def warmed(rate: float, updates: int) -> float:
    """The rate of the n-th update, min(rate, (1 + n) / (10 + n)) (latent-diffusion's LitEma): the initial weights are soon gone."""
    return min(rate, (1 + updates) / (10 + updates))
