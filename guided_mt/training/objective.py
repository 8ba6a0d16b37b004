"""Algorithm 2: ADM's loss in the moving frame plus lambda times one term per modality (eq. 6), weighed as the run says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.process import GaussianDiffusion
from ..diffusion.random import SampleStreams
from ..modalities import Images, Modality, Roles
from ..modalities.tokens import rms
from ..modalities.weighting.over_tasks import sum_of
from ..modalities.weighting.over_time import IMAGE
from ..modalities.weighting.settings import Weighting
from .terms.alignment import ALIGN, Alignment


@dataclass
class Losses:
    """All [B]. `loss` is what is minimised: the sum of `objectives`, as the run weighs the tasks, and the term of the alignment,
    where there is one. objectives {task: values}: `denoising`, ADM's loss, and lambda times each modality's term, with their
    weights over time.

    terms {name: values}: its parts, unweighted. encoding_rms {name: values}: the sizes of the encodings in the frame. taught
    {name: values}: 1 where a modality's term is part of the loss, not for samples that were trained unconditionally
    (`mt_drop_prob`) nor where the data have none of it. predicted {name: values}: 1 where the term tells how well a head
    predicts, where it is taught and form any was not given the modality. figures {FIGURE_NAME: values}: what else is logged of
    the heads' predictions; they are in `predicted` as well. role: which side is z_0, whole numbers.
    """

    loss: Tensor
    objectives: dict[str, Tensor]
    terms: dict[str, Tensor]
    encoding_rms: dict[str, Tensor]
    taught: dict[str, Tensor]
    predicted: dict[str, Tensor]
    figures: dict[str, Tensor]
    role: Tensor

    @property
    def denoising(self) -> Tensor:
        """The image's objective [B]."""
        return self.objectives[IMAGE]


def multi_task_losses(
    model: Callable,
    diffusion: GaussianDiffusion,
    modalities: Mapping[str, Modality],
    images: Images,
    t: Tensor,
    noise: Tensor,
    streams: SampleStreams,
    *,
    variant: str = "U",
    loss_weight: float | Mapping[str, float] = 0.1,
    drop_prob: float = 0.0,
    given_prob: float = 0.5,
    model_kwargs: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
    role: Tensor | None = None,
    weighting: Weighting | None = None,
    alignment: Alignment | None = None,
) -> Losses:
    """images of B samples, t [B], noise [B, C, H, W]; streams: the samples' own random numbers, for masks, drops and choices.

    variant "U": every modality stands in the frame; "X": every modality is given to the network and leaves the frame; "any": each
    is given to each sample with probability `given_prob`. A modality that a sample's data lack (`Modality.present`) is in no frame,
    isn't given and has no loss, and the model is told by `absent`. loss_weight: lambda, or one per modality.
    drop_prob: the share of samples trained unconditionally: no frame, nothing given, no modality loss (docs/method.md,
    section 10.6). The model is told which by `unconditional`, and in form any what is given by `given`, as `MultiTask.forward`
    takes them. role [B]: which of the sides of `roles` is z_0; the model is told as its class. None: the image is. weighting: of
    the terms over time, and of the tasks; None: none but lambda. alignment: of the middle features with z_0, for all samples alike.
    """
    dropped = streams.uniform() < drop_prob  # (B,)
    data = {name: modality.from_batch(images, streams) for name, modality in modalities.items()}
    found = {name: modality.present(images) for name, modality in modalities.items()}
    present = {name: mask for name, mask in found.items() if mask is not None}
    x_start, kwargs = images.x_start, dict(model_kwargs or {})
    if role is None or roles is None:
        role = torch.zeros_like(t)
    else:
        role = roles.possible(role, present)
        x_start, data = roles.exchange(x_start, data, role)
        if roles.told:
            kwargs["y"] = role
    learned = {name: ~dropped & present[name] if name in present else ~dropped for name in modalities}
    given: dict[str, Tensor] = {}
    if variant == "any":
        given = {name: (streams.uniform() < given_prob) & learned[name] for name in modalities}
    encodings: dict[str, Tensor] = {}
    if variant != "X":
        with torch.no_grad():  # e_i = stop_gradient(E_i(x_i))
            encodings = {name: modality.encode(data[name]) for name, modality in modalities.items()}
    in_frame = {}
    for name, encoding in encodings.items():
        inside = learned[name] & ~given[name] if name in given else learned[name]
        in_frame[name] = encoding * inside.view(-1, 1, 1, 1)

    kwargs["modalities"] = data if variant != "U" else {}
    if given:
        kwargs["given"] = given
    if present:
        kwargs["absent"] = {name: ~mask for name, mask in present.items()}
    if drop_prob > 0:
        kwargs["unconditional"] = True if drop_prob >= 1 else dropped
    if alignment is not None:
        kwargs["with_middle"] = True
    terms = diffusion.training_losses(model, x_start, t, kwargs, noise, in_frame)
    predictions = terms.pop("predictions", {})
    over_time = None if weighting is None else weighting.over_time
    objectives = {IMAGE: terms["loss"] if over_time is None else over_time.image(terms, t)}
    del terms["loss"]
    taught = {name: mask.to(x_start.dtype) for name, mask in learned.items()}
    for name, modality in modalities.items():
        terms[name] = modality.loss(predictions[name], data[name])
        weight = loss_weight[name] if isinstance(loss_weight, Mapping) else loss_weight
        term = terms[name] if over_time is None else over_time.modality(name, terms[name], t)
        objectives[name] = weight * taught[name] * term
    loss = sum_of(objectives) if weighting is None else weighting.over_tasks(objectives, taught, t)
    if alignment is not None:
        terms[ALIGN] = alignment(terms.pop("middle"), x_start)
        loss = loss + alignment.weight * terms[ALIGN]
    predicted = {name: taught[name] * ~given[name] if name in given else taught[name] for name in modalities}
    sizes = {name: rms(e) for name, e in encodings.items()}
    figures = {}
    for column, (name, figure) in figures_of(modalities).items():
        with torch.no_grad():
            figures[column] = modalities[name].figure(figure, predictions[name], data[name])
        predicted[column] = predicted[name]
    return Losses(loss, objectives, terms, sizes, taught, predicted, figures, role)


def figures_of(modalities: Mapping[str, Modality]) -> dict[str, tuple[str, str]]:
    """{column of the log: (modality, which of its figures)}."""
    return {f"{figure}_{name}": (name, figure) for name, m in modalities.items() for figure in m.figures}
