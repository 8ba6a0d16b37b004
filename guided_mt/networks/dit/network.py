"""A diffusion transformer (Peebles and Xie 2023): the constructor keywords, state-dict names and numerics of facebookresearch/DiT.

Ours on top: an image-like condition whose patches are added to those of x (`condition_in`), tokens of modalities, mixed precision
by autocast, activation checkpointing, and `features`, which hands the decoder heads what they read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ...errors import UserError
from ..backbone import Backbone, Features, read_last
from ..inputs import CheckedInputs
from ..layers import Context, timestep_embedding, zero_module
from ..routing import Route
from .blocks import DiTBlock, FinalLayer
from .positions import resized_positions, sin_cos_positions

CONTEXTS = ("cross", "in-context")
FREQUENCIES = 256  # of the timestep's sinusoids
INITIAL_SCALE = 0.02  # standard deviation of embeddings before training


class PatchEmbed(nn.Module):
    """Patches of x [B, C, H, W] as a map [B, width, H / patch, W / patch]; timm's names."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, width, h, w]."""
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    """Timesteps [B], may be fractional -> [B, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps [B] -> [B, width]."""
        dtype: Any = self.mlp[0].weight.dtype
        return self.mlp(timestep_embedding(timesteps, FREQUENCIES).to(dtype))


class LabelEmbedder(nn.Module):
    """Classes [B] -> [B, width]; -1 is no class: the null class behind the others where there is one, else zero."""

    def __init__(self, num_classes: int, width: int, has_null: bool):
        super().__init__()
        self.num_classes, self.has_null = num_classes, has_null
        self.embedding_table = nn.Embedding(num_classes + has_null, width)

    def forward(self, y: Tensor) -> Tensor:
        """y [B] -> [B, width]."""
        if self.has_null:
            return self.embedding_table(torch.where(y < 0, self.num_classes, y))
        return self.embedding_table(y.clamp(min=0)) * (y >= 0)[:, None]


class DiT(CheckedInputs, Backbone):
    """x [B, in_channels, H, W], timesteps [B], y [B] -> [B, out_channels, H, W] (facebookresearch/DiT: same names).

    class_dropout_prob: above 0 there is a null class, which y = -1 and y = num_classes stand for; how often a sample is shown it is
    up to the training (`unconditional` of `MultiTask.forward`). num_classes None: no classes at all. learn_sigma: the output has
    twice the channels. context_dim: width of an optional context [B, L, context_dim]; context "cross": each block attends to it,
    "in-context": its tokens stand before those of the image. condition_channels: channels of an image-like condition beside x.
    drops_sigma: of the final layer's output the first `in_channels` are used alone, whatever learn_sigma says (SiT).
    middle: the heads read what the first `middle` blocks made; None: half of them. precision: "fp32", "bf16" or "fp16" inside
    `features`; the final layer and the output are float32 always.

    x may have another size than input_size x input_size, in whole patches: positions are interpolated.
    Raises UserError for sizes that don't fit together.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        *,
        context_dim: int | None = None,
        context: str = "cross",
        condition_channels: int = 0,
        middle: int | None = None,
        drops_sigma: bool = False,
        use_checkpoint: bool = False,
        precision: str = "fp32",
    ):
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, depth, num_heads, middle)
        if context not in CONTEXTS:
            raise UserError(f"--dit_context must be one of {', '.join(CONTEXTS)}, not {context!r}")
        self.set_precision(precision)
        self.image_size = self.input_size = input_size
        self.size_divisor = self.patch_size = patch_size
        self.in_channels, self.condition_channels = in_channels, condition_channels
        made = (2 if learn_sigma else 1) * in_channels  # channels of the final layer
        self.out_channels = in_channels if drops_sigma else made
        self.num_classes, self.context_dim, self.context = num_classes, context_dim, context
        self.has_null_class = num_classes is not None and class_dropout_prob > 0
        self.feature_channels = self.middle_channels = self.hidden_size = hidden_size
        self.middle = depth // 2 if middle is None else middle

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, self.has_null_class)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sin_cos_positions(hidden_size, input_size // patch_size))
        crossed = context_dim if context == "cross" else None
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, crossed, use_checkpoint) for _ in range(depth)
        )
        self.final_layer = cast(FinalLayer, self.make_output(made))
        self._initialise()
        # Both from a copy of the generator, so that the other weights start as they would without them.
        with torch.random.fork_rng(devices=[]):
            if condition_channels:  # zero: a loaded model's output doesn't change before training
                self.condition_in = zero_module(
                    nn.Conv2d(condition_channels, hidden_size, patch_size, stride=patch_size, bias=False)
                )
            if context_dim is not None and context == "in-context":
                self.context_embedder = nn.Linear(context_dim, hidden_size)

    def _initialise(self) -> None:
        """Peebles and Xie's initial weights: Xavier for linear layers and patches, small embeddings, and zero where adaLN-Zero and
        the output say so."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "context_attn" not in name:
                nn.init.zeros_(module.bias)
                if "adaLN_modulation" not in name and name != "final_layer.linear":
                    nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]  # there is one
        embeddings: list[Any] = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        if self.num_classes is not None:
            embeddings.append(self.y_embedder.embedding_table)
        for module in embeddings:
            nn.init.normal_(module.weight, std=INITIAL_SCALE)

    @override
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
        self.check_inputs(x, timesteps, y, context, condition)
        height, width = (side // self.patch_size for side in x.shape[2:])
        with self.autocast(x):
            embedding = self.t_embedder(timesteps)
            if y is not None:
                embedding = embedding + self.y_embedder(y)
            h = self.x_embedder(x)
            if condition is not None:
                h = h + self.condition_in(condition)
            h = h.flatten(2).transpose(1, 2) + resized_positions(self.pos_embed, height, width)
            first, crossed, mask = 0, None, None
            if context is not None and self.context == "in-context":
                first = context.shape[1]
                h = torch.cat([self.context_embedder(context).to(h.dtype), h], dim=1)
                if context_mask is not None:
                    mask = F.pad(context_mask, (0, h.shape[1] - first), value=True)[:, None, None]
            elif context is not None:
                crossed = Context(context, context_mask)
            activated, middle = F.silu(embedding), h
            for number, block in enumerate(self.blocks, start=1):
                h = block(h, activated, crossed, mask)
                if number == self.middle:
                    middle = h
        last, middle = (
            part[:, first:].transpose(1, 2).unflatten(2, (height, width)).to(x.dtype) for part in (h, middle)
        )
        return Features(last, middle, embedding.to(x.dtype))

    def output(self, features: Features) -> Tensor:
        """The final layer on the features, outside autocast: [B, out_channels, H, W]."""
        return read_last(self.final_layer, features.last, features.embedding)[:, : self.out_channels]

    @property
    @override
    def trunk(self) -> nn.Module:
        return self.blocks[self.middle - 1]

    def make_output(self, channels: int) -> nn.Module:
        """A final layer to so many channels."""
        return FinalLayer(self.hidden_size, self.patch_size, channels)

    @override
    def context_parameters(self) -> Iterator[nn.Parameter]:
        return (
            p for name, p in self.named_parameters() if ".context_attn." in name or name.startswith("context_embedder.")
        )


def check_sizes(
    input_size: int, patch_size: int, hidden_size: int, depth: int, num_heads: int, middle: int | None
) -> None:
    """Raises UserError, in the words of the flags, for sizes that don't fit together."""
    if patch_size < 1 or input_size % patch_size:
        raise UserError(f"--image_size {input_size} is not a multiple of --dit_patch_size {patch_size}")
    if hidden_size % num_heads:
        raise UserError(f"--dit_hidden_size {hidden_size} is not a multiple of --dit_num_heads {num_heads}")
    if hidden_size % 4:
        raise UserError(f"--dit_hidden_size {hidden_size} is not a multiple of 4, which its positions need")
    if depth < 2:
        raise UserError(f"--dit_depth {depth}: at least two blocks are needed, so that heads have middle features")
    if middle is not None and not 1 <= middle <= depth:
        raise UserError(f"--dit_middle {middle}: there are blocks 1 to {depth} (--dit_depth)")
