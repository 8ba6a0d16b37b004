"""What a modality is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..data import ImageSource
from ..diffusion.likelihood import mean_flat
from ..diffusion.random import SampleStreams
from ..errors import UserError
from ..networks.multi_task import MultiTask
from ..runs.distributed import Processes
from .names import check_name
from .space import Pixels, Space
from .tokens import Encoder


@dataclass
class Images:
    """A batch as modalities draw their data from it.

    x_start: z_0 [B, C, H, W]; labels: class ids [B] where there are classes, -1 for an image without; loaded {name: tensor}:
    what `Modality.load` fetched for these images, as they are, not mirrored; sides {name: Z [B, C, H, W]}: the further images
    of each; present {name: bool [B]}: which of them have that side, where not all have. image: the images [B, 3, S, S] in [-1,
    1] where z_0 is latents; cached: there are none, but latents that were stored. mirrored: which of them are mirrored, bool
    [B]; None: none.
    """

    x_start: Tensor
    labels: Tensor | None = None
    loaded: dict[str, Tensor] = field(default_factory=dict)
    sides: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    image: Tensor | None = None
    cached: bool = False
    mirrored: Tensor | None = None

    @property
    def pixels(self) -> Tensor:
        """The images [B, 3, S, S] in [-1, 1], whatever Z is. Raises UserError where only stored latents are at hand."""
        if self.cached:
            raise UserError(
                "a modality of this model reads the images, but the data are stored latents; leave out data.params.latents"
            )
        return self.x_start if self.image is None else self.image


class Modality:
    """What training and sampling ask of a modality x. B samples; (C, H, W) is the shape of the diffusion space Z.

    Raises UserError for a name that its log column or arrays can't have.
    """

    space: Space = Pixels()  # Z, set by `use_space`
    tracks_variance = False  # whether the head's squared error is the variance that `log_prob` needs
    head_trained = True  # whether its head has learned anything
    has_spread = False  # whether there is an `encoding_spread`
    is_mask = False  # whether x is the image with a part left out, so that the model restores (see `MaskedImage`)
    is_class = False  # whether x is the image's class, so that the model classifies (see `LabelModality`)
    reads_weights = False  # whether it uses weights of the network outside of the network's own passes
    partly = False  # whether some of the images have no x, known from `prepare` on
    unmeasured = False  # whether it has units that must be measured before the first step (`measured`)
    figures: tuple[str, ...] = ()  # what is logged beside the loss, as FIGURE_NAME (see `figure`)

    def __init__(self, name: str):
        check_name(name)
        self.name = name
        self.encoder: Encoder | None = None  # E(x) by the network, bound where there is one
        self.network: MultiTask | None = None  # set by `use_network`

    @property
    def has_log_prob(self) -> bool:
        """Whether `log_prob` can be asked now."""
        return self.head_trained

    def use_space(self, space: Space) -> None:
        """Called once, before anything else: the diffusion space Z."""
        self.space = space

    def use_variance(self, variance: Tensor) -> None:
        """Called with the tracked squared error of its head v_t [T], where it `tracks_variance`."""

    def use_network(self, network: MultiTask) -> None:
        """Called with the network whose heads and encodings it has."""
        self.network = network

    def figure(self, figure: str, prediction: Tensor, x: Tensor) -> Tensor:
        """One of `figures` of the head's prediction, [B]."""
        raise NotImplementedError

    def measured(self, images: Images) -> Tensor:
        """Where it is `unmeasured`: what is to be measured of a batch, [B, D]."""
        raise NotImplementedError

    def use_measured(self, mean: Tensor, spread: Tensor) -> None:
        """Take the mean [D] and the standard deviation [D] of what is `measured`."""
        raise NotImplementedError

    @property
    def loads(self) -> bool:
        """Whether its data lie beside the training images (`load`), so that other images have none."""
        return type(self).load is not Modality.load

    def prepare(self, images: ImageSource) -> None:
        """Called before training with the images, and with those of validation where there are some.

        Raises UserError where the data of this modality don't fit the images.
        """

    def load(self, indices: np.ndarray) -> Tensor | None:
        """Data that lie beside the images, for the images of these numbers [B], on the host; None where there are none."""
        return None

    def load_texts(self, captions: Sequence[str]) -> Tensor | None:
        """Data that are made of the captions [B] of a training step, on the host, in the place of `load`; None for none."""
        return None

    def load_of(self, source: ImageSource, indices: np.ndarray) -> Tensor | None:
        """As `load`, of other images than those of training, which may hold such data as well."""
        return None

    def has(self, loaded: Tensor) -> Tensor | None:
        """Which rows of what `load_of` gave [B, ...] hold data, bool [B]; None: all."""
        return None

    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        """x of a training batch, drawn on the device; anything finite for an image that has none."""
        raise NotImplementedError

    def present(self, images: Images) -> Tensor | None:
        """Which images have an x, bool [B]; None: all of them. Absent is a third state beside given and open (docs/method.md,
        section 3.1)."""
        return None

    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        """A first value [B, ...] of an unknown x, for z_0 of `shape` (C, H, W)."""
        raise NotImplementedError

    def use_classes(self, names: Sequence[str]) -> None:
        """Called before sampling with the class names of the training images, where they had some."""

    def default(self, streams: SampleStreams) -> Tensor | None:
        """The x [B, ...] that form X is given where none is asked for; None: it is given nothing."""
        return None

    def encode(self, x: Tensor) -> Tensor:
        """E(x) [B, C, H, W]; without a rule of its own the network's (docs/method.md, section 10.4)."""
        if self.encoder is None:
            raise ValueError(f"modality '{self.name}' encodes by a network: build it with one (build.build_modalities)")
        return self.encoder(x)

    def estimate(self, prediction: Tensor) -> Tensor:
        """What an unknown x becomes when its head has spoken: the mean of p(x | z_t)."""
        raise NotImplementedError

    def loss(self, prediction: Tensor, x: Tensor) -> Tensor:
        """KL_i of eq. 6 up to constants, [B]."""
        raise NotImplementedError

    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """log p(x | z_t) under the head's prediction, in nats, [B]; t [B] are original timesteps."""
        raise NotImplementedError

    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        """What the user gives as NAME=TEXT, for `enter`: [1, ...] for all samples, or [N, ...], one each. `size`: of the images,
        pixels.

        Raises UserError.
        """
        raise UserError(f"--given {self.name}={text}: this modality can't be given on the command line")

    def enter(self, given: Tensor) -> Tensor:
        """x [B, ...] of what `read` gave, on the device."""
        return given

    def picture(self, x: Tensor) -> Tensor | None:
        """x as images [B, 3, H, W] in [-1, 1] for PNG grids; None where it can't be shown."""
        return None

    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        """x as arrays [B, ...] of a sample file, by default one of the modality's name."""
        return {self.name: x.cpu().numpy()}

    def drawn(self, x: Tensor, streams: SampleStreams) -> dict[str, np.ndarray]:
        """More arrays, where x is an estimated law: a draw from it."""
        return {}

    def before_step(self, step: int, processes: Processes) -> None:
        """Called before each training step, on every process."""

    def encoding_spread(self, device: torch.device) -> Tensor:
        """Root mean square of what differs between the encodings of some values of x, 0-dim."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training run has to find again beyond the network's weights."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The counterpart of `state_dict`."""


class Gaussian(Modality):
    """Continuous data: squared error, and a Gaussian head of variance v_t I.

    variance: v_t [T], the head's mean squared error at each original timestep; only `log_prob` needs it.
    """

    tracks_variance = True

    def __init__(self, name: str, variance: Tensor | np.ndarray | Sequence[float] | None = None):
        super().__init__(name)
        self.variance = None if variance is None else torch.as_tensor(variance)

    @override
    def use_variance(self, variance: Tensor) -> None:
        self.variance = variance

    @property
    @override
    def has_log_prob(self) -> bool:
        return self.variance is not None

    @override
    def estimate(self, prediction: Tensor) -> Tensor:
        return prediction

    @override
    def loss(self, prediction: Tensor, x: Tensor) -> Tensor:
        return mean_flat((prediction - x) ** 2)

    def log_prob(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """log N(x; prediction, v_t I). Raises ValueError where no variance is known."""
        if self.variance is None:
            raise ValueError(
                f"modality '{self.name}' has no head variance; own-head conditioning needs one per timestep"
            )
        if self.variance.device != prediction.device:
            self.variance = self.variance.to(prediction.device)
        v = self.variance.to(prediction.dtype)[t]
        error = ((prediction - x) ** 2).flatten(1)
        return -0.5 * (error.sum(1) / v + error.shape[1] * torch.log(2 * math.pi * v))
