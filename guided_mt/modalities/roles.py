"""Which image of a sample is z_0, where it holds several: the others are modalities (docs/method.md, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..diffusion.random import SampleStreams


@dataclass(frozen=True)
class Roles:
    """The sides of a sample, images of the same thing: sides[0] is its image, the others are the modalities `slots`.

    In role 0 the image is z_0. In role k > 0 side k is z_0, and the modality slots[k - 1] is the image in its place. shares[k - 1]:
    how often side k is z_0 in training; the image is z_0 in the rest. The network is told the role as a class, where it
    is trained in more than one.
    """

    sides: tuple[str, ...] = ("image",)
    slots: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """The roles that occur in training."""
        others = tuple(k for k, share in enumerate(self.shares, 1) if share > 0)
        return others if sum(self.shares) >= 1 else (0, *others)

    @property
    def told(self) -> bool:
        """Whether the network is told the role."""
        return len(self.trained) > 1

    @property
    def setting(self) -> str:
        """How `mt_swap_prob` says the shares."""
        each = [f"{side} {share:g}" for side, share in zip(self.sides[1:], self.shares, strict=True)]
        return f"mt_swap_prob {', '.join(each) if len(each) > 1 else f'{sum(self.shares):g}'}"

    def draw(self, streams: SampleStreams) -> Tensor:
        """Each sample's role in training, int64 [B]."""
        u, below = streams.uniform(), 0.0
        role = torch.zeros_like(u, dtype=torch.int64)
        for k, share in enumerate(self.shares, 1):  # of sides, not of samples
            role = torch.where((u >= below) & (u < below + share), k, role)
            below += share
        return role

    def possible(self, role: Tensor, present: Mapping[str, Tensor]) -> Tensor:
        """`role` [B], 0 where the side that it makes z_0 is not `present` {modality: bool [B]}."""
        for k, name in enumerate(self.slots, 1):
            if name in present:
                role = torch.where((role == k) & ~present[name], 0, role)
        return role

    def exchange(self, x_start: Tensor, data: Mapping[str, Tensor], role: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(z_0, {modality: x}) in these roles [B], of (z_0, x) in role 0."""
        data, z_0 = dict(data), x_start
        for k, name in enumerate(self.slots, 1):
            chosen = (role == k).view(-1, 1, 1, 1)
            z_0, data[name] = torch.where(chosen, data[name], z_0), torch.where(chosen, x_start, data[name])
        return z_0, data

    def names(self, role: int) -> dict[str, str]:
        """{modality: side that stands in its place} in this role."""
        return {
            name: self.sides[0] if k == role else side
            for k, (name, side) in enumerate(zip(self.slots, self.sides[1:], strict=True), 1)
        }

    def role_of(self, side: str) -> int:
        """The role in which this side is z_0. Raises ValueError for a name that is no side."""
        return self.sides.index(side)


def variance_name(name: str, role: int) -> str:
    """How a modality's tracked head variance in a role is called."""
    return name if role == 0 else f"{name}_swapped{role if role > 1 else ''}"


def roles_of(sides: Sequence[str], slots: Sequence[str], shares: Sequence[float]) -> Roles:
    """Raises ValueError for names twice, and shares outside 0..1 or above 1 together."""
    if len(set(sides)) != len(sides):
        raise ValueError(f"the sides {', '.join(sides)} need different names")
    if any(not 0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ValueError(f"must be between 0 and 1, and at most 1 together, not {', '.join(f'{s:g}' for s in shares)}")
    return Roles(tuple(sides), tuple(slots), tuple(shares))
