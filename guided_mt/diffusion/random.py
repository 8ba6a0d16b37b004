"""Random numbers that belong to a sample: a function of (seed, sample index, draw) and of nothing else.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) in integer tensor operations: a whole
batch is drawn at once on its device, and sample k gets the same numbers in any batch, on any rank, after any restart. On a GPU
the operations of a draw, some 170, are one kernel.
"""

from __future__ import annotations

import enum
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
POOL = 64  # uniform numbers drawn at once
log = logging.getLogger("guided_mt")


@enum.unique
class Stream(enum.IntEnum):
    """What a sample draws random numbers for when a model is used: the `index` of its streams, beside the sample's own seed.

    Each use has a number of its own, so that no two draws of one sample are the same numbers. Training has other streams: of the
    run's seed and the sample's position. A number once given stays, since samples of old seeds rest on it.
    """

    SAMPLING = 0  # the noise at T, first values of unknown modalities, and the noise of each step
    NOISED_START = 1  # the noise that is put on a given image, where sampling starts (SDEdit)
    CLASS = 2  # the class of a class-conditional model
    INPUT = 3  # what is done to given images: their masks, or the noise under which a head reads them
    LABEL_DRAW = 4  # a label drawn from the estimated probabilities
    LATENT_CLASS = 5  # the class of a class-conditional latent model
    DEFAULTS = 6  # what form X is given where nothing is asked for
    PREVIEW = 7  # the modalities of a preview's training images


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of counter and two of key -> four random words. int64 tensors that hold 0..2^32-1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32x32-bit product wraps into int64's sign; shifting and masking still give its two halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0),
            product1.bitwise_and_(_MASK),
            (product0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1),
            product0.bitwise_and_(_MASK),
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream_words(
    blocks: Tensor, draw: Tensor, index: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Four int64 tensors [B, n] of 32 random bits each: the blocks [n] of the draw [] of streams by the halves of index and key,
    [B, 1] each.

    The counter's words are masked although they are small already. Inductor would take the numbers of an `arange` for addresses,
    multiply them as such in 32 bits on a GPU, and make other random numbers; what was masked is a value.
    """
    size = (len(index[0]), len(blocks))
    block, number = (blocks & _MASK).expand(size), (draw & _MASK).expand(size)
    return philox((block, number, index[0].expand(size), index[1].expand(size)), key)


@functools.cache
def one_kernel() -> Callable[..., tuple[Tensor, ...]]:
    """`stream_words` as one compiled kernel, the same to the bit: integers don't round. Its sizes are variables, so that it is
    compiled once for any batch and count (and once more where one of them is 1). Without a compiler it is the plain function, and
    a warning says so."""
    compiled, works = torch.compile(stream_words, dynamic=True), True

    @torch.no_grad()  # else it would be compiled once more outside of it
    def words(*arguments: Any) -> tuple[Tensor, ...]:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many kinds: no C compiler, no Triton, a GPU that it doesn't know
                works = False
                log.warning(
                    "random numbers are drawn slower, as they can't be compiled here: %s", str(error).partition("\n")[0]
                )
        return stream_words(*arguments)

    return words


def _vector(values: Tensor | int, device: torch.device | str) -> Tensor:
    """int64 [B], or [1] for a number, which is filled in on the device: copying it there would wait for the host."""
    if isinstance(values, int):
        return torch.full((1,), values, dtype=torch.int64, device=device)
    return torch.atleast_1d(torch.as_tensor(values, dtype=torch.int64, device=device))


class SampleStreams:
    """One random stream per sample of a batch.

    seeds, index: int64 [B] or a number; stream b is that of (seeds[b], index[b]): in training the run's seed and the sample's
    position, else the sample's seed and a `Stream`. Successive draws of one object differ and are numbered, so the order of the
    calls is part of the result.
    """

    def __init__(
        self, seeds: Tensor | int, index: Tensor | int = Stream.SAMPLING, *, device: torch.device | str = "cpu"
    ):
        seed, sample = torch.broadcast_tensors(_vector(seeds, device), _vector(index, device))
        self._key = ((seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None])
        self._index = ((sample & _MASK)[:, None], ((sample >> 32) & _MASK)[:, None])
        self._draw = 0
        self._pool = torch.empty(len(self), 0, device=seed.device)
        self.device = seed.device

    def __len__(self) -> int:
        return len(self._index[0])

    def words(self, count: int) -> tuple[Tensor, ...]:
        """Four int64 tensors [B, ceil(count / 4)] of 32 random bits each: the next draw."""
        blocks = torch.arange(-(-count // 4), device=self.device)
        draw = torch.full((), self._draw, device=self.device)
        self._draw += 1
        # Within a function that is being compiled as a whole, the operations become part of it.
        separate = self.device.type == "cuda" and not torch.compiler.is_compiling()
        return (one_kernel() if separate else stream_words)(blocks, draw, self._index, self._key)

    def uniform(self, *shape: int) -> Tensor:
        """float32 [B, *shape] in [0, 1)."""
        count = math.prod(shape)
        if self._pool.shape[1] < count:  # small draws share one pass of the generator, which is many kernels long
            u = torch.stack(self.words(max(count, POOL)), dim=-1).flatten(1) >> 8
            self._pool = u.float() * 2.0**-24
        taken, self._pool = self._pool[:, :count], self._pool[:, count:]
        return taken.reshape(len(self), *shape)

    def integers(self, bound: int, *shape: int) -> Tensor:
        """int64 [B, *shape] in 0..bound-1 (bound well below 2^24)."""
        return (self.uniform(*shape) * bound).long().clamp_(max=bound - 1)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 [B, *shape], by Box-Muller."""
        count = math.prod(shape)
        w0, w1, w2, w3 = self.words(count)
        radius = torch.stack([w0, w2]).add_(1).float().mul_(2.0**-32).log_().mul_(-2.0).sqrt_()  # u in (0, 1]
        angle = torch.stack([w1, w3]).float().mul_(2.0 * math.pi * 2.0**-32)
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
        return values.permute(1, 2, 0, 3).reshape(len(self), -1)[:, :count].reshape(len(self), *shape)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout is the only draw that is torch's own: tied to the step, so that resuming repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
