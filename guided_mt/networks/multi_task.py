"""The multi-task part of the denoiser: a decoder head per modality, and what the network is given (docs/method.md, section 3).

It stands over a backbone and knows only what `Backbone` says of it. A modality enters as an image, concatenated to the input, or
as tokens that the backbone attends to. E(x) of a modality without pixels is a pass of this same network (`encode_modality`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion.network import ModelOutput, Told
from ..errors import UserError
from .backbone import Backbone
from .heads import HeadInputs, HeadVariance, VectorUnits
from .layers import Context
from .routing import Routing

VARIANTS = ("U", "X", "any")


class MultiTask(Backbone):
    """(z_t, t, modalities) -> ModelOutput. Inherited before a backbone, to whose state dict it adds `heads.*`, `condition_in.*`,
    `context_in.*`, `null_token.*`, `modality_embedding.*`, `units.*` and `head_variance.*`.

    heads: {modality name: function of this network, as a backbone, that makes the head}. image_inputs: {name: channels} of the
    modalities that enter as images; token_inputs: {name: function of the context width that makes the module x -> tokens [B, L,
    width]}. lacking: names of image inputs that some samples have no data of. tracked: names under which the squared errors of
    heads are tracked over num_timesteps (see `track`). units: {name: D} of modalities whose vectors have `VectorUnits`.
    conditioned: whether the caller brings tokens of its own as `context`. roles: the classes say which image is z_0, so that
    they are told of `unconditional` samples too. routing: which channels the blocks compute on. told: how the backbone is told z_t
    and t, where not as they are; the heads always get them as they are. embedded: whether each modality's tokens, its null token
    too, have a learned vector added that says whose they are, zero at first. The rest are the backbone's keywords.

    variant "U" sees z_t alone; "X" is given its modalities, and "any" those that a sample has. A given modality leaves the
    frame. What is not given is zero (an image) or has no token; in U and any a modality with tokens that stands in the frame
    shows a learned null token, and in any each image comes with an indicator channel: 1 given, 0 open, -1 absent. In U and X the
    images that are `lacking` at times have one too. An absent modality has no token. Beside the caller's context, tokens that learn
    nothing have no null token: there is always something to attend to, and a network that was trained with that context alone still
    says what it said.
    """

    def __init__(
        self,
        *,
        heads: Mapping[str, Callable[[Backbone], nn.Module]],
        image_inputs: Mapping[str, int] | None = None,
        token_inputs: Mapping[str, Callable[[int], nn.Module]] | None = None,
        lacking: Collection[str] = (),
        tracked: Collection[str] = (),
        units: Mapping[str, int] | None = None,
        variant: str = "U",
        num_timesteps: int = 1000,
        context_dim: int | None = None,
        conditioned: bool = False,
        roles: bool = False,
        routing: Routing | None = None,
        told: Told | None = None,
        embedded: bool = False,
        **backbone: Any,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant '{variant}'; choose from {', '.join(VARIANTS)}")
        if token_inputs and context_dim is None:
            raise ValueError("modalities that enter as tokens need a context_dim")
        images = dict(image_inputs or {})
        inputs = images if variant != "U" else {}
        indicated = list(images) if variant == "any" else [name for name in images if name in lacking]
        backbone["condition_channels"] = sum(inputs.values()) + len(indicated)
        super().__init__(**backbone, context_dim=context_dim if token_inputs or conditioned else None)
        if routing is not None and not self.routes:
            raise UserError(f"--mt_routing: {type(self).__name__} has no channels that can be routed; take none")
        self.routing, self.told = routing, told
        self.variant, self.image_inputs, self.indicated, self.num_timesteps = variant, inputs, indicated, num_timesteps
        self.lacking, self.roles = [name for name in images if name in lacking], roles
        self.heads = nn.ModuleDict({name: make(self) for name, make in heads.items()})
        self.head_variance = nn.ModuleDict()
        self.track(tracked)
        width = context_dim or 0
        self.context_in = nn.ModuleDict({name: make(width) for name, make in (token_inputs or {}).items()})
        if variant == "U":
            self.context_in.requires_grad_(False)  # read only by `encode_modality`, which has no gradient
        learning = [
            n for n, tokens in self.context_in.items() if not conditioned or any(True for _ in tokens.parameters())
        ]
        in_frame = learning if variant != "X" else ()
        self.null_token = nn.ParameterDict({name: nn.Parameter(torch.randn(1, width)) for name in in_frame})
        of_tokens = self.context_in if embedded else ()
        self.modality_embedding = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in of_tokens})
        self.units = nn.ModuleDict({name: VectorUnits(size) for name, size in (units or {}).items()})

    def track(self, names: Collection[str]) -> None:
        """Track squared errors of heads under these names."""
        for name in names:
            self.head_variance[name] = HeadVariance(self.num_timesteps)

    def freeze_context(self) -> None:
        """For training without any modality (every sample `unconditional`): what is not read gets no gradient."""
        unread = [*self.context_in.parameters(), *self.null_token.parameters(), *self.modality_embedding.parameters()]
        for parameter in [*unread, *self.context_parameters()]:
            parameter.requires_grad_(False)

    def forward(  # type: ignore[override]  # of a backbone with modalities
        self,
        z_t: Tensor,
        timesteps: Tensor,
        modalities: Mapping[str, Tensor] | None = None,
        y: Tensor | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
        absent: Mapping[str, Tensor] | None = None,
        unconditional: Tensor | bool | None = None,
        context: Tensor | None = None,
        unconditional_context: Tensor | None = None,
        with_middle: bool = False,
    ) -> ModelOutput:
        """z_t [B, C, H, W], timesteps [B], modalities {name: x} what is given, y [B] class ids.

        given: {name: bool [B]} where only some samples are given a modality. absent: {name: bool [B]}, the samples whose data
        have none of it: they stand in no frame of it and are given none. unconditional: bool [B], or one for all: the
        samples that are seen as ADM sees them, with no modality, class or context at all; only of the role they are told. context
        [B, L, context_dim]: tokens of the caller, beside those of the modalities; unconditional_context [B, L, context_dim]: those
        that `unconditional` samples see in their place, such as an empty or negative prompt's, instead of none. with_middle: return
        the middle features, too. Raises ValueError for a modality that this form isn't given, and for an absent one that it can't
        be told of.
        """
        if unconditional is False:
            unconditional = None
        x = dict(modalities or {})
        for name in x:
            if self.variant == "U" or (name not in self.image_inputs and name not in self.context_in):
                wanted = (
                    ", ".join([*self.image_inputs, *self.context_in] if self.variant != "U" else []) or "no modality"
                )
                raise ValueError(f"variant {self.variant} is given {wanted}; got {name}")
        for name in absent or {}:
            if name not in self.indicated and name not in self.context_in:
                known = ", ".join([*self.indicated, *self.context_in]) or "none"
                raise ValueError(f"this network can't be told that {name} is absent; it can of {known}")
        state = _State(x, given or {}, absent or {}, unconditional)
        condition = self._condition(z_t, state) if self.condition_channels else None
        keeps = False
        if context is not None and unconditional is not None and unconditional_context is not None:
            keeps, context = True, _chosen(unconditional, unconditional_context, context)
        if unconditional is True:
            shown = Context(context) if keeps and context is not None else None
        else:
            shown = self._context(len(z_t), state, context, keeps)
        if y is not None and unconditional is not None and not self.roles:
            y = torch.full_like(y, -1) if unconditional is True else torch.where(unconditional, -1, y)
        tokens, mask = shown or (None, None)
        route: Any = {} if self.routing is None else {"route": self.routing.of_timesteps(timesteps)}
        features = self.features(*self._told(z_t, timesteps), y, tokens, condition, mask, **route)
        output = self.output(features)
        seen = HeadInputs(features.last, features.middle, z_t, timesteps, output, features.embedding)
        predictions = {name: head(seen) for name, head in self.heads.items()}
        return ModelOutput(output, predictions, features.middle if with_middle else None)

    @torch.no_grad()
    def encode_modality(self, name: str, x: Tensor) -> Tensor:
        """E(x) [B, C, H, W] of a modality with tokens: the output for an image of zeros at time zero, with x as context
        (docs/method.md, section 10.4). Without gradient and without dropout."""
        size = (len(x), self.in_channels, self.image_size, self.image_size)
        zeros = torch.zeros(size, device=x.device)
        condition = zeros.new_zeros(len(x), self.condition_channels, *size[2:]) if self.condition_channels else None
        classes = None if self.num_classes is None else torch.full((len(x),), -1, device=x.device)
        shown = self._context(len(x), _State({name: x}))
        tokens = None if shown is None else shown.tokens
        route: Any = {} if self.routing is None else {"route": self.routing.of_task(name, x)}
        with _NoDropout(self):
            told = self._told(zeros, zeros.new_zeros(len(x)))
            return self.output(self.features(*told, classes, tokens, condition, **route))[:, : self.in_channels]

    def _told(self, z_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return (z_t, timesteps) if self.told is None else self.told(z_t, timesteps)

    def _condition(self, z_t: Tensor, state: _State) -> Tensor:
        """The image inputs [B, condition_channels, H, W], zero where not given, each followed by its indicator if it has one."""
        parts, one = [], z_t.new_ones(len(z_t), 1, 1, 1)
        for name in self.image_inputs or self.indicated:
            shown = state.shown(name, one)
            if name in self.image_inputs:
                size = (len(z_t), self.image_inputs[name], *z_t.shape[2:])
                x = state.x
                parts.append(x[name].to(z_t.dtype) * shown if name in x else z_t.new_zeros(size))
            if name in self.indicated:
                told = shown - state.missing(name, one) if name in state.absent or name in self.lacking else shown
                parts.append(told.expand(-1, 1, *z_t.shape[2:]))
        return torch.cat(parts, dim=1)

    def _context(self, batch: int, state: _State, own: Tensor | None = None, keeps_own: bool = False) -> Context | None:
        """The caller's `own` tokens, then those of all modalities that have some, [B, L, width], or None; a mask where some are
        left out of some samples. keeps_own: unconditional samples see `own` too."""
        x, given, unconditional = state.x, state.given, state.unconditional
        tokens, shown, partly = [], [], unconditional is not None and not (keeps_own and not self.context_in)
        if own is not None:
            tokens.append(own)
            shown.append(own.new_ones(own.shape[:2], dtype=torch.bool))
        for name, module in self.context_in.items():
            null = self.null_token[name].expand(batch, -1, -1) if name in self.null_token else None
            part = module(x[name]) if name in x else null
            if part is None:
                continue
            seen = part.new_ones(part.shape[:2], dtype=torch.bool)
            if name in given and null is not None and name in x:
                part = torch.where(given[name].view(-1, 1, 1), part, null)
                seen[:, 1:] = given[name][:, None]  # the null token once, however many tokens x has
                partly = partly or part.shape[1] > 1
            elif name in given and null is None:
                seen, partly = seen & given[name][:, None], True
            if name in state.absent:
                seen, partly = seen & ~state.absent[name][:, None], True
            tokens.append(part + self.modality_embedding[name] if name in self.modality_embedding else part)
            shown.append(seen)
        if not tokens:
            return None
        if not partly:
            return Context(torch.cat(tokens, dim=1))
        if unconditional is not None:
            shown = [seen if i == 0 and keeps_own else seen & ~unconditional[:, None] for i, seen in enumerate(shown)]
        return Context(torch.cat(tokens, dim=1), torch.cat(shown, dim=1))


def _chosen(which: Tensor | bool, those: Tensor, others: Tensor) -> Tensor:
    """Tokens [B, L, width] of `those` where `which` is true, bool [B] or for all, else of `others`."""
    return those if which is True else torch.where(which.view(-1, 1, 1), those, others)  # type: ignore[union-attr]


class _State(NamedTuple):
    """What each sample is given, lacks, or is seen without: the arguments of `MultiTask.forward`."""

    x: Mapping[str, Tensor]
    given: Mapping[str, Tensor] = {}
    absent: Mapping[str, Tensor] = {}
    unconditional: Any = None

    def shown(self, name: str, one: Tensor) -> Tensor:
        """1 where the image `name` is given, else 0; of the shape of `one` [B, 1, 1, 1]."""
        shown = one if name in self.x else torch.zeros_like(one)
        if name in self.given:
            shown = self.given[name].view(-1, 1, 1, 1).to(one.dtype)
        if name in self.absent:
            shown = shown * (~self.absent[name]).view(-1, 1, 1, 1)
        if self.unconditional is None:
            return shown
        return shown * (0.0 if self.unconditional is True else (~self.unconditional).view(-1, 1, 1, 1).to(shown.dtype))

    def missing(self, name: str, one: Tensor) -> Tensor:
        """1 where the image `name` is absent or the sample is seen without any, else 0."""
        missing = self.absent[name].view(-1, 1, 1, 1).to(one.dtype) if name in self.absent else torch.zeros_like(one)
        if self.unconditional is None:
            return missing
        if self.unconditional is True:
            return torch.ones_like(one)
        return torch.where(self.unconditional.view(-1, 1, 1, 1), 1.0, missing)


class _NoDropout:
    """Inside, `model` drops nothing out. A class, since a generator would break the graph in torch 2.6."""

    def __init__(self, model: nn.Module):
        self.active = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p > 0]

    def __enter__(self) -> None:
        for module in self.active:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module in self.active:
            module.training = True
