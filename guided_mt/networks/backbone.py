"""What a denoiser network is asked for by the multi-task half of the model, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from .layers import FastLayout
from .routing import Route


class Features(NamedTuple):
    """What decoder heads read, in the input's dtype."""

    last: Tensor  # (B, feature_channels, H', W'): input of the output block
    middle: Tensor  # (B, middle_channels, h, w): where positions are fewest or half of the depth lies behind
    embedding: Tensor | None = None  # (B, E): of timesteps and classes, where the output block reads it too


def read_last(module: nn.Module, last: Tensor, embedding: Tensor | None) -> Tensor:
    """What an output block (`Backbone.make_output`) makes of the last features, in float32 whatever the caller's autocast."""
    with torch.autocast(last.device.type, enabled=False):
        return module(last) if embedding is None else module(last, embedding)


class Backbone(FastLayout):
    """A denoiser x [B, in_channels, H, W], timesteps [B] -> [B, out_channels, H, W] that knows of no modality.

    Its constructor takes, beside keywords of its own, `context_dim`, the width of the tokens it attends to (None: it reads none),
    and `condition_channels`, those of an image-like condition beside x.
    """

    image_size: int
    size_divisor: int  # of height and width; this and the next two are asked by latent models alone
    precision: str
    out_channels: int
    in_channels: int
    condition_channels: int
    num_classes: int | None
    feature_channels: int
    middle_channels: int
    routes = False  # whether `features` takes a `route`
    has_null_class = (
        False  # whether y = -1 is a class that it learns, as for classifier-free guidance, and not just none
    )

    @property
    def trunk(self) -> nn.Module:
        """The module that returns the middle features, on which the tasks' gradients are compared. Raises UserError without one."""
        raise UserError(
            f"--mt_task_weighting: {type(self).__name__} does not say which module makes its middle features (Backbone.trunk); "
            "take fixed or uncertainty"
        )

    def features(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        condition: Tensor | None = None,
        context_mask: Tensor | None = None,
        route: Route | None = None,
    ) -> Features:
        """What the output and the heads are made of. x [B, in_channels, H, W], timesteps [B] (may be fractional).

        y [B]: classes, -1 for none; context [B, L, context_dim], context_mask bool [B, L]: False leaves a token out;
        condition [B, condition_channels, H, W]; route: where the windows lie that its blocks compute on, given where it `routes`.
        Raises UserError for inputs that this network can't take.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The output [B, out_channels, H, W], float32. Arguments as `features`."""
        return self.output(self.features(x, timesteps, y, context, condition))

    def output(self, features: Features) -> Tensor:
        """[B, out_channels, H, W] float32 of the features, whatever the caller's autocast."""
        raise NotImplementedError

    def make_output(self, channels: int) -> nn.Module:
        """An untrained module like the network's own output, for a head: it takes `features.last`, and `features.embedding` where
        there is one, and returns [B, channels, H, W]."""
        raise NotImplementedError

    def context_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that only the context reaches."""
        raise NotImplementedError
