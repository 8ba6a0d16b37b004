"""The networks of latent models, as rows of a table: what the `target` of an `unet_config` is built as, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from guided_mt.errors import UserError
from guided_mt.networks.backbone import Backbone
from guided_mt.networks.model import MTDiT, MTUNet
from guided_mt.networks.multi_task import MultiTask

from ..runs.targets import arguments
from .dit import DiT, SiT, dit_options, sit_options
from .unet import UNetModel, unet_options


@dataclass(frozen=True)
class NetworkRow:
    """make: the keywords that `read` makes of a file's params, and those of `MultiTask` -> the untrained network.

    Among the keywords are `context_dim`, the width of the tokens of a condition (None: there are none), `num_classes` (None: no
    classes) and `precision`. size: the keyword that is the side of the latents. width: keywords -> the width of a modality's
    tokens where mt_context_dim says none. learns_sigma: keywords -> whether the output has twice the channels, for learned
    variances. with_roles: keywords of a network whose class tells which image is z_0.
    """

    make: Callable[..., MultiTask]
    read: Callable[..., dict[str, Any]]
    size: str
    width: Callable[[Mapping[str, Any]], int]
    learns_sigma: Callable[[Mapping[str, Any]], bool] = lambda keywords: False
    with_roles: Mapping[str, Any] = field(default_factory=dict)


_DIT = NetworkRow(
    MTDiT,
    dit_options,
    "input_size",
    lambda keywords: keywords["hidden_size"],
    lambda keywords: keywords["learn_sigma"],
    {"class_dropout_prob": 0.0},  # a role is always told
)
NETWORKS: dict[type[Backbone], NetworkRow] = {
    UNetModel: NetworkRow(MTUNet, unet_options, "image_size", lambda keywords: 4 * keywords["model_channels"]),
    DiT: _DIT,
    SiT: replace(_DIT, read=sit_options, learns_sigma=lambda keywords: False),
}


@dataclass(frozen=True)
class Described:
    """A network as an `unet_config` describes it, before it is built: its row, and the keywords that the row read."""

    row: NetworkRow
    keywords: dict[str, Any]

    @property
    def precision(self) -> str:
        """Of its arithmetic."""
        return self.keywords["precision"]

    @property
    def context_dim(self) -> int | None:
        """The width of a condition's tokens; None: it is conditioned on none."""
        return self.keywords["context_dim"]

    @property
    def learn_sigma(self) -> bool:
        """Whether it says variances, too."""
        return self.row.learns_sigma(self.keywords)

    def build(self, size: int, sides: int, token_width: int, **multi_task: Any) -> MultiTask:
        """The untrained network on latents of `size`. sides: how many roles its class tells, 0 for none; token_width: of the
        tokens of modalities, -1 for the row's own; multi_task: keywords of `MultiTask`.

        Raises UserError for classes where the role takes their place.
        """
        # E(x) is made at the latents' size; LDM's key of this name is read by nothing else, and wrong in Stable Diffusion's files.
        options = {**self.keywords, self.row.size: size}
        if sides:
            if options["num_classes"] is not None:
                raise UserError(
                    "model.params.unet_config.num_classes: taken by mt_swap_prob, which tells the role as a class; write null"
                )
            options |= {"num_classes": sides, **self.row.with_roles}
        conditioned = self.context_dim is not None
        if multi_task["token_inputs"] and not conditioned:
            options["context_dim"] = token_width if token_width > 0 else self.row.width(options)
        return self.row.make(**multi_task, conditioned=conditioned, **options)


def described(unet_config: Mapping[str, Any]) -> Described:
    """What an `unet_config` means. Raises UserError for what is no network of NETWORKS, and as its row's `read` does."""
    cls, keywords = arguments(unet_config, "model.params.unet_config")
    if cls not in NETWORKS:
        raise UserError(
            f"model.params.unet_config: {unet_config['target']} is no U-Net and no transformer; there are "
            f"{', '.join(known.__name__ for known in NETWORKS)}"
        )
    return Described(NETWORKS[cls], NETWORKS[cls].read(**keywords))
