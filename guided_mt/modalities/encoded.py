"""One vector per image, made of the image itself by a frozen encoder: CLIP's representation (appendix E.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ..data import ImageSource
from ..diffusion.random import SampleStreams
from ..errors import NPZ_ERRORS, UserError
from ..networks.heads import VectorUnits
from ..networks.image_encoder import ImageEncoder, check_width
from ..networks.inputs import PRECISIONS
from ..runs.distributed import Processes
from .base import Gaussian, Images
from .image import read_pictures
from .vector import read_vectors


class EncodedVector(Gaussian):
    """x in R^D [B, D]: the vector that `make` makes of an image, in units in which it has mean 0 and variance 1 in the mean
    over its entries (`heads.VectorUnits`). Gaussian head, encoded by the network from one token.

    make: builds the encoder, when it is first needed. described: {source, arch, weights}, what a cache of vectors must say of
    itself to be used in its place. normalised: take the vectors at unit length. at_hand: whether the weights are a file of this
    machine, with which a cache can be compared. The encoder is moved to the images' device, with the network's arithmetic.
    """

    figures = ("cos",)

    def __init__(
        self,
        name: str,
        size: int,
        make: Callable[[], ImageEncoder],
        described: Mapping[str, Any],
        *,
        normalised: bool = False,
        variance: Tensor | None = None,
        where: str = "",
        at_hand: bool = False,
    ):
        super().__init__(name, variance)
        self.size, self.make, self.described, self.normalised = size, make, dict(described), normalised
        self.where, self.at_hand = where or name, at_hand
        self.encoder_of_images: ImageEncoder | None = None
        self.source: ImageSource | None = None  # of training, where it holds vectors
        self.digest = b""  # of the encoder, known with it or from a cache

    @property
    def units(self) -> VectorUnits:
        """Those of the network. Raises ValueError without one."""
        if self.network is None:
            raise ValueError(f"modality '{self.name}' has its units in a network: build it with one")
        return cast(VectorUnits, self.network.units[self.name])

    # ------------------------------------------------------------ the encoder

    def encoder_on(self, device: torch.device) -> ImageEncoder:
        """The frozen encoder, on this device. Raises UserError where it can't be had, or is another than that of training."""
        if self.encoder_of_images is None:
            encoder = self.make()
            check_width(encoder, self.size, self.where)
            self._take_digest(encoder.digest, f"{self.where}: this encoder's weights", "name those")
            self.encoder_of_images = encoder
        precision = "fp32" if self.network is None else str(self.network.precision)
        return self.encoder_of_images.to(device, PRECISIONS[precision])

    def _take_digest(self, digest: bytes, what: str, way_out: str) -> None:
        """Raises UserError where the model's units were measured with another encoder. what, way_out: for its message."""
        if self._known and digest != self._known:
            raise UserError(
                f"{what} ({digest.hex()[:12]}) are not those that the model was trained with ({self._known.hex()[:12]}); {way_out}"
            )
        self.digest = digest

    @property
    def _known(self) -> bytes:
        """The digest of the encoder that the model's units were measured with; b"" before."""
        return b"" if self.network is None else self.units.digest

    @override
    def before_step(self, step: int, processes: Processes) -> None:
        if self.source is None:
            self.encoder_on(processes.device)

    # ------------------------------------------------------------ data

    @override
    def prepare(self, images: ImageSource) -> None:
        """Raises UserError where the images are stored latents without vectors, or with those of another encoder."""
        if images.dtype == np.uint8:
            return
        found = images.encoded
        if found is None:
            raise UserError(
                f"{images.path}: stored latents without representations, which '{self.name}' is made of; encode the data again by "
                f"mt-diffusion encode --representation {self.described['source']}, or leave out data.params.latents"
            )
        other = [key for key, value in self.described.items() if found.described.get(key) != value]
        if other:
            values = [str(described.get(other[0])) for described in (found.described, self.described)]
            there, here = (value if len(value) < 80 else "a mapping" for value in values)
            raise UserError(
                f"{images.path}: its representations are of another encoder: {other[0]} {there} there, "
                f"{here if here != there else 'another'} here; encode the data again"
            )
        if found.described["size"] != self.size:
            raise UserError(
                f"{images.path}: has representations of {found.described['size']} numbers, this model takes {self.size}"
            )
        digest = bytes.fromhex(found.described["digest"])
        self._take_digest(digest, f"{images.path}: the weights of its representations", "encode the data again")
        if self.at_hand and not self._known and self.make().digest != digest:
            raise UserError(
                f"{images.path}: its representations were made with other weights of the same name as those of {self.where}; "
                "encode the data again, or name the weights that it was made with"
            )
        self.source = self.source or images

    @property
    @override
    def loads(self) -> bool:
        return False  # of any image the vector can be had

    @override
    def load(self, indices: np.ndarray) -> Tensor | None:
        return None if self.source is None else self.load_of(self.source, indices)

    @override
    def load_of(self, source: ImageSource, indices: np.ndarray) -> Tensor | None:
        return None if source.encoded is None else torch.from_numpy(source.encoded.read(indices))

    @override
    def from_batch(self, images: Images, streams: SampleStreams) -> Tensor:
        return self.units.to_x(self.measured(images))

    @override
    def measured(self, images: Images) -> Tensor:
        """The encoder's vectors [B, D] of the images as they are, mirrored or not."""
        if self.name not in images.loaded:
            return self._of(images.pixels)
        stored = images.loaded[self.name]
        if images.mirrored is None:
            return self._scaled(stored[:, 0])
        return self._scaled(torch.where(images.mirrored[:, None], stored[:, 1], stored[:, 0]))

    def _of(self, pixels: Tensor) -> Tensor:
        """The vectors [B, D] of images [B, 3, H, W] in [-1, 1]."""
        return self._scaled(self.encoder_on(pixels.device)(pixels))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.normalised else vectors

    @property
    @override
    def unmeasured(self) -> bool:  # type: ignore[override]
        return not self.units.digest

    @override
    def use_measured(self, mean: Tensor, spread: Tensor) -> None:
        """Raises UserError where all vectors are the same."""
        scale = spread.square().mean().sqrt()
        if not bool(torch.isfinite(scale) & (scale > 0)):
            raise UserError(
                f"{self.where}: the encoder's vectors of the first images are all the same, or not finite; take other weights"
            )
        self.units.set(mean, scale, self.digest)

    # ------------------------------------------------------------ sampling

    @override
    def prior(self, shape: Sequence[int], streams: SampleStreams) -> Tensor:
        return torch.zeros(len(streams), self.size, device=streams.device)  # the mean vector

    @override
    def read(self, text: str, size: int, classes: Sequence[str] | None) -> Tensor:
        """Pictures float32 [N, 3, size, size], or vectors [N, D] of an .npz or .npy, as the encoder makes them."""
        path = Path(text).expanduser()
        if path.suffix == ".npy" or (path.suffix == ".npz" and path.is_file() and _holds_vectors(path, self.name)):
            found = read_vectors(text, self.name, self.size, f"--given {self.name}={text}")
            return torch.from_numpy(np.array(found, dtype=np.float32))
        return read_pictures(text, self.name, size)

    @override
    def enter(self, given: Tensor) -> Tensor:
        return self.units.to_x(self._of(given) if given.ndim == 4 else self._scaled(given))

    def vectors(self, x: Tensor) -> Tensor:
        """What x [B, D] is as a vector of the encoder [B, D]."""
        return self.units.to_vectors(x)

    @override
    def arrays(self, x: Tensor) -> dict[str, np.ndarray]:
        return {self.name: self.vectors(x).cpu().numpy()}

    @override
    def figure(self, figure: str, prediction: Tensor, x: Tensor) -> Tensor:
        """cos: the cosine between the head's vector and the true one."""
        return F.cosine_similarity(self.vectors(prediction.float()), self.vectors(x), dim=1)


def _holds_vectors(path: Path, name: str) -> bool:
    """Whether an .npz has an array `name`, or no images. What is wrong with it says `read_vectors`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return name in file.files or "arr_0" not in file.files or file["arr_0"].ndim == 2
    except NPZ_ERRORS:
        return True
